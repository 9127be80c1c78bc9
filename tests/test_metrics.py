"""Metrics: closed forms, and the interval against SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mim_core.metrics.classes import accuracy
from mim_core.metrics.pictures import hole_psnr
from mim_core.statistics import difference, interval


def test_psnr_of_a_constant_error_is_its_closed_form_over_the_hole_only() -> None:
    originals = torch.full((2, 3, 4, 4), 0.5)
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[:, :2] = True
    pictures = originals.clone()
    pictures[:, :, :2] += 0.1
    assert hole_psnr(pictures, originals, hidden) == pytest.approx(20.0, abs=1e-4)
    pictures[:, :, 2:] += 0.4
    assert hole_psnr(pictures, originals, hidden) == pytest.approx(20.0, abs=1e-4)


def test_psnr_is_of_the_batchs_mean_squared_error_over_all_channels() -> None:
    originals = torch.zeros(2, 2, 1, 1)
    pictures = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(2, 2, 1, 1)
    error = (0.01 + 0.04 + 0.09 + 0.16) / 4
    hidden = torch.ones(2, 1, 1, dtype=torch.bool)
    assert hole_psnr(pictures, originals, hidden) == pytest.approx(-10 * math.log10(error), rel=1e-6)


def test_psnr_without_error_is_infinite() -> None:
    images = torch.rand(1, 3, 2, 2)
    assert hole_psnr(images, images, torch.ones(1, 2, 2, dtype=torch.bool)) == math.inf


def test_accuracy_is_the_share_of_right_highest_logits() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).normal(70, 5, count)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    found = interval(values.tolist())
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.mean == pytest.approx(values.mean())
    assert found.count == count


def test_one_repeat_has_a_mean_and_no_interval() -> None:
    found = interval([3.0])
    assert found.mean == 3.0
    assert math.isnan(found.half)


def test_a_paired_difference_sees_through_what_seeds_share() -> None:
    baseline = [10.0, 50.0, 90.0]
    found = difference([value + 1 for value in baseline], baseline)
    assert (found.mean, found.half) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_a_paired_difference_needs_the_same_seeds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 2.0], [1.0])
