"""Targets: laws over the table, what rendering gives back, and the published formulas and cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mim_core.grid import Grid, patchify, unpatchify
from mim_core.losses import cross_entropy, l2
from mim_core.spec import OneOf, Piece, SpecError, Strict, build, check
from mim_core.targets import TARGETS
from mim_core.targets.base import Target
from mim_core.targets.colours import ColourGrid, mean_colour, quantise
from mim_core.targets.fitted import Clusters, Tokens
from mim_core.targets.hog import Hog, gaussian
from mim_core.targets.pixels import Pixels, window_moments

PARITY = Path(__file__).parent / "parity"
GRID = Grid(16, 24, 8)
SIDE = st.integers(1, 4)
FITTED = ("clusters", "tokens")
# Every target with its choices; a fitted one has a stub to read.
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("pixels", {}),
    ("pixels", {"normalise": "patch"}),
    ("pixels", {"normalise": "window", "window_px": 5}),
    ("pixels", {"cell_px": 4}),
    ("pixels", {"normalise": "patch", "cell_px": 4}),
    ("mean_colour", {}),
    ("mean_colour", {"bits": 2}),
    ("colour_grid", {}),
    ("colour_grid", {"side": 2, "bits": 1}),
    ("colour_bins", {}),
    ("colour_bins", {"bins": 256, "cell_px": 2}),
    ("hog", {}),
    ("hog", {"bins": 6, "cell_px": 4, "gaussian_px": 8}),
    ("clusters", {"fitted": "stub"}),
    ("clusters", {"fitted": "stub", "cell_px": 4}),
    ("tokens", {"fitted": "stub"}),
    ("tokens", {"fitted": "stub", "side": 4}),
]


class Row(Strict):
    target: Annotated[Piece, OneOf(TARGETS)]


class Shades(nn.Module):
    """A palette of five greys."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.codes = 5
        self.register_buffer("colours", torch.linspace(0, 1, 5)[:, None].expand(-1, channels).contiguous())

    def nearest(self, colours: torch.Tensor) -> torch.Tensor:
        return torch.cdist(colours.flatten(0, -2), self.colours).argmin(-1).view(colours.shape[:-1])


class Brightness(nn.Module):
    """A tokenizer of 4 px a token whose 16 codes are the mean brightness; it has a weight, and drop-out."""

    stride, codes = 4, 16

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(()))
        self.noise = nn.Dropout(0.5)
        self.seen: tuple[int, ...] = ()

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        assert images.min() >= 0
        assert images.max() <= 1
        self.seen = tuple(images.shape)
        grey = self.noise(F.avg_pool2d(images.mean(1, keepdim=True) * self.weight, 4))
        return (grey[:, 0] * 15).round().long()

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        grey = (tokens[:, None] / 15).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return grey.expand(-1, self.channels, -1, -1)


def made(name: str, grid: Grid = GRID, channels: int = 3, **params: Any) -> Target:
    stubs = {"clusters": Shades, "tokens": Brightness}
    wiring = [stubs[name](channels)] if name in stubs else []
    return TARGETS[name](grid, *colours(channels), *wiring, **params)


def colours(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.5, 0.4, 0.3, 0.2)[:channels], (0.2, 0.25, 0.3, 0.35)[:channels]


def normalised(images: int = 2, channels: int = 3, grid: Grid = GRID) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [0, 1], and as the encoder sees them."""
    draws = torch.Generator().manual_seed(0)
    pictures = torch.rand(images, channels, grid.height, grid.width, generator=draws)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in colours(channels))
    return pictures, (pictures - mean) / std


def prediction_of(target: Target, entries: torch.Tensor) -> torch.Tensor:
    """A head's values that are certain of these entries, in the head's order."""
    if not target.entries.classes:
        return entries
    depth, side, classes = target.entries.depth, target.entries.side, target.entries.classes
    sure = F.one_hot(entries.reshape(*entries.shape[:2], depth, side**2), classes)
    return sure.transpose(-1, -2).flatten(2).float()


@settings(deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, SIDE)
def test_unpatchify_is_the_inverse_of_patchify(batch: int, channels: int, rows: int, columns: int, patch: int) -> None:
    grid = Grid(rows * patch, columns * patch, patch)
    images = torch.arange(batch * channels * grid.height * grid.width).reshape(batch, channels, grid.height, grid.width)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid.count, channels * patch**2)
    assert torch.equal(unpatchify(patches, grid.shape, patch), images)
    assert torch.equal(patchify(unpatchify(patches, grid.shape, patch), patch), patches)


def test_a_patchs_values_are_in_pixel_shuffles_order() -> None:
    _, images = normalised()
    patches = patchify(images, 8)
    torch.testing.assert_close(F.pixel_shuffle(patches.transpose(1, 2).reshape(2, -1, *GRID.shape), 8), images)
    assert torch.equal(patches[0, 1], images[0, :, :8, 8:16].reshape(-1))


def test_every_target_is_under_test() -> None:
    assert {name for name, _ in CHOICES} == set(TARGETS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_a_targets_entries_are_what_it_tells(name: str, params: dict[str, Any], channels: int) -> None:
    target = made(name, channels=channels, **params)
    _, images = normalised(channels=channels)
    entries = target(images)
    assert entries.shape == (2, GRID.count, target.entries.count)
    assert not entries.requires_grad
    if target.entries.classes:
        assert entries.dtype == torch.long
        assert entries.min() >= 0
        assert entries.max() < target.entries.classes
    else:
        assert entries.dtype == torch.float32
        assert entries.isfinite().all()


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_an_images_target_does_not_depend_on_its_batch(name: str, params: dict[str, Any]) -> None:
    target = made(name, **params)
    _, images = normalised(3)
    whole = target(images)
    pictures = target.render(prediction_of(target, whole), images)
    for index in range(3):
        one = images[index : index + 1]
        torch.testing.assert_close(target(one)[0], whole[index])
        torch.testing.assert_close(target.render(prediction_of(target, target(one)), one)[0], pictures[index])


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_an_entry_is_of_its_place(name: str, params: dict[str, Any]) -> None:
    """A change in the last position's middle moves the target there, and of no position two away."""
    target = made(name, Grid(16, 32, 8), **params)
    _, images = normalised(1, grid=Grid(16, 32, 8))
    changed = images.clone()
    changed[..., 11:13, 27:29] = 1 - changed[..., 11:13, 27:29]
    differs = (target(images) != target(changed))[0].any(-1)
    assert not differs[[0, 1, 4, 5]].any()
    if not target.entries.classes:
        assert differs[7]


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_a_rendered_picture_is_displayable(name: str, params: dict[str, Any], scale: float) -> None:
    target = made(name, **params)
    pictures, images = normalised()
    noise = torch.randn(2, GRID.count, target.entries.values, generator=torch.Generator().manual_seed(1))
    rendered = target.render(noise * scale, images)
    assert rendered.shape == pictures.shape
    assert rendered.min() >= 0
    assert rendered.max() <= 1


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_flat_images_are_finite(name: str, params: dict[str, Any]) -> None:
    target = made(name, **params)
    flat = torch.full((1, 3, 16, 24), 0.7)
    entries = target(flat)
    assert entries.float().isfinite().all()
    assert target.render(prediction_of(target, entries), flat).isfinite().all()
    if params.get("normalise", "none") != "none":
        assert entries.abs().max() < 1e-2


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_a_target_has_nothing_to_train_or_save_of_its_own(name: str, params: dict[str, Any]) -> None:
    target = made(name, **params)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(key.startswith("tokenizer.") for key in target.state_dict())


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_a_row_builds_without_memory(name: str, params: dict[str, Any]) -> None:
    piece = check(Row, {"target": {"name": name, **params}}, "row").target
    stubs = {"clusters": Shades, "tokens": Brightness}
    with torch.device("meta"):
        wiring = [stubs[name](3)] if name in stubs else []
        target = build(TARGETS, piece, GRID, *colours(3), *wiring)
    assert target.entries == made(name, **params).entries


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("name", "params"), [choice for choice in CHOICES[:3] if choice[0] == "pixels"])
def test_pixels_render_to_the_image_itself(name: str, params: dict[str, Any], channels: int) -> None:
    pictures, images = normalised(channels=channels)
    target = made(name, channels=channels, **params)
    assert target.pixel_values
    torch.testing.assert_close(target.render(target(images), images), pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", [{"cell_px": 4}, {"cell_px": 8}, {"normalise": "patch", "cell_px": 2}])
def test_pixels_of_lower_resolution_render_to_the_means_of_cells(params: dict[str, Any]) -> None:
    pictures, images = normalised()
    target = made("pixels", **params)
    cell = params["cell_px"]
    means = F.avg_pool2d(pictures, cell).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    torch.testing.assert_close(target.render(target(images), images), means, atol=1e-5, rtol=0)
    assert not target.pixel_values


@pytest.mark.parametrize(("bins", "cell"), [(8, 1), (256, 1), (2, 4), (5, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_bins_render_to_half_a_bin(bins: int, cell: int, channels: int) -> None:
    pictures, images = normalised(channels=channels)
    target = made("colour_bins", channels=channels, bins=bins, cell_px=cell)
    rendered = target.render(prediction_of(target, target(images)), images)
    assert (F.avg_pool2d(rendered, cell) - F.avg_pool2d(pictures, cell)).abs().max() <= 0.5 / bins + 1e-5


@pytest.mark.parametrize(("side", "bits", "channels"), [(1, 3, 3), (4, 3, 3), (2, 1, 3), (8, 8, 1), (4, 2, 4)])
def test_colour_classes_render_to_half_a_bin_of_the_mean(side: int, bits: int, channels: int) -> None:
    pictures, images = normalised(channels=channels)
    target = made("colour_grid", channels=channels, side=side, bits=bits)
    rendered = target.render(prediction_of(target, target(images)), images)
    part = 8 // side
    means = F.avg_pool2d(pictures, part).repeat_interleave(part, 2).repeat_interleave(part, 3)
    assert (rendered - means).abs().max() <= 0.5 / 2**bits + 1e-5


def test_clusters_render_to_the_nearest_colours() -> None:
    pictures, images = normalised()
    for cell in (1, 4):
        target = made("clusters", fitted="stub", cell_px=cell)
        rendered = target.render(prediction_of(target, target(images)), images)
        grey = F.avg_pool2d(pictures, cell).mean(1, keepdim=True)
        nearest = (grey * 4).round().div(4).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        torch.testing.assert_close(rendered, nearest.expand_as(pictures))


def test_tokens_render_to_what_the_tokenizer_decodes() -> None:
    pictures, images = normalised()
    target = made("tokens", fitted="stub", side=2)
    assert isinstance(target, Tokens)
    tokens = target.tokenizer.tokens(pictures)
    assert torch.equal(unpatchify(target(images), GRID.shape, 2)[:, 0], tokens)
    rendered = target.render(prediction_of(target, target(images)), images)
    torch.testing.assert_close(rendered, target.tokenizer.decode(tokens))


@pytest.mark.parametrize(("side", "view"), [(1, (8, 12)), (2, (16, 24)), (4, (32, 48))])
def test_the_tokenizer_reads_a_view_in_which_tokens_meet_positions(side: int, view: tuple[int, int]) -> None:
    _, images = normalised()
    target = made("tokens", fitted="stub", side=side)
    assert target(images).shape == (2, GRID.count, side**2)
    assert isinstance(target, Tokens)
    assert target.tokenizer.seen == (2, 3, *view)


def test_a_tokenizer_stays_frozen_and_in_evaluation_mode() -> None:
    target = made("tokens", fitted="stub").train()
    assert isinstance(target, Tokens)
    assert not target.tokenizer.training
    assert not target.tokenizer.noise.training
    assert not target.tokenizer.weight.requires_grad
    _, images = normalised()
    assert not target(images.requires_grad_()).requires_grad


def test_what_rendering_borrows_is_said() -> None:
    for name, params in CHOICES:
        borrows = params.get("normalise", "none") != "none" or name == "hog"
        assert bool(made(name, **params).borrows) is borrows
    assert made("pixels", normalise="window").borrows == "window mean and deviation from the original"


def test_per_patch_normalisation_is_maes_published_formula() -> None:
    _, images = normalised()
    patches = patchify(images, 8).double().numpy()
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, ddof=1, keepdims=True)
    published = (patches - mean) / (variance + 1e-6) ** 0.5
    np.testing.assert_allclose(made("pixels", normalise="patch")(images).numpy(), published, atol=1e-5)


@pytest.mark.parametrize("window", [3, 5, 47])
def test_window_moments_are_those_of_what_lies_in_the_image(window: int) -> None:
    _, images = normalised(1)
    mean, variance = window_moments(images.double(), window)
    reach = window // 2
    for row, column in ((0, 0), (7, 3), (15, 23), (2, 12)):
        seen = images[..., max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1].double()
        torch.testing.assert_close(mean[..., row, column], seen.mean((2, 3)))
        torch.testing.assert_close(variance[..., row, column], seen.flatten(2).var(-1))
    values = unpatchify(made("pixels", normalise="window", window_px=window)(images), GRID.shape, 8)
    torch.testing.assert_close(values, ((images - mean) / (variance + 1e-6).sqrt()).float(), atol=1e-4, rtol=1e-4)


def test_a_constant_prediction_of_a_normalised_patch_has_a_closed_form() -> None:
    _, images = normalised()
    target = made("pixels", normalise="patch")(images).flatten(0, 1)
    k = target.shape[1]
    # Unbiased variance 1, so the mean square is (k - 1) / k; a constant c adds its square.
    for constant in (0.0, 0.5):
        loss = l2(torch.full_like(target, constant), target).mean().item()
        assert loss == pytest.approx((k - 1) / k + constant**2, abs=1e-4)


def test_maes_published_loss_comes_out_of_ours() -> None:
    case = np.load(PARITY / "mae_pix_loss.npz")
    images = torch.from_numpy(case["x"]).double()
    prediction, hidden = torch.from_numpy(case["pred"]).double(), torch.from_numpy(case["mask"]).bool()
    # MAE orders a patch's values (row, column, channel), we (channel, row, column).
    prediction = prediction.reshape(2, 16, 16, 16, 3).permute(0, 1, 4, 2, 3).reshape(2, 16, -1)
    target = Pixels(Grid(64, 64, 16), *colours(3))(images)
    assert l2(prediction[hidden], target[hidden]).mean().item() == pytest.approx(float(case["loss"]), rel=1e-6)


def test_mean_colours_and_their_loss_are_the_published_ones() -> None:
    case = np.load(PARITY / "vit_mpp_labels.npz")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in colours(3))
    target = mean_colour(Grid(64, 64, 16), *colours(3))
    assert (target.entries.depth, target.entries.side, target.entries.classes) == (1, 1, 512)
    labels = target((torch.from_numpy(case["x01"]).float() - mean) / std)
    assert torch.equal(labels[..., 0], torch.from_numpy(case["labels_r_plus_8g_plus_64b"]))
    hidden = torch.from_numpy(case["mask"]).bool()
    logits = target.entries.logits(torch.from_numpy(case["logits"]).float()[hidden])
    # Rows are positions and their depth, as the loss wants classes second.
    loss = cross_entropy(logits.flatten(0, 1), labels[hidden])
    assert loss.mean().item() == pytest.approx(float(case["loss"]), abs=1e-5)


def test_a_colours_class_is_the_sum_of_its_bins_by_place() -> None:
    target = ColourGrid(Grid(4, 4, 4), (0.0,) * 3, (1.0,) * 3, side=1, bits=3)
    colour = torch.tensor([0.9, 0.3, 0.6]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert target(colour).item() == 7 + 8 * 2 + 64 * 4


def test_every_8_bit_colour_has_its_own_bin_of_256_after_normalisation() -> None:
    levels = torch.arange(256) / 255
    mean, std = colours(3)
    for channel in range(3):
        there = (levels - mean[channel]) / std[channel]
        assert torch.equal(quantise(there * std[channel] + mean[channel], 256), torch.arange(256))


def test_hog_is_the_published_one() -> None:
    case = np.load(PARITY / "maskfeat_hog.npz")
    images = torch.from_numpy(case["x"]).float()
    plain = Hog(Grid(64, 64, 16), *colours(3))
    assert (plain.entries.depth, plain.entries.side, plain.entries.count) == (27, 2, 108)
    np.testing.assert_allclose(plain(images), case["label_per_patch16"], atol=1e-6)
    windowed = Hog(Grid(64, 64, 16), *colours(3), gaussian_px=16)
    np.testing.assert_allclose(gaussian(16), case["gaussian_kernel16"], atol=1e-9)
    for target, name in ((plain, "hog_slowfast"), (windowed, "hog_gaussian16")):
        cells = unpatchify(target(images), (4, 4), 2).reshape(1, 3, 9, 8, 8)
        np.testing.assert_allclose(cells, case[name], atol=1e-6)


@pytest.mark.parametrize("cell", [4, 8])
def test_a_hog_is_drawn_along_its_edges(cell: int) -> None:
    """Stripes that stand, lie or slant give strokes that do: a picture changes less along them than across."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    target = made("hog", cell_px=cell)

    def drawn(phase: torch.Tensor) -> torch.Tensor:
        images = torch.sin(phase / 2)[None, None].expand(1, 3, -1, -1)
        picture = target.render(target(images), images)
        assert torch.equal(picture[:, 0], picture[:, 2])
        assert picture.max() > 0.3
        return picture[0, 0, 2:-2, 2:-2]

    def changes(picture: torch.Tensor) -> tuple[float, float]:
        return picture.diff(dim=0).abs().mean().item(), picture.diff(dim=1).abs().mean().item()

    down, across = changes(drawn(columns))
    assert down < across
    down, across = changes(drawn(rows))
    assert across < down
    slanted = drawn(rows + columns)
    # Stripes of rows + columns run from the lower left to the upper right.
    rising, falling = slanted[1:, :-1] - slanted[:-1, 1:], slanted[1:, 1:] - slanted[:-1, :-1]
    assert rising.abs().mean() < falling.abs().mean()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pixels", {"cell_px": 3}, r"cell_px: found 3; it must divide the 8 px .*choose one of \[1, 2, 4, 8\]"),
        ("pixels", {"normalise": "window", "window_px": 4}, r"window_px: found 4; it must be odd.*try 5"),
        ("pixels", {"normalise": "window", "cell_px": 2}, r"cell_px: found 2; .*choose 1"),
        ("colour_grid", {"side": 3}, r"side: found 3; .*choose one of \[1, 2, 4, 8\]"),
        ("mean_colour", {"bits": 6}, r"bits: found 6 .* makes 262144 classes.*choose 5 or fewer"),
        ("colour_bins", {"cell_px": 16}, r"cell_px: found 16"),
        ("hog", {"cell_px": 5}, r"cell_px: found 5"),
        ("hog", {"gaussian_px": 16}, r"gaussian_px: found 16; .*16 x 24 px; choose one of \[1, 2, 4, 8\]"),
        ("clusters", {"fitted": "stub", "cell_px": 3}, r"cell_px: found 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, **params)


def test_a_patch_of_one_value_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"cell_px: found 8; normalise 'patch' needs two values"):
        made("pixels", channels=1, normalise="patch", cell_px=8)


def test_a_palette_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fitted: found 'grey' of 1 channels; the images have 3"):
        Clusters(GRID, *colours(3), Shades(1), fitted="grey")


@pytest.mark.parametrize(
    "target",
    [
        {"name": "pixels", "normalise": "image"},
        {"name": "pixels", "cell_px": 0},
        {"name": "mean_colour", "bits": 0},
        {"name": "mean_colour", "side": 2},
        {"name": "colour_bins", "bins": 1},
        {"name": "hog", "bins": 1},
        "tokens",
        "clusters",
    ],
)
def test_a_row_with_a_wrong_param_is_refused(target: Any) -> None:
    with pytest.raises(SpecError):
        check(Row, {"target": target}, "row")
