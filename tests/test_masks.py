"""Masks: laws over the table, and the distribution of the published generator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_pieces import python
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mim_core.masks import MASKS, Grid, generator, random, unit_patches

PARITY = np.load(Path(__file__).parent / "parity" / "simmim_maskgen_stats.npz")
SETTINGS = sorted(name for name in PARITY.files if name.startswith("stat/"))
GRID = Grid(48, 32, 4)
# Params with which a mask's laws are tested where its defaults do not fit the small grid.
SMALL: dict[str, dict[str, Any]] = {"random": {"unit_px": 8}}
IN_ANOTHER_PROCESS = """
from mim_core.masks import Grid, generator, random
for index in range(5):
    print("".join(str(int(cell)) for cell in random(generator(3, 2, index), Grid(48, 32, 4), unit_px=8).flat))
"""


def draw(name: str, index: int, epoch: int = 0, seed: int = 0) -> np.ndarray:
    return MASKS[name](generator(seed, epoch, index), GRID, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_boolean_of_the_grids_shape_that_hides_a_part(name: str) -> None:
    for index in range(50):
        mask = draw(name, index)
        assert mask.shape == GRID.shape
        assert mask.dtype == bool
        assert 0 < mask.sum() < GRID.count


@pytest.mark.parametrize("name", MASKS)
def test_the_address_alone_names_the_mask(name: str) -> None:
    first = draw(name, 7)
    np.random.seed(0)
    np.testing.assert_array_equal(first, draw(name, 7))
    for other in (draw(name, 8), draw(name, 7, epoch=1), draw(name, 7, seed=1)):
        assert (first != other).any()


@st.composite
def settings_that_fit(draw: st.DrawFn) -> tuple[Grid, int]:
    patch, unit = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return Grid(patch * unit * rows, patch * unit * columns, patch), patch * unit


@settings(deadline=None)
@given(settings_that_fit(), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_random_hides_exactly_the_rounded_up_share_of_whole_units(
    fits: tuple[Grid, int], ratio: float, seed: int, index: int
) -> None:
    grid, unit_px = fits
    mask = random(generator(seed, 0, index), grid, ratio=ratio, unit_px=unit_px)
    unit = unit_px // grid.patch_px
    cells = mask[::unit, ::unit]
    assert mask.shape == grid.shape
    np.testing.assert_array_equal(mask, cells.repeat(unit, 0).repeat(unit, 1))
    assert cells.sum() == math.ceil(ratio * cells.size)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 60))
def test_a_unit_divides_or_the_message_lists_those_that_do(patch: int, rows: int, columns: int, unit: int) -> None:
    grid = Grid(patch * rows, patch * columns, patch)
    fits = [u for u in range(1, 100) if u % patch == 0 and grid.height % u == 0 and grid.width % u == 0]
    if unit in fits:
        assert unit_patches(grid, unit) * patch == unit
    else:
        with pytest.raises(ValueError, match="unit_px: found") as error:
            unit_patches(grid, unit)
        assert str(error.value).endswith(f"choose one of {fits}")


def test_an_image_that_patches_do_not_fill_is_refused_with_a_size_that_fits() -> None:
    with pytest.raises(ValueError, match=r"image width: found 30 px; .* patch_px 4; try 28"):
        Grid(32, 30, 4)


def test_another_process_draws_the_same_masks() -> None:
    out, errors = python("-c", IN_ANOTHER_PROCESS).communicate(timeout=120)
    assert not errors
    for index, line in enumerate(out.split()):
        mask = random(generator(3, 2, index), GRID, unit_px=8)
        assert line == "".join(str(int(cell)) for cell in mask.flat)
    assert index == 4


def test_streams_of_one_address_differ() -> None:
    drawn = [generator(0, 0, 0, stream).random() for stream in range(3)]
    assert len(set(drawn)) == 3


def published(setting: str) -> tuple[Grid, dict[str, Any], dict[str, float]]:
    size, unit, patch, ratio = setting.removeprefix("stat/").split("_")
    columns = dict(zip(PARITY["columns"].tolist(), PARITY[setting].tolist(), strict=True))
    return Grid(int(size), int(size), int(patch)), {"ratio": float(ratio), "unit_px": int(unit)}, columns


@pytest.mark.parametrize("setting", SETTINGS)
def test_counts_and_frequencies_are_those_of_the_published_generator(setting: str) -> None:
    grid, params, columns = published(setting)
    assert grid.shape == (columns["grid"], columns["grid"])
    draws = 2000
    frequency = np.zeros(grid.shape)
    for index in range(draws):
        mask = random(generator(0, 0, index), grid, **params)
        assert mask.sum() == columns["ones_in_first"]
        frequency += mask / draws
    assert frequency.mean() == pytest.approx(columns["mean_fraction"], abs=1e-9)
    # The spread over positions of 2000 draws: binomial, so the same for both but for its own sampling error.
    unit = params["unit_px"] // grid.patch_px
    expected = math.sqrt(columns["mean_fraction"] * (1 - columns["mean_fraction"]) / draws)
    error = 4 * expected / math.sqrt(2 * frequency[::unit, ::unit].size)
    assert frequency.std() == pytest.approx(columns["std_of_per_position_freq"], abs=error)


def test_a_published_mask_has_the_structure_of_ours() -> None:
    theirs = PARITY["first_mask_seed0_192_32_4_0.6"].astype(bool)
    ours = random(generator(0, 0, 0), Grid(192, 192, 4), ratio=0.6, unit_px=32)
    assert theirs.shape == ours.shape
    assert theirs.sum() == ours.sum()
    np.testing.assert_array_equal(theirs, theirs[::8, ::8].repeat(8, 0).repeat(8, 1))


def test_every_cell_is_hidden_equally_often() -> None:
    draws, grid = 4000, Grid(32, 48, 8)
    counts = sum(random(generator(0, epoch, 5), grid, ratio=0.5, unit_px=8).astype(int) for epoch in range(draws))
    # Exactly half of each mask is hidden, so deviations over cells are those of sampling without replacement.
    cells = grid.count
    statistic = ((counts - draws / 2) ** 2).sum() / (draws / 4) * (cells - 1) / cells
    assert stats.chi2.sf(statistic, cells - 1) > 0.001
