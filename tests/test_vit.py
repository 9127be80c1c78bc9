"""The ViT behind the encoder contract: timm's features, MAE's positions, and no peeking at hidden pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim_core.encoders import ENCODERS
from mim_core.encoders.vit import ViT, sincos
from mim_core.fills import FILLS
from mim_core.heads import Linear
from mim_core.masks import Grid
from mim_core.pretext import MaskedModel

SMALL: dict[str, Any] = {"patch_px": 8, "width": 32, "depth": 2, "heads": 4}


def small(size: tuple[int, int] = (32, 48), channels: int = 3, **params: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(size, channels, **SMALL | params).eval()
    # As after training: the class token and positions are not near zero any more.
    with torch.no_grad():
        for name in ("cls_token", "pos_embed"):
            parameter = getattr(encoder.backbone, name)
            if parameter.requires_grad:
                parameter.normal_()
    return encoder


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_features_are_timms(size: tuple[int, int], positions: str) -> None:
    encoder = small(size, positions=positions)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours, timms = encoder(encoder.embed(images)), encoder.backbone.forward_features(images)
    torch.testing.assert_close(ours, timms[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    encoder = small(channels=channels)
    images = torch.randn(2, channels, 32, 48)
    features = encoder(encoder.embed(images))
    assert features.shape == (2, 24, 32)
    (pyramid,) = encoder.pyramid(images)
    assert pyramid.shape == (2, 32, 4, 6)
    torch.testing.assert_close(pyramid[:, :, 1, 2], features[:, 6 + 2])


@pytest.mark.parametrize("case", ["d24_g4_cls", "d16_g3_nocls"])
def test_sincos_positions_are_maes_published_table(case: str) -> None:
    published = np.load(Path(__file__).parent / "parity" / "mae_sincos.npz")[case]
    side = {"d24_g4_cls": 4, "d16_g3_nocls": 3}[case]
    ours = sincos(Grid(side, side, 1), published.shape[1])
    np.testing.assert_allclose(ours, published[-(side**2) :], atol=1e-6)
    if "_cls" in case:
        assert not published[0].any()


def test_sincos_tells_rows_from_columns_on_a_grid_that_is_not_square() -> None:
    table = sincos(Grid(2, 3, 1), 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[1, :, :4])
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    assert len(np.unique(table.reshape(6, 8), axis=0)) == 6


def test_fixed_positions_stand_and_do_not_train() -> None:
    encoder = small(positions="sincos")
    assert not encoder.backbone.pos_embed.requires_grad
    np.testing.assert_allclose(encoder.backbone.pos_embed[0, 1:], sincos(encoder.grid, 32), atol=1e-6)
    assert not encoder.backbone.pos_embed[0, 0].any()


def test_kept_tokens_get_their_own_positions() -> None:
    encoder = small()
    tokens = encoder.embed(torch.randn(2, 3, 32, 48))
    everything = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(encoder(tokens, everything), encoder(tokens))
    # Attention knows no order, so a permutation of tokens with their positions permutes the features.
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    index = order[..., None].expand(-1, -1, 32)
    torch.testing.assert_close(
        encoder(tokens.gather(1, index), order), encoder(tokens).gather(1, index), atol=1e-5, rtol=1e-5
    )


def test_dropping_tokens_is_encoding_the_kept_ones_alone() -> None:
    encoder = small()
    tokens = encoder.embed(torch.randn(2, 3, 32, 48))
    kept = torch.tensor([[0, 5, 9], [23, 1, 2]])
    dropped = encoder(tokens.gather(1, kept[..., None].expand(-1, -1, 32)), kept)
    vit = encoder.backbone
    for row in range(2):
        placed = tokens[row : row + 1, kept[row]] + vit.pos_embed[:, 1:][:, kept[row]]
        alone = torch.cat([vit.cls_token + vit.pos_embed[:, :1], placed], 1)
        torch.testing.assert_close(dropped[row : row + 1], vit.norm(vit.blocks(alone))[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_peeking(encoder: str, fill: str) -> None:
    torch.manual_seed(0)
    size = (32, 48)
    built = ENCODERS[encoder](size, 3, **SMALL)
    model = MaskedModel(built, FILLS[fill](built.width), Linear(built.width, 7)).eval()
    images = torch.randn(2, 3, *size, requires_grad=True)
    hidden = torch.rand(2, built.grid.count) < 0.5
    everywhere = torch.ones_like(hidden)
    prediction = model(images, hidden, everywhere)
    prediction.square().sum().backward()
    side = built.grid.patch_px
    pixels = hidden.reshape(2, 1, *built.grid.shape).repeat_interleave(side, 2).repeat_interleave(side, 3)
    pixels = pixels.expand_as(images)
    assert images.grad is not None
    assert (images.grad[pixels] == 0).all()
    assert (images.grad[~pixels] != 0).any()
    changed = torch.where(pixels, torch.randn_like(images) * 100, images)
    assert torch.equal(model(changed, hidden, everywhere), prediction)


def test_every_hidden_token_is_the_mask_token_and_no_other() -> None:
    fill = FILLS["mask_token"](4)
    tokens = torch.randn(1, 3, 4)
    filled, kept = fill.tokens(tokens, torch.tensor([[True, False, True]]))
    assert kept is None
    assert torch.equal(filled[0, 1], tokens[0, 1])
    for hidden in (0, 2):
        assert torch.equal(filled[0, hidden], fill.token.flatten())


def test_layers_of_parameters() -> None:
    encoder = small()
    layers = {name: encoder.layer(name) for name, _ in encoder.named_parameters()}
    assert (
        layers["backbone.patch_embed.proj.weight"] == layers["backbone.cls_token"] == layers["backbone.pos_embed"] == 0
    )
    assert layers["backbone.blocks.0.attn.qkv.weight"] == 1
    assert layers["backbone.blocks.1.mlp.fc2.bias"] == 2
    assert layers["backbone.norm.weight"] == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"heads": 3}, "heads: found 3; it must divide the width 32"),
        ({"width": 30, "heads": 2, "positions": "sincos"}, "width: found 30; .*; try 32"),
        ({"patch_px": 5}, "image height: found 32 px; .* patch_px 5; try 30"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**params)
