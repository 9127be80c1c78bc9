"""Losses between predicted and true entries at the predicted positions.

`loss(prediction, target) -> elementwise`: one loss an entry, unreduced, in the shape of the target. The caller takes
the mean, and so decides what it runs over. NUMBER_LOSSES compare numbers with numbers, both `[m, k]`; CLASS_LOSSES
compare logits `[r, C, s]` with classes `[r, s]`, where r runs over rows of any kind, C over the classes and s over what
else a row holds. A row of params may choose from `LOSSES`, the two together, as its target allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor


def l1(prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Absolute error (SimMIM, section 3.4)."""
    return F.l1_loss(prediction, target, reduction="none")


def smooth_l1(
    prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"], *, beta: Annotated[float, Field(gt=0)] = 1.0
) -> Float[Tensor, "m k"]:
    """Squared below an error of `beta` (in units of the target), absolute above it."""
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")


def l2(prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Squared error (MAE, section 3; MaskFeat)."""
    return F.mse_loss(prediction, target, reduction="none")


def cross_entropy(
    prediction: Float[Tensor, "r C s"],
    target: Int[Tensor, "r s"],
    *,
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Float[Tensor, "r s"]:
    """Negative log-likelihood of the true class in nats (BEiT, section 2.3; ViT, appendix B.1.2).

    `smoothing` is the share of the target's weight that is spread evenly over all classes.
    """
    return F.cross_entropy(prediction, target, label_smoothing=smoothing, reduction="none")


Loss = Callable[..., Tensor]

NUMBER_LOSSES: dict[str, Loss] = {"l1": l1, "smooth_l1": smooth_l1, "l2": l2}
CLASS_LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
LOSSES: dict[str, Loss] = {**NUMBER_LOSSES, **CLASS_LOSSES}
