"""Metrics and the statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor


def hole_psnr(
    pictures: Float[Tensor, "b c H W"], originals: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b H W"]
) -> float:
    """Peak signal-to-noise ratio in dB over hidden pixels only; both in [0, 1], mean squared error over the batch."""
    error = ((pictures - originals) ** 2).mean(1)[hidden].mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def accuracy(logits: Float[Tensor, "b k"], labels: Tensor) -> float:
    """Share of images whose highest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (Student's t over `count` seeds); half is nan below two."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent repeats."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, math.nan, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count), count)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Paired difference to a baseline, seed by seed (the seeds share data order, crops and label subset)."""
    return interval([a - b for a, b in zip(values, baseline, strict=True)])
