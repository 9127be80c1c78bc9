"""Statistics over seeds: means, paired differences, and what a table of them may claim.

A table compares several points with one baseline, seed by seed. Few seeds say little about how much one point scatters,
so a table's points are taken together: the residual of scores about their point and their seed (a randomised block
design; G. Casella, "Statistical Design", 2008, chapter 3) has (points - 1) (seeds - 1) degrees of freedom. A point
whose own differences scatter more is tested by its own deviation. P-values are adjusted for their number by Holm's
procedure (S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6,
1979), so that of all tables in which nothing differs at most one in twenty claims anything. That holds where points
scatter alike and where some scatter several times as much; a baseline that alone scatters three times as much as all
others raises it to one in ten (all simulated in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

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

    `p` is of the two-sided t test and `adjusted` Holm's over the table, both nan below two seeds; the interval of the
    difference is that test's. `claimed` says that the table may call it a difference. `detectable` is the smallest true
    difference that would be claimed in four of five tables of as many seeds, nan where it cannot be said.
    """

    difference: Interval
    p: float
    adjusted: float
    claimed: bool
    detectable: float


def versus(baseline: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    """Compare each of several points with the baseline; values by seed.

    A point with fewer than two of the baseline's seeds is not tested, and does not count as a comparison. Scatter is
    pooled over the seeds that all tested points have.
    """
    shared = {label: sorted(values.keys() & baseline.keys()) for label, values in others.items()}
    found = {label: np.array([others[label][one] - baseline[one] for one in seeds]) for label, seeds in shared.items()}
    tested = [label for label, one in found.items() if len(one) > 1]
    whole = sorted(set.intersection(set(baseline), *(set(shared[label]) for label in tested)))
    table = np.array([[one[seed] for seed in whole] for one in (baseline, *(others[label] for label in tested))])
    own = {label: float(found[label].var(ddof=1)) for label in tested}
    pooled, freedom = spread(table) if tested and len(whole) > 1 else (np.zeros(()), 0)
    if not freedom:  # no two seeds in common: pooled over the points' own, by degrees of freedom
        freedom = sum(len(found[label]) - 1 for label in tested)
        squares = sum((len(found[label]) - 1) * own[label] for label in tested)
        pooled = np.array(squares / freedom) if freedom else pooled
    error = {label: math.sqrt(max(float(pooled), own[label])) for label in tested}
    typical = math.sqrt(sum(one**2 for one in error.values()) / len(tested)) if tested else math.nan
    p = {label: float(p_values(found[label].mean(), error[label], len(found[label]), freedom)) for label in tested}
    adjusted = dict(zip(p, holm(np.array(list(p.values()))).tolist(), strict=True))
    compared: dict[str, Comparison] = {}
    for label, one in found.items():
        mean, count = float(one.mean()) if len(one) else math.nan, len(one)
        if label not in p:
            compared[label] = Comparison(Interval(mean, math.nan, count), math.nan, math.nan, False, math.nan)
            continue
        half = float(special.stdtrit(freedom, 1 - LEVEL / 2)) * error[label] / math.sqrt(count)
        least = detectable(typical, count, len(tested), freedom)
        claim = adjusted[label] < LEVEL
        compared[label] = Comparison(Interval(mean, half, count), p[label], adjusted[label], claim, least)
    return compared


def best(means: Mapping[str, float], compared: Mapping[str, Comparison]) -> str | None:
    """Give the point that may be marked best: the highest mean, if the table claims that it beats the baseline.

    `means` has the baseline too; None where that is the highest, or where the highest may be so by chance.
    """
    first = max(means, key=lambda label: means[label], default=None)
    found = compared.get(first) if first is not None else None
    return first if found and found.claimed and found.difference.mean > 0 else None


def spread(scores: Float[np.ndarray, "*tables points seeds"]) -> tuple[Float[np.ndarray, "*tables"], int]:
    """Give the variance of a difference of two points with one seed, and its degrees of freedom.

    It is twice the mean square of what is left of the scores beside the means of points and of seeds.
    """
    points, seeds = scores.shape[-2:]
    residual = scores - scores.mean(-1, keepdims=True) - scores.mean(-2, keepdims=True)
    residual = residual + scores.mean((-1, -2), keepdims=True)
    freedom = (points - 1) * (seeds - 1)
    return 2 * (residual**2).sum((-1, -2)) / freedom, freedom


def p_values(mean: Any, deviation: Any, count: int, freedom: int) -> Float[np.ndarray, "*tables"]:
    """Two-sided p of Student's t test that differences have mean zero; mean and deviation are over `count` seeds.

    Differences that do not vary at all have p 1: seeds can only agree to the last digit where the score is counted in
    steps too coarse to show how they vary, which says nothing about chance.
    """
    mean, deviation = np.asarray(mean, float), np.asarray(deviation, float)
    # Equal differences of scores differ in their last bits.
    varies = deviation > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    t = np.divide(mean, deviation / math.sqrt(count), out=np.zeros_like(mean), where=varies)
    return np.asarray(2 * special.stdtr(freedom, -np.abs(t)))


def holm(p: Float[np.ndarray, "*tables points"]) -> Float[np.ndarray, "*tables points"]:
    """Adjust the p-values of each table by Holm's step-down procedure."""
    count = p.shape[-1]
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * np.arange(count, 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1), -1)
    return adjusted


def detectable(deviation: float, count: int, comparisons: int, freedom: int) -> float:
    """Give the smallest true difference that four tables of five find, with paired differences of this deviation.

    Found means at 0.05 / comparisons, Holm's first step, two-sided and with `count` seeds, at least two; the deviation
    is known from `freedom` degrees of freedom. The power is from the noncentral t distribution.
    """
    return _shift(freedom, comparisons) * deviation / math.sqrt(count)


@cache
def _shift(freedom: int, comparisons: int) -> float:
    """Give the noncentrality at which |t| exceeds its critical value with the stated power."""
    critical = special.stdtrit(freedom, 1 - LEVEL / comparisons / 2)
    # A noncentral t is (z + shift) / s with s a chi over the root of its degrees of freedom. The mean over quantiles of
    # s is right to 1e-4 everywhere; scipy's nct is nan at the few degrees of freedom that seeds have.
    quantiles = (np.arange(4_000) + 0.5) / 4_000
    bound = critical * np.sqrt(2 * special.gammaincinv(freedom / 2, quantiles) / freedom)

    def lacking(shift: float) -> float:
        return float((special.ndtr(shift - bound) + special.ndtr(-shift - bound)).mean()) - POWER

    return float(optimize.brentq(lacking, 0, bound.max() + 5))
