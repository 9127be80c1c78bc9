"""Targets: patches and back, rendering, and the published per-patch normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_core.heads import Linear
from mim_core.losses import l2
from mim_core.masks import Grid
from mim_core.targets import TARGETS, Pixels, patchify, unpatchify

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GRID = Grid(8, 12, 4)
SIDE = st.integers(1, 4)
# Every choice of every target that renders what it is given.
CHOICES: list[tuple[str, dict[str, Any]]] = [("pixels", {"normalise": "none"}), ("pixels", {"normalise": "patch"})]


def normalised(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [0, 1], and as the encoder sees them."""
    pictures = torch.rand(batch, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    return pictures, (pictures - mean) / std


@settings(deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, SIDE)
def test_unpatchify_is_the_inverse_of_patchify(batch: int, channels: int, rows: int, columns: int, patch: int) -> None:
    grid = Grid(rows * patch, columns * patch, patch)
    images = torch.arange(batch * channels * grid.height * grid.width).reshape(batch, channels, grid.height, grid.width)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid.count, channels * patch**2)
    assert torch.equal(unpatchify(patches, grid), images)
    assert torch.equal(patchify(unpatchify(patches, grid), patch), patches)


def test_a_patchs_values_are_in_pixel_shuffles_order() -> None:
    _, images = normalised()
    patches = patchify(images, 4)
    maps = patches.transpose(1, 2).reshape(2, -1, *GRID.shape)
    torch.testing.assert_close(F.pixel_shuffle(maps, 4), images)
    assert torch.equal(patches[0, 1], images[0, :, :4, 4:8].reshape(-1))


def test_the_linear_head_is_the_published_convolution_and_pixel_shuffle() -> None:
    torch.manual_seed(0)
    features, head = torch.randn(2, 6, 5), Linear(5, 48)
    maps = features.transpose(1, 2).reshape(2, 5, *GRID.shape)
    published = F.pixel_shuffle(F.conv2d(maps, head.project.weight[..., None, None], head.project.bias), 4)
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(unpatchify(head(features, everywhere).reshape(2, 6, -1), GRID), published)
    wanted = torch.tensor([[True, False, False, True, False, False], [False] * 5 + [True]])
    torch.testing.assert_close(head(features, wanted), head(features, everywhere).reshape(2, 6, -1)[wanted])


def test_every_target_has_a_choice_under_test() -> None:
    assert {name for name, _ in CHOICES} == set(TARGETS)


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_rendering_an_images_own_target_gives_the_image_back(name: str, params: dict[str, Any]) -> None:
    pictures, images = normalised()
    target = TARGETS[name](GRID, MEAN, STD, **params)
    torch.testing.assert_close(target.render(target(images), images), pictures, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "params"), CHOICES)
def test_a_targets_shape_is_what_it_tells_the_head(name: str, params: dict[str, Any]) -> None:
    target = TARGETS[name](GRID, MEAN, STD, **params)
    assert target(normalised()[1]).shape == (2, GRID.count, target.values)
    assert target.kind == "values"


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels_renders(channels: int) -> None:
    target = Pixels(GRID, (0.5,) * channels, (0.25,) * channels)
    pictures = torch.rand(1, channels, 8, 12)
    images = (pictures - 0.5) / 0.25
    torch.testing.assert_close(target.render(target(images), images), pictures)


def test_a_rendered_picture_stays_in_the_displayable_range() -> None:
    _, images = normalised()
    target = Pixels(GRID, MEAN, STD)
    picture = target.render(target(images) * 100, images)
    assert (picture.min(), picture.max()) == (0, 1)


def test_what_rendering_borrows_is_said() -> None:
    assert Pixels(GRID, MEAN, STD).borrows == ""
    assert "mean" in Pixels(GRID, MEAN, STD, normalise="patch").borrows


def test_per_patch_normalisation_is_maes_published_formula() -> None:
    _, images = normalised()
    patches = patchify(images, 4).double().numpy()
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, ddof=1, keepdims=True)
    published = (patches - mean) / (variance + 1e-6) ** 0.5
    ours = Pixels(GRID, MEAN, STD, normalise="patch")(images)
    np.testing.assert_allclose(ours.numpy(), published, atol=1e-5)


def test_a_constant_prediction_of_a_normalised_patch_has_a_closed_form() -> None:
    _, images = normalised()
    target = Pixels(GRID, MEAN, STD, normalise="patch")(images).flatten(0, 1)
    k = target.shape[1]
    # Unbiased variance 1, so the mean square is (k - 1) / k; a constant c adds its square.
    for constant in (0.0, 0.5):
        loss = l2(torch.full_like(target, constant), target).item()
        assert loss == pytest.approx((k - 1) / k + constant**2, abs=1e-4)


def test_a_flat_patch_is_finite() -> None:
    flat = torch.full((1, 3, 8, 12), 0.7)
    assert Pixels(GRID, MEAN, STD, normalise="patch")(flat).abs().max() < 1e-3


def test_maes_published_loss_comes_out_of_ours() -> None:
    case = np.load(Path(__file__).parent / "parity" / "mae_pix_loss.npz")
    images = torch.from_numpy(case["x"]).double()
    prediction, hidden = torch.from_numpy(case["pred"]).double(), torch.from_numpy(case["mask"]).bool()
    # MAE orders a patch's values (row, column, channel), we (channel, row, column).
    prediction = prediction.reshape(2, 16, 16, 16, 3).permute(0, 1, 4, 2, 3).reshape(2, 16, -1)
    target = Pixels(Grid(64, 64, 16), MEAN, STD)(images)
    assert l2(prediction[hidden], target[hidden]).item() == pytest.approx(float(case["loss"]), rel=1e-6)
