"""Losses between predicted and true values at the predicted positions.

`loss(prediction, target) -> scalar`, both `[m, k]` with m the predicted positions of the whole batch: the mean runs
over positions and values of the batch, as in SimMIM's and MAE's published code (not per image first).
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor


def l1(prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"]) -> Float[Tensor, ""]:
    """Mean absolute error (SimMIM, section 3.4)."""
    return F.l1_loss(prediction, target)


def smooth_l1(
    prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"], *, beta: Annotated[float, Field(gt=0)] = 1.0
) -> Float[Tensor, ""]:
    """Squared below an error of `beta` (in units of the target), absolute above it."""
    return F.smooth_l1_loss(prediction, target, beta=beta)


def l2(prediction: Float[Tensor, "m k"], target: Float[Tensor, "m k"]) -> Float[Tensor, ""]:
    """Mean squared error (MAE, section 3)."""
    return F.mse_loss(prediction, target)


LOSSES = {"l1": l1, "smooth_l1": smooth_l1, "l2": l2}
