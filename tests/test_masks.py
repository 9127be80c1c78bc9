"""Masks: laws over the table, and the numbers of the published generators."""

from __future__ import annotations

import math
import random as python_random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from core_pieces import python
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from mim_core.grid import Grid
from mim_core.masks import (
    MASKS,
    MASKS_OF_MANY,
    OBJECT_MASKS,
    add_block,
    avg_distance,
    generator,
    generators,
    random,
    unit_patches,
)
from mim_core.spec import OneOf, Piece, SpecError, Strict, bind, check

PARITY = np.load(Path(__file__).parent / "parity" / "simmim_maskgen_stats.npz")
SETTINGS = sorted(name for name in PARITY.files if name.startswith("stat/"))
BLOCKS = np.load(Path(__file__).parent / "parity" / "beit_blockmask_stats.npz")
DISTANCES = np.load(Path(__file__).parent / "parity" / "avgdist_reference.npz")["rows"]
GRID = Grid(48, 32, 4)
GRIDS = (GRID, Grid(32, 32, 4), Grid(24, 40, 1), Grid(16, 48, 4))
# Params with which a mask's laws are tested where its defaults do not fit the small grids.
SMALL: dict[str, dict[str, Any]] = {
    "random": {"unit_px": 8},
    "square": {"unit_px": 4, "ratio": 0.2},
    "block_wise": {"ratio": 0.4, "least": 4},
}
IN_ANOTHER_PROCESS = f"""
from mim_core.grid import Grid
from mim_core.masks import MASKS, generator
for name, mask in MASKS.items():
    for index in range(5):
        drawn = mask(generator(3, 2, index), Grid(48, 32, 4), **{SMALL!r}.get(name, {{}}))
        print("".join(str(int(cell)) for cell in drawn.flat))
"""


class Row(Strict):
    mask: Annotated[Piece, OneOf({**MASKS, **OBJECT_MASKS})]


def draw(name: str, index: int, epoch: int = 0, seed: int = 0, grid: Grid = GRID) -> np.ndarray:
    return MASKS[name](generator(seed, epoch, index), grid, **SMALL.get(name, {}))


def mask_of(name: str, grid: Grid, index: int = 0, **params: Any) -> np.ndarray:
    return MASKS[name](generator(0, 0, index), grid, **params)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_boolean_of_the_grids_shape_that_hides_a_part(name: str, grid: Grid) -> None:
    for index in range(50):
        mask = draw(name, index, grid=grid)
        assert mask.shape == grid.shape
        assert mask.dtype == bool
        assert 0 < mask.sum() < grid.count


@pytest.mark.parametrize("name", MASKS)
def test_the_address_alone_names_the_mask(name: str) -> None:
    first = draw(name, 7)
    np.random.seed(0)
    np.testing.assert_array_equal(first, draw(name, 7))
    for other in (draw(name, 8), draw(name, 7, epoch=1), draw(name, 7, seed=1)):
        # The central mask is always the same.
        assert (first != other).any() == (name != "central")


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
    ours = [draw(name, index, epoch=2, seed=3) for name in MASKS for index in range(5)]
    assert out.split() == ["".join(str(int(cell)) for cell in mask.flat) for mask in ours]


def test_streams_of_one_address_differ() -> None:
    drawn = [generator(0, 0, 0, stream).random() for stream in range(3)]
    assert len(set(drawn)) == 3


def test_a_generator_is_numpys_philox_of_the_address_whatever_was_drawn_before() -> None:
    at = generators(7, stream=2)
    at(0, 5).integers(10, size=3)  # leaves half of a word
    for draws in (at(3, 11), generator(7, 3, 11, stream=2)):
        of_numpy = np.random.Generator(np.random.Philox(key=[7 << 8 | 2, 3 << 40 | 11]))
        assert draws.integers(1000, size=9).tolist() == of_numpy.integers(1000, size=9).tolist()
        assert draws.random(9).tolist() == of_numpy.random(9).tolist()


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


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "square", "ratio": 1.0}, "ratio: found 1.0; must be less than 1"),
    ({"name": "most_of_object", "share": 1.0}, "share: found 1.0; must be less than 1"),
    ({"name": "central", "area": 0.0}, "area: found 0.0; must be greater than 0"),
    ({"name": "random_block", "side": [0.0, 0.3]}, "side: found [0.0, 0.3]; both shares must lie above 0 and below 1"),
    ({"name": "random_region", "area": [0.3, 0.2]}, "area: found [0.3, 0.2]; the first number may not exceed"),
    ({"name": "random_region", "roughness": 0.5}, "roughness: found 0.5; must be greater than or equal to 1"),
    ({"name": "block_wise", "count": 75, "aspect": [0, 2]}, "aspect: found [0.0, 2.0]; a ratio of height to width"),
]


@pytest.mark.parametrize(("piece", "message"), BAD)
def test_a_param_out_of_its_bounds_is_told_by_the_schema(piece: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        check(Row, {"mask": piece}, "row")
    (fault,) = str(error.value).splitlines()
    assert fault.startswith(f"row.mask.{message}")


UNFIT: list[tuple[dict[str, Any], Grid, str]] = [
    ({"name": "square"}, Grid(64, 64, 4), "ratio: found 0.6; .* 2 units a side, and of 2 x 2 units of 32 px"),
    ({"name": "square", "unit_px": 4}, Grid(8, 64, 4), "ratio: found 0.6; .* 4 units a side, and of 2 x 16 units"),
    ({"name": "central", "area": 0.9}, Grid(4, 4, 1), "area: found 0.9; on a grid of 4 x 4 it leaves no cell visible"),
    ({"name": "random_block"}, Grid(1, 3, 1), "side: found .* a square of 1 cells a side passes the area 0.25"),
    ({"name": "random_region"}, Grid(1, 2, 1), "area: found .* no whole number of the grid's 2 cells lies within"),
    ({"name": "block_wise"}, GRID, "ratio: found None beside count None; exactly one says how much to hide"),
    ({"name": "block_wise", "ratio": 0.4, "count": 3}, GRID, "ratio: found 0.4 beside count 3; exactly one"),
    ({"name": "block_wise", "count": 96}, GRID, "count: found 96, that is 96 of 12 x 8 units; .* some visible"),
    ({"name": "block_wise", "count": 15}, GRID, "least: found 16; .* neither the 15 units to hide nor most 15"),
    ({"name": "block_wise", "count": 20}, Grid(2, 20, 1), "least: found 16; no block of that area .* 2 x 20 units"),
]


@pytest.mark.parametrize(("piece", "grid", "message"), UNFIT)
def test_params_that_do_not_fit_are_refused_at_the_first_draw(piece: dict[str, Any], grid: Grid, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        bind(MASKS, check(Row, {"mask": piece}, "row").mask)(generator(0, 0, 0), grid)


@settings(deadline=None)
@given(st.integers(3, 40), st.integers(3, 40), st.floats(0.01, 0.5))
def test_the_central_mask_is_in_the_middle_and_nearest_to_its_share(height: int, width: int, area: float) -> None:
    hidden = mask_of("central", Grid(height, width, 1), area=area)
    for axis, cells in enumerate(hidden.shape):
        (at,) = np.nonzero(hidden.any(1 - axis))
        assert at[0] - (cells - 1 - at[-1]) in {0, -1}
        assert abs(len(at) - max(1, cells * math.sqrt(area))) <= 0.5
    assert hidden.sum() == hidden.any(0).sum() * hidden.any(1).sum()


@settings(deadline=None)
@given(settings_that_fit(), st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_a_square_has_whole_units_and_the_nearest_share(fits: tuple[Grid, int], ratio: float, index: int) -> None:
    grid, unit_px = fits
    unit = unit_px // grid.patch_px
    side = max(1, round(math.sqrt(ratio * grid.count / unit**2)))
    if side * unit > min(grid.shape) or (side * unit, side * unit) == grid.shape:
        return
    hidden = mask_of("square", grid, index, ratio=ratio, unit_px=unit_px)
    (top, *_), (left, *_) = np.nonzero(hidden)
    assert top % unit == left % unit == 0
    assert hidden[top : top + side * unit, left : left + side * unit].all()
    assert hidden.sum() == (side * unit) ** 2


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.25, 0.9), st.integers(0, 10**6))
def test_random_blocks_keep_to_their_area(height: int, width: int, area: float, index: int) -> None:
    hidden = mask_of("random_block", Grid(height, width, 1), index, area=area, side=(0.01, 0.4))
    assert 0 < hidden.sum() <= area * hidden.size


def test_random_blocks_are_several_squares_that_come_near_to_their_area() -> None:
    masks = [mask_of("random_block", Grid(64, 96, 1), index, side=(0.25, 0.25)) for index in range(100)]
    assert np.mean(masks) == pytest.approx(0.245, abs=0.005)
    for hidden in masks:
        # Opening keeps what 16 x 16 squares cover.
        np.testing.assert_array_equal(hidden, ndimage.binary_opening(hidden, np.ones((16, 16))))
        assert hidden.sum() > 2 * 16**2


@settings(deadline=None)
@example(32, 32, 0.25, 0.0, 0)  # What no window has, a quantile gives.
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.05, 0.9), st.floats(0, 0.1), st.integers(0, 10**6))
def test_random_regions_keep_to_their_area(height: int, width: int, low: float, more: float, index: int) -> None:
    grid, area = Grid(height, width, 1), (low, min(0.95, low + more))
    if max(1, math.ceil(area[0] * grid.count)) > math.floor(area[1] * grid.count):
        return
    share = mask_of("random_region", grid, index, area=area).mean()
    assert area[0] - 1e-9 <= share <= area[1] + 1e-9


def next_to_hidden(masks: np.ndarray, step: int = 1) -> float:
    """The chance that a cell is hidden whose left neighbour, or the one `step` cells to the left, is."""
    return float(masks[:, :, step:][masks[:, :, :-step]].mean())


def test_random_regions_are_connected_at_any_size_and_are_everywhere_equally_often() -> None:
    fine, large, coarse = (
        np.array([mask_of("random_region", grid, index, roughness=roughness) for index in range(draws)])
        for grid, roughness, draws in ((Grid(32, 32, 1), 7.7, 1200), (Grid(128, 128, 1), 7.7, 60), (GRID, 3, 300))
    )
    assert next_to_hidden(fine) == pytest.approx(0.79, abs=0.02)
    # The texture grows with the image.
    assert next_to_hidden(large, 4) == pytest.approx(0.79, abs=0.02)
    assert next_to_hidden(coarse) > 0.6
    frequency = fine.mean(0)
    error = math.sqrt(frequency.mean() * (1 - frequency.mean()) / 1200)
    assert abs(frequency - frequency.mean()).max() < 5 * error
    assert frequency.std() < 1.2 * error


PUBLISHED_BLOCKS: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_14_75_min16": (14, {"count": 75}),
    "cap32": (14, {"count": 75, "most": 32}),
    "maskfeat_14_78_min16": (14, {"ratio": 0.4}),
    "simmim_style_12_86_min16": (12, {"ratio": 0.6}),
}


class PythonGenerator(python_random.Random):
    """The standard library's generator, which the published code draws from, behind the calls that ours makes."""

    def integers(self, high: int) -> int:
        return self.randint(0, high - 1)


def blocks(name: str, rngs: Iterable[Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Masks, and the published numbers of theirs."""
    side, params = PUBLISHED_BLOCKS[name]
    masks = np.array([MASKS["block_wise"](rng, Grid(side, side, 1), **params) for rng in rngs])
    return masks, {key.removeprefix(f"{name}/"): BLOCKS[key] for key in BLOCKS.files if key.startswith(name)}


@pytest.mark.parametrize("name", PUBLISHED_BLOCKS)
def test_block_wise_masks_are_those_published_bit_for_bit_under_the_same_generator(name: str) -> None:
    masks, published = blocks(name, [PythonGenerator(0)] * 5000)
    counts = masks.sum((1, 2))
    np.testing.assert_allclose([counts.mean(), counts.std()], published["count_mean_std_min_max"][:2], rtol=1e-12)
    np.testing.assert_array_equal(np.bincount(counts), published["count_hist"])
    np.testing.assert_allclose(masks.mean(0), published["per_position_freq"], atol=1e-7)
    np.testing.assert_allclose(next_to_hidden(masks), published["p_right_neighbour_masked_given_masked"], rtol=1e-12)
    if name == "beit_14_75_min16":
        np.testing.assert_array_equal(masks[0], BLOCKS["first_mask_seed0"])


@pytest.mark.parametrize("name", PUBLISHED_BLOCKS)
def test_block_wise_masks_have_the_published_distribution_under_our_generator(name: str) -> None:
    masks, published = blocks(name, (generator(0, 0, index) for index in range(1200)))
    np.testing.assert_allclose(masks.sum((1, 2)).mean(), published["count_mean_std_min_max"][0], atol=0.05)
    np.testing.assert_allclose(next_to_hidden(masks), published["p_right_neighbour_masked_given_masked"], atol=0.01)
    # Five standard errors of both samples.
    np.testing.assert_allclose(masks.mean(0), published["per_position_freq"], atol=0.08)


def test_first_blocks_have_the_published_sizes() -> None:
    sizes = np.zeros((14, 14), int)
    rng = PythonGenerator(1)
    for _ in range(5000):
        hidden = np.zeros((14, 14), bool)
        assert add_block(rng, hidden, 16, 75, (0.3, 1 / 0.3))  # type: ignore[arg-type]
        sizes[hidden.any(1).sum(), hidden.any(0).sum()] += 1
    np.testing.assert_array_equal(sizes, BLOCKS["first_block_hw_hist2d"])


@settings(deadline=None)
@given(settings_that_fit(), st.floats(0.01, 0.99), st.integers(1, 6), st.integers(0, 10**6))
def test_block_wise_hides_whole_units_and_never_passes_its_count(
    fits: tuple[Grid, int], ratio: float, least: int, index: int
) -> None:
    grid, unit_px = fits
    unit = unit_px // grid.patch_px
    try:
        hidden = mask_of("block_wise", grid, index, ratio=ratio, least=least, unit_px=unit_px)
    except ValueError:
        return
    units = hidden[::unit, ::unit]
    np.testing.assert_array_equal(hidden, units.repeat(unit, 0).repeat(unit, 1))
    assert 0 < units.sum() <= ratio * units.size + 1e-6


def test_an_object_hides_every_cell_that_it_touches_or_most_of_them() -> None:
    labels = np.zeros((48, 32), np.uint8)
    labels[3, 3], labels[8:17, 20] = 2, 1
    expected = np.zeros(GRID.shape, bool)
    expected[0, 0], expected[2:5, 5] = True, True
    np.testing.assert_array_equal(OBJECT_MASKS["object"](generator(0, 0, 0), GRID, labels), expected)
    masks = [OBJECT_MASKS["most_of_object"](generator(0, 0, index // 2), GRID, labels) for index in range(80)]
    np.testing.assert_array_equal(masks[::2], masks[1::2])
    # Three of four cells; each of them stays visible at times.
    assert all(mask.sum() == 3 and not (mask & ~expected).any() for mask in masks)
    assert not np.all(masks, 0).any()


@pytest.mark.parametrize(("cells", "share", "count"), [(1, 0.75, 1), (2, 0.99, 1), (5, 0.5, 3), (8, 0.99, 7)])
def test_most_of_an_object_is_its_share_rounded_up_but_not_all(cells: int, share: float, count: int) -> None:
    labels = (np.arange(48 * 32) < 4 * cells).reshape(48, 32).astype(np.uint8)
    assert OBJECT_MASKS["most_of_object"](generator(0, 0, 0), GRID, labels, share=share).sum() == count


@pytest.mark.parametrize("name", OBJECT_MASKS)
@pytest.mark.parametrize(("labels", "message"), [(np.zeros((48, 32)), "no labelled"), (np.ones((32, 32)), "32, 32")])
def test_labels_that_hold_no_object_are_refused(name: str, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"instances: found \(?{message}"):
        OBJECT_MASKS[name](generator(0, 0, 0), GRID, labels.astype(np.uint8))


def test_avg_distance_of_a_square_is_its_closed_form() -> None:
    for side in range(1, 8):
        hidden = np.zeros((10, 9), bool)
        hidden[1 : 1 + side, 1 : 1 + side] = True
        # Rings of a square of s px, each as far from its edge as it is deep: (s + 1)(s + 2) / 6s.
        assert avg_distance(hidden, Grid(40, 36, 4)) == pytest.approx((4 * side + 1) * (4 * side + 2) / (24 * side))
    assert avg_distance(np.zeros((10, 9), bool), Grid(40, 36, 4)) == 0.0
    assert math.isnan(avg_distance(np.ones((10, 9), bool), Grid(40, 36, 4)))


@pytest.mark.parametrize(("unit_px", "ratio", "published"), DISTANCES.tolist())
def test_avg_distance_is_that_of_published_masks(unit_px: float, ratio: float, published: float) -> None:
    grid = Grid(192, 192, 4)
    masks = [mask_of("random", grid, index, ratio=ratio, unit_px=int(unit_px)) for index in range(24)]
    found = np.array([avg_distance(mask, grid) for mask in masks])
    # The published numbers are means of 20 draws, as the next test shows.
    error = found.std(ddof=1) * math.sqrt(1 / 20 + 1 / 24)
    assert found.mean() == pytest.approx(published, abs=4 * error, nan_ok=True)


def test_avg_distance_is_the_published_one_to_the_last_digit() -> None:
    # One of 3 x 3 cells is hidden: in 20 draws 8 corners, 9 sides and 3 centres.
    found = [avg_distance(np.eye(9, dtype=bool)[cell].reshape(3, 3), Grid(192, 192, 64)) for cell in (0, 1, 4)]
    (published,) = DISTANCES[(DISTANCES[:, 0] == 64) & (DISTANCES[:, 1] == 0.1), 2]
    assert np.dot(found, [8, 9, 3]) / 20 == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize("name", MASKS_OF_MANY)
@pytest.mark.parametrize(("grid", "unit_px"), [(Grid(48, 32, 4), 8), (Grid(224, 224, 16), 16), (Grid(64, 64, 2), 32)])
def test_masks_of_many_are_those_of_each(name: str, grid: Grid, unit_px: int) -> None:
    addresses = [(epoch, index) for epoch in (0, 7, 2**20) for index in (0, 1, 12345, 2**39)]
    for ratio in (0.1, 0.6, 0.95):
        each = [MASKS[name](generator(5, *one), grid, ratio=ratio, unit_px=unit_px) for one in addresses]
        many = MASKS_OF_MANY[name](torch.tensor(addresses), grid, seed=5, ratio=ratio, unit_px=unit_px)
        assert np.array_equal(many.numpy(), np.stack(each))
        # On the grid of units the same part of the image is hidden.
        coarse = Grid(grid.height, grid.width, unit_px)
        units = MASKS_OF_MANY[name](torch.tensor(addresses), coarse, seed=5, ratio=ratio, unit_px=unit_px)
        assert torch.equal(grid.pixels(many.flatten(1)), coarse.pixels(units.flatten(1)))
