"""Comparisons over seeds: closed forms, Holm's procedure, and what simulated tables claim with and without effects."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mim_core.statistics import LEVEL, Comparison, Interval, best, detectable, holm, p_values, spread, versus

TABLES, POINTS = 10_000, 6


def by_seed(values: np.ndarray) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(values)}


def table(scores: np.ndarray) -> dict[str, Comparison]:
    """Compare the rows of one table, points x seeds, with its first."""
    return versus(by_seed(scores[0]), {str(point): by_seed(row) for point, row in enumerate(scores[1:], 1)})


def simulated(
    rng: np.random.Generator, seeds: int, tables: int = TABLES, scatter: tuple[float, ...] = ()
) -> np.ndarray:
    """Scores of tables in which nothing differs: a seed's own effect, which its points share, and their noise.

    `scatter` is how many times as much as others each of the first points scatters, the baseline first.
    """
    shared = rng.normal(0, 0.02, (tables, 1, seeds))
    times = np.ones(POINTS)
    times[: len(scatter)] = scatter
    return np.asarray(0.3 + shared + rng.normal(0, 0.01, (tables, POINTS, seeds)) * times[:, None])


def adjusted(scores: np.ndarray) -> np.ndarray:
    """What `versus` does, for many whole tables at once."""
    differences = scores[:, 1:] - scores[:, :1]
    pooled, freedom = spread(scores)
    deviation = np.sqrt(np.maximum(pooled[:, None], differences.var(-1, ddof=1)))
    return holm(p_values(differences.mean(-1), deviation, scores.shape[-1], freedom))


def test_one_comparison_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0.3, 0.02, (2, 5))
    (found,) = table(scores).values()
    reference = stats.ttest_rel(scores[1], scores[0])
    bounds = reference.confidence_interval(0.95)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    assert found.difference.count == 5


def test_the_spread_is_that_of_a_block_design() -> None:
    """With every difference of one size: twice the mean square of residuals, by hand."""
    scores = np.array([[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]])
    variance, freedom = spread(scores)
    assert (variance, freedom) == (pytest.approx(2 * 4 / 2), 2)
    # Effects of points and of seeds are no residual.
    again, _ = spread(scores + np.array([[3.0], [7.0], [1.0]]) + np.array([[5.0, -2.0]]))
    assert again == pytest.approx(variance)


def test_a_point_that_scatters_more_than_the_table_has_its_own_deviation() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(0.3, 0.01, (6, 3))
    scores[3] = [0.1, 0.5, 0.3]
    pooled, freedom = spread(scores)
    found = table(scores)
    wild = (scores[3] - scores[0]).std(ddof=1)
    critical = stats.t.isf(0.025, freedom) / math.sqrt(3)
    assert found["3"].difference.half == pytest.approx(wild * critical)
    assert found["1"].difference.half == pytest.approx(math.sqrt(pooled) * critical)


def test_holm_steps_down_as_in_a_worked_example() -> None:
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04 raised to the step before.
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])
    assert holm(np.array([0.02])) == pytest.approx([0.02])
    assert holm(np.zeros((3, 0))).shape == (3, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_p_value_and_bonferroni_in_the_same_order(p: list[float]) -> None:
    raw, adjusted = np.array(p), holm(np.array(p))
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(len(p) * raw, 1) + 1e-15).all()
    assert all(a <= b for a, b in pairwise(adjusted[np.argsort(raw, kind="stable")]))


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 2**32 - 1), st.floats(0, 0.2))
def test_a_claim_has_an_interval_without_zero(seeds: int, points: int, seed: int, effect: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.3, 0.02, (points + 1, seeds))
    scores[1:] += effect
    for found in table(scores).values():
        assert found.claimed == (found.adjusted < LEVEL)
        assert not (found.claimed and found.difference.low <= 0 <= found.difference.high)


@pytest.mark.parametrize("seeds", [3, 5])
def test_simulated_tables_say_what_versus_says(seeds: int) -> None:
    scores = simulated(np.random.default_rng(seeds), seeds, 50, (1, 4))
    scores[25:, 1] += 0.1
    for one, expected in zip(scores, adjusted(scores), strict=True):
        assert [found.adjusted for found in table(one).values()] == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize(
    ("scatter", "least", "most"),
    [((), 0.015, LEVEL), ((1, 3), 0.015, LEVEL), ((1, 1, 3, 3), 0.015, LEVEL), ((2,), 0.03, 0.08), ((3,), 0.03, 0.11)],
    ids=["alike", "one point three times", "two points three times", "baseline twice", "baseline three times"],
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_few_tables_without_an_effect_claim_one(
    scatter: tuple[float, ...], least: float, most: float, seeds: int
) -> None:
    """At most one in twenty, but where the baseline alone scatters much more than all that it is compared with."""
    scores = simulated(np.random.default_rng(10 + seeds), seeds, TABLES, scatter)
    claims = (adjusted(scores) < LEVEL).any(-1).mean()
    assert claims <= most + 3 * math.sqrt(most * (1 - most) / TABLES)
    assert claims > least  # and not because nothing is ever claimed


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_planted_effect_is_found_with_the_stated_power(seeds: int) -> None:
    rng = np.random.default_rng(20 + seeds)
    freedom = (POINTS - 1) * (seeds - 1)
    scores = simulated(rng, seeds)
    scores[:, 1] += detectable(0.01 * math.sqrt(2), seeds, POINTS - 1, freedom)
    differences = scores[:, 1] - scores[:, 0]
    # By the pooled deviation alone the power is as stated; what scatters more by chance costs some of it.
    pooled = p_values(differences.mean(-1), np.sqrt(spread(scores)[0]), seeds, freedom)
    assert (pooled < LEVEL / (POINTS - 1)).mean() == pytest.approx(0.8, abs=0.02)
    assert 0.65 < (adjusted(scores)[:, 0] < LEVEL).mean() < 0.85
    # A table's own figure counts that in.
    told = np.mean([next(iter(table(one).values())).detectable for one in scores[:500]])
    scores[:, 1] += told - detectable(0.01 * math.sqrt(2), seeds, POINTS - 1, freedom)
    assert 0.76 < (adjusted(scores)[:, 0] < LEVEL).mean() < 0.92


def test_detectable_agrees_with_the_noncentral_t() -> None:
    for count, comparisons, freedom in [(3, 1, 2), (4, 5, 15), (5, 9, 36), (20, 3, 57)]:
        critical = stats.t.isf(LEVEL / comparisons / 2, freedom)
        least = detectable(2.0, count, comparisons, freedom)
        power = stats.nct.sf(critical, freedom, least * math.sqrt(count) / 2.0)
        assert power == pytest.approx(0.8, abs=5e-4)


def test_missing_seeds_and_single_ones_are_compared_as_far_as_they_go() -> None:
    baseline = {0: 0.30, 1: 0.32, 2: 0.31}
    found = versus(baseline, {"most": {2: 0.41, 0: 0.39, 7: 0.9}, "one": {1: 0.5}, "none": {7: 0.9}, "empty": {}})
    assert found["most"].difference == Interval(pytest.approx(0.095), pytest.approx(0.0635, abs=1e-4), 2)
    assert found["most"].adjusted == found["most"].p < LEVEL  # the only one that is tested
    assert found["one"].difference.mean == pytest.approx(0.18)
    for label, count in {"one": 1, "none": 0, "empty": 0}.items():
        one = found[label]
        assert (one.difference.count, one.claimed) == (count, False)
        assert all(map(math.isnan, (one.difference.half, one.p, one.adjusted, one.detectable)))
    assert list(found) == ["most", "one", "none", "empty"]


def test_differences_that_do_not_vary_claim_nothing() -> None:
    baseline = {0: 0.3, 1: 0.4, 2: 0.5}
    found = versus(baseline, {"same": baseline, "shifted": {seed: value + 0.01 for seed, value in baseline.items()}})
    assert [(one.p, one.adjusted, one.claimed) for one in found.values()] == [(1.0, 1.0, False)] * 2
    assert found["shifted"].difference.mean == pytest.approx(0.01)
    assert found["same"].detectable == pytest.approx(0, abs=1e-12)


def test_without_points_there_is_nothing_to_compare() -> None:
    assert versus({0: 0.3, 1: 0.4}, {}) == {}
    assert best({"baseline": 0.3}, {}) is None
    assert best({}, {}) is None


def test_the_best_is_the_highest_mean_where_the_table_claims_it() -> None:
    baseline = {0: 0.30, 1: 0.32, 2: 0.31}
    sure = {0: 0.80, 1: 0.821, 2: 0.81}
    noisy = {0: 1.167, 1: 0.463, 2: 0.815}
    worse = {0: -0.30, 1: -0.279, 2: -0.29}
    means = {"base": 0.31, "sure": 0.81, "noisy": 0.815, "worse": -0.29}
    found = versus(baseline, {"sure": sure, "noisy": noisy, "worse": worse})
    assert [found[label].claimed for label in ("sure", "noisy", "worse")] == [True, False, True]
    assert best(means, found) is None  # the highest may be so by chance
    assert best({label: means[label] for label in ("base", "sure", "worse")}, found) == "sure"
    assert best({label: means[label] for label in ("base", "worse")}, found) is None
