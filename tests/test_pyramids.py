"""What dense tasks and probes read of an encoder: maps of its pyramid and features of its blocks, for every encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mim_core.encoders import ENCODERS

SIZE = (96, 128)
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"patch_px": 8, "width": 32, "depth": 6, "heads": 4},
    "swin": {"patch_px": 4, "width": 16, "depths": (2, 1, 1), "heads": (1, 2, 4), "window": 2},
    "alexnet": {"base": 12},
    "conv": {"base": 8, "layers": 4, "bottleneck": 16},
}
RELATIVE = {**SMALL["vit"], "positions": "relative", "layer_scale": 0.1}
CASES = [*SMALL.items(), ("vit", RELATIVE)]


def made(name: str, params: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return ENCODERS[name](SIZE, 3, **params).eval()


def test_every_encoder_is_here() -> None:
    assert set(SMALL) == set(ENCODERS)


@pytest.mark.parametrize(("name", "params"), CASES)
@torch.no_grad()
def test_levels_say_what_the_pyramid_gives(name: str, params: dict[str, Any]) -> None:
    encoder = made(name, params)
    maps, levels = encoder.pyramid(torch.randn(2, 3, *SIZE)), encoder.levels()
    assert [each.shape[1] for each in maps] == [level.width for level in levels]
    for each, level in zip(maps, levels, strict=True):
        for side, whole in zip(each.shape[2:], SIZE, strict=True):
            # Strides of AlexNet's maps are nominal: it does not pad its first convolution, nor its pooling.
            assert side == whole // level.stride if name != "alexnet" else 0 <= whole / level.stride - side <= 2
    strides = [level.stride for level in levels]
    assert strides == sorted(strides)


@pytest.mark.parametrize(("name", "params"), CASES)
@torch.no_grad()
def test_the_last_block_gives_the_features_and_each_has_its_width(name: str, params: dict[str, Any]) -> None:
    encoder = made(name, params)
    images = torch.randn(2, 3, *SIZE)
    blocks = encoder.blocks(images)
    assert [features.shape[-1] for features, _ in blocks] == encoder.block_widths
    assert len(blocks) == encoder.depth
    features, summary = encoder.encode(encoder.embed(images))
    if name != "alexnet":  # whose features are pooled once more
        torch.testing.assert_close(blocks[-1][0], features)
    assert blocks[-1][1].shape == summary.shape
    torch.testing.assert_close(blocks[-1][1], summary)


@torch.no_grad()
def test_a_vits_maps_are_of_the_chosen_blocks() -> None:
    encoder = made("vit", SMALL["vit"])
    images = torch.randn(1, 3, *SIZE)
    blocks = encoder.blocks(images)
    assert encoder.taps() == [2, 3, 5, 6]
    for each, tap in zip(encoder.pyramid(images, [1, 6]), (1, 6), strict=True):
        # The patch in the third row and fifth column of a map 16 patches wide.
        torch.testing.assert_close(each[:, :, 2, 4], blocks[tap - 1][0][:, 2 * 16 + 4])
    for tap in (0, 7):
        with pytest.raises(ValueError, match="the encoder's blocks are 1 to 6"):
            encoder.levels([tap])


@pytest.mark.parametrize("name", ["swin", "alexnet", "conv"])
def test_stages_cannot_be_chosen(name: str) -> None:
    encoder = made(name, SMALL[name])
    for call in (lambda: encoder.levels([1]), lambda: encoder.pyramid(torch.randn(1, 3, *SIZE), [1])):
        with pytest.raises(ValueError, match="blocks can be chosen"):
            call()
