"""Statistics over seeds: means, paired differences, and what a table of them may claim.

A table compares several points with one baseline, seed by seed. Its p-values are of paired t tests and adjusted for
their number by Holm's procedure (S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian
Journal of Statistics 6, 1979), so that of all tables in which nothing differs at most one in twenty claims anything,
however the points depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

LEVEL = 0.05
"""Share of tables without any difference that may claim one."""
POWER = 0.8


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


@dataclass(frozen=True)
class Comparison:
    """A point beside the baseline: `difference` is paired, over the seeds that both have.

    `p` is of the two-sided paired t test and `adjusted` Holm's over the table, both nan below two seeds. `claimed` says
    that the table may call it a difference. `detectable` is the smallest true difference that would be claimed in four
    of five tables of as many seeds, nan where it cannot be said.
    """

    difference: Interval
    p: float
    adjusted: float
    claimed: bool
    detectable: float


def versus(baseline: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    """Compare each of several points with the baseline; values by seed.

    A point with fewer than two of the baseline's seeds is not tested, and does not count as a comparison.
    """
    differences = {
        label: np.array([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
        for label, values in others.items()
    }
    tested = {label: found for label, found in differences.items() if len(found) > 1}
    p = {label: float(p_values(found)) for label, found in tested.items()}
    adjusted = dict(zip(p, holm(np.array(list(p.values()))).tolist(), strict=True))
    # Pooled by degrees of freedom: the root mean square of the deviations where all have the same seeds.
    freedom = sum(len(found) - 1 for found in tested.values())
    variance = sum(float(((found - found.mean()) ** 2).sum()) for found in tested.values()) / max(freedom, 1)
    return {
        label: Comparison(
            interval(found.tolist()) if len(found) else Interval(math.nan, math.nan, 0),
            p.get(label, math.nan),
            adjusted.get(label, math.nan),
            adjusted.get(label, 1.0) < LEVEL,
            detectable(math.sqrt(variance), len(found), len(tested)) if label in tested else math.nan,
        )
        for label, found in differences.items()
    }


def best(means: Mapping[str, float], compared: Mapping[str, Comparison]) -> str | None:
    """Give the point that may be marked best: the highest mean, if the table claims that it beats the baseline.

    `means` has the baseline too; None where that is the highest, or where the highest may be so by chance.
    """
    first = max(means, key=lambda label: means[label], default=None)
    found = compared.get(first) if first is not None else None
    return first if found and found.claimed and found.difference.mean > 0 else None


def p_values(differences: Float[np.ndarray, "*tables seeds"]) -> Float[np.ndarray, "*tables"]:
    """Two-sided p of Student's t test that paired differences have mean zero; at least two seeds.

    Differences that do not vary at all have p 1: seeds can only agree to the last digit where the score is counted in
    steps too coarse to show how they vary, which says nothing about chance.
    """
    count = differences.shape[-1]
    mean, deviation = differences.mean(-1), differences.std(-1, ddof=1)
    # Equal differences of scores differ in their last bits.
    varies = deviation > 1e-12 * np.abs(differences).max(-1)
    t = np.divide(mean, deviation / math.sqrt(count), out=np.zeros_like(mean), where=varies)
    return np.asarray(2 * special.stdtr(count - 1, -np.abs(t)))


def holm(p: Float[np.ndarray, "*tables points"]) -> Float[np.ndarray, "*tables points"]:
    """Adjust the p-values of each table by Holm's step-down procedure."""
    count = p.shape[-1]
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * np.arange(count, 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1), -1)
    return adjusted


def detectable(deviation: float, count: int, comparisons: int) -> float:
    """Give the smallest true difference that four tables of five find, with paired differences of this deviation.

    Found means at 0.05 / comparisons, Holm's first step, two-sided and with `count` seeds, at least two. The power is
    from the noncentral t distribution.
    """
    return _shift(count, comparisons) * deviation / math.sqrt(count)


@cache
def _shift(count: int, comparisons: int) -> float:
    """Give the noncentrality at which |t| exceeds its critical value with the stated power."""
    freedom = count - 1
    critical = special.stdtrit(freedom, 1 - LEVEL / comparisons / 2)
    # A noncentral t is (z + shift) / s with s a chi over the root of its degrees of freedom. The mean over quantiles of
    # s is right to 1e-4 everywhere; scipy's nct is nan at the few degrees of freedom that seeds have.
    quantiles = (np.arange(4_000) + 0.5) / 4_000
    bound = critical * np.sqrt(2 * special.gammaincinv(freedom / 2, quantiles) / freedom)

    def lacking(shift: float) -> float:
        return float((special.ndtr(shift - bound) + special.ndtr(-shift - bound)).mean()) - POWER

    return float(optimize.brentq(lacking, 0, bound.max() + 5))
