"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


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
