"""Metrics of pictures."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor


def hole_psnr(
    pictures: Float[Tensor, "b c H W"], originals: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b H W"]
) -> float:
    """Peak signal-to-noise ratio in dB over hidden pixels only; both in [0, 1], mean squared error over the batch."""
    return psnr(((pictures - originals) ** 2).mean(1)[hidden].mean().item())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error between pictures in [0, 1]."""
    return math.inf if error == 0 else -10 * math.log10(error)
