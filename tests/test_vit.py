"""The ViT behind the encoder contract: timm's features, the published forms' numbers, and no peeking."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mim_core.devices import Compute
from mim_core.encoders.vit import ViT
from mim_core.fills import FILLS
from mim_core.grid import Grid
from mim_core.optim import param_groups
from mim_core.positions import sincos
from mim_core.spec import SpecError, check, schema

PARITY = Path(__file__).parent / "parity"
SMALL: dict[str, Any] = {"patch_px": 8, "width": 32, "depth": 2, "heads": 4}
PLAIN, RELATIVE = ("learned", "sincos"), ("relative", "relative_per_block")
FORMS = PLAIN + RELATIVE
# Tables in blocks need all tokens.
DROPPED = [(positions, dropped) for positions in FORMS for dropped in (False, True)][:-1]


def small(size: tuple[int, int] = (32, 48), channels: int = 3, **params: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(size, channels, **SMALL | params).eval()
    # As after training: tokens, positions and biases are not near zero any more.
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad and name.endswith(("cls_token", "pos_embed", "bias_table", "bias")):
                parameter.normal_()
    return encoder


def gathered(tokens: Tensor, kept: Tensor) -> Tensor:
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("positions", FORMS)
def test_features_are_timms(size: tuple[int, int], positions: str) -> None:
    encoder = small(size, positions=positions, layer_scale=0.1)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        (features, summary), timms = encoder.encode(encoder.embed(images)), encoder.backbone.forward_features(images)
        assert torch.equal(encoder(encoder.embed(images)), features)
    torch.testing.assert_close(features, timms[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(summary, timms[:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "params"),
    [("vit_base_patch16_224", {}), ("beit_base_patch16_224", {"positions": "relative_per_block", "layer_scale": 0.1})],
)
def test_timms_own_weights_load(architecture: str, params: dict[str, Any]) -> None:
    published = timm.create_model(
        architecture, img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0,
        global_pool="token",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = small(**params)
    encoder.backbone.load_state_dict(published.state_dict())
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        ours, theirs = encoder(encoder.embed(images)), published.forward_features(images)[:, 1:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_relative_form_gives_the_published_features() -> None:
    arrays = np.load(PARITY / "simmim_vit_sharedrpb.npz")
    weights = {
        name.removeprefix("sd/encoder."): torch.tensor(arrays[name]).float()
        for name in arrays.files
        if name.startswith("sd/encoder.") and not name.endswith("relative_position_index")
    }
    token = weights.pop("mask_token")
    encoder = ViT(
        (64, 64), 3, patch_px=16, width=32, depth=2, heads=4, mlp_ratio=2, positions="relative", layer_scale=0.1
    )
    encoder.backbone.load_state_dict(weights)
    tokens = encoder.embed(torch.tensor(arrays["x"]).float())
    hidden = torch.tensor(arrays["mask"]).bool().flatten(1)
    features = encoder(torch.where(hidden[..., None], token, tokens))
    published = torch.tensor(arrays["z"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.detach(), published, atol=1e-4, rtol=0)


def naive(encoder: ViT, tokens: Tensor, kept: Tensor) -> Tensor:
    """The relative forms token by token and pair by pair, for one sample: features of the class token and patches."""
    vit, (rows, columns), heads = encoder.backbone, encoder.grid.shape, encoder.backbone.blocks[0].attn.num_heads
    width = encoder.width // heads
    places = [None, *((int(patch) // columns, int(patch) % columns) for patch in kept)]

    def bias(table: Tensor, query: Any, key: Any) -> Tensor:
        if query is None or key is None:
            return table[-1 if query == key else -3 if query is None else -2]
        down, across = query[0] - key[0] + rows - 1, query[1] - key[1] + columns - 1
        return table[down * (2 * columns - 1) + across]

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    x = torch.cat([vit.cls_token[0], tokens])
    for block in vit.blocks:
        attention, normed = block.attn, norm(block.norm1, x)
        owner = attention if encoder.positions == "relative_per_block" else vit.rel_pos_bias
        q, k, v = (normed @ part.T for part in attention.qkv.weight.chunk(3))
        q, v = q + attention.q_bias, v + attention.v_bias
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for i, query in enumerate(places):
                scores = [
                    q[i, part] @ k[j, part] / math.sqrt(width)
                    + bias(owner.relative_position_bias_table, query, key)[head]
                    for j, key in enumerate(places)
                ]
                mixed[i, part] = torch.stack(scores).exp() / torch.stack(scores).exp().sum() @ v[:, part]
        x = x + block.gamma_1 * (mixed @ attention.proj.weight.T + attention.proj.bias)
        inner = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + block.gamma_2 * (inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    return norm(vit.norm, x)


@pytest.mark.parametrize(("positions", "dropped"), DROPPED[4:])
def test_relative_features_are_those_of_naive_attention(positions: str, dropped: bool) -> None:
    encoder = small((16, 24), positions=positions, layer_scale=0.7, width=8, heads=2).double()
    tokens = torch.randn(2, 6, 8, dtype=torch.float64)
    kept = torch.tensor([[5, 0, 1], [2, 3, 4]]) if dropped else torch.arange(6).expand(2, -1)
    tokens = gathered(tokens, kept)
    with torch.no_grad():
        features, summary = encoder.encode(tokens, kept if dropped else None)
        expected = torch.stack([naive(encoder, *sample) for sample in zip(tokens, kept, strict=True)])
    torch.testing.assert_close(torch.cat([summary, features], 1), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize(("positions", "dropped"), DROPPED)
def test_every_parameter_learns(positions: str, dropped: bool, layer_scale: float | None) -> None:
    encoder = small(positions=positions, layer_scale=layer_scale, drop_path=0.0).train()
    tokens, kept = encoder.embed(torch.randn(2, 3, 32, 48)), None
    if dropped:
        kept = torch.tensor([[0, 5, 9], [23, 1, 2]])
        tokens = gathered(tokens, kept)
    features, summary = encoder.encode(tokens, kept)
    assert features.shape == (2, 3 if dropped else 24, 32)
    assert summary.shape == (2, 1, 32)
    (features * torch.randn_like(features)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    encoder = small(channels=channels)
    images = torch.randn(2, channels, 32, 48)
    features = encoder(encoder.embed(images))
    assert features.shape == (2, 24, 32)
    *_, pyramid = encoder.pyramid(images)
    assert pyramid.shape == (2, 32, 4, 6)
    torch.testing.assert_close(pyramid[:, :, 1, 2], features[:, 6 + 2])


def test_features_lie_on_the_grid_of_masks() -> None:
    encoder = small()
    assert encoder.output == encoder.grid == Grid(32, 48, 8)
    assert encoder.embed_width == encoder.width == 32


@pytest.mark.parametrize("case", ["d24_g4_cls", "d16_g3_nocls"])
def test_sincos_positions_are_maes_published_table(case: str) -> None:
    published = np.load(PARITY / "mae_sincos.npz")[case]
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


@pytest.mark.parametrize("positions", ["learned", "sincos", "relative"])
def test_kept_tokens_get_their_own_positions(positions: str) -> None:
    encoder = small(positions=positions)
    tokens = encoder.embed(torch.randn(2, 3, 32, 48))
    everything = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(encoder(tokens, everything), encoder(tokens), atol=1e-5, rtol=1e-5)
    # Attention knows no order, so a permutation of tokens with their positions permutes the features.
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    torch.testing.assert_close(
        encoder(gathered(tokens, order), order), gathered(encoder(tokens), order), atol=1e-5, rtol=1e-5
    )


def test_dropping_tokens_is_encoding_the_kept_ones_alone() -> None:
    encoder = small()
    tokens = encoder.embed(torch.randn(2, 3, 32, 48))
    kept = torch.tensor([[0, 5, 9], [23, 1, 2]])
    dropped = encoder(gathered(tokens, kept), kept)
    vit = encoder.backbone
    for row in range(2):
        placed = tokens[row : row + 1, kept[row]] + vit.pos_embed[:, 1:][:, kept[row]]
        alone = torch.cat([vit.cls_token + vit.pos_embed[:, :1], placed], 1)
        torch.testing.assert_close(dropped[row : row + 1], vit.norm(vit.blocks(alone))[:, 1:], atol=1e-5, rtol=1e-5)


def test_tables_in_blocks_refuse_dropped_tokens() -> None:
    encoder = small(positions="relative_per_block")
    assert ViT.drops
    assert not encoder.drops
    with pytest.raises(ValueError, match=r"positions: found relative_per_block, and a fill that drops .* to relative"):
        encoder(torch.zeros(1, 2, 32), torch.tensor([[0, 1]]))


@pytest.mark.parametrize(("positions", "dropped"), DROPPED)
def test_no_peeking(positions: str, dropped: bool) -> None:
    encoder = small(positions=positions)
    fill = FILLS["drop" if dropped else "mask_token"](encoder.embed_width, encoder.grid, (0.5,) * 3, (0.25,) * 3)
    hidden = torch.rand(2, 24).argsort(1) < 12
    pixels = encoder.grid.pixels(hidden)[:, None].expand(-1, 3, -1, -1)

    def encode(images: Tensor) -> Tensor:
        tokens, kept = fill.tokens(encoder.embed(fill.pixels(images, hidden)), hidden)
        return torch.cat(encoder.encode(tokens, kept), 1)

    images = torch.randn(2, 3, 32, 48, requires_grad=True)
    features = encode(images)
    features.square().sum().backward()
    assert images.grad is not None
    assert (images.grad[pixels] == 0).all()
    assert (images.grad[~pixels] != 0).any()
    changed = torch.where(pixels, torch.randn_like(images) * 100, images)
    assert torch.equal(encode(changed), features)


@pytest.mark.parametrize("positions", FORMS)
def test_both_ways_of_attention_agree(positions: str) -> None:
    kept = torch.tensor([[0, 5, 9], [23, 1, 2]])
    results: list[list[Tensor]] = []
    for bf16 in (False, True):  # on a CPU: the fused kernel, and explicit attention
        encoder = small(positions=positions)
        Compute(torch.device("cpu"), bf16).prepare(encoder)
        assert {module.fused_attn for module in encoder.modules() if hasattr(module, "fused_attn")} == {not bf16}
        tokens = encoder.embed(torch.linspace(-1, 1, 2 * 3 * 32 * 48).reshape(2, 3, 32, 48).sin())
        out = encoder(tokens)
        if encoder.drops:
            out = torch.cat([out, encoder(gathered(tokens, kept), kept)], 1)
        (out * torch.linspace(0, 1, out.numel()).reshape(out.shape)).sum().backward()
        grads = [p.grad for name, p in encoder.named_parameters() if name.endswith(("bias_table", "qkv.weight"))]
        results.append([out, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) > 2
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("positions", FORMS)
def test_bf16_keeps_the_residual_stream_in_fp32(positions: str, fused: bool) -> None:
    encoder = small(positions=positions, layer_scale=0.5)
    images = torch.randn(2, 3, 32, 48)
    exact = encoder(encoder.embed(images))
    compute = Compute(torch.device("cpu"), bf16=True)
    compute.prepare(encoder)
    for block in encoder.backbone.blocks:
        block.attn.fused_attn = fused
    seen: list[torch.dtype] = []
    encoder.backbone.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with compute.autocast():
        out = encoder(encoder.embed(images))
    out.float().sum().backward()
    assert seen == [torch.float32]
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("positions", FORMS)
def test_rows_are_checked_without_memory(positions: str) -> None:
    with torch.device("meta"):
        encoder = ViT((224, 224), 3, depth=2, positions=positions, layer_scale=0.1)
        assert encoder(encoder.embed(torch.empty(2, 3, 224, 224))).shape == (2, 196, 768)


def test_pretraining_decays_what_the_published_vit_decays() -> None:
    table = np.load(PARITY / "simmim_pretrain_wd_groups.npz")
    encoder = ViT((16, 16), 3, **SMALL | {"depth": 1}, positions="relative", layer_scale=0.1)
    groups = param_groups(
        encoder.named_parameters(), weight_decay=0.05, no_decay=lambda name: name in encoder.no_weight_decay()
    )
    ours = {name: group["weight_decay"] > 0 for group in groups for name in group["names"]}
    published = {
        str(name).replace("encoder.", "backbone."): key == "vit/decay"
        for key in ("vit/decay", "vit/no_decay")
        for name in table[key]
        # The published form can have absolute positions too; the mask token is the fill's, the decoder the head's.
        if name.startswith("encoder.") and name not in ("encoder.mask_token", "encoder.pos_embed")
    }
    assert ours == published


def test_layers_of_relative_forms_are_the_published_ones() -> None:
    table = np.load(PARITY / "simmim_layer_decay_vit_0.65.npz")
    encoder = ViT((16, 16), 3, **SMALL | {"depth": 3}, positions="relative_per_block", layer_scale=0.1)
    ours = {name: 0.65 ** (encoder.depth + 1 - encoder.layer(name)) for name, _ in encoder.named_parameters()}
    published = {f"backbone.{name}": scale for name, scale in zip(table["names"], table["lr_scale"], strict=True)}
    # The published classifier has its own norm, after pooling.
    assert set(ours) - set(published) == {"backbone.norm.weight", "backbone.norm.bias"}
    for name in set(ours) & set(published):
        assert ours[name] == pytest.approx(published[name]), name


def test_layers_of_parameters() -> None:
    encoder = small()
    layers = {name: encoder.layer(name) for name, _ in encoder.named_parameters()}
    assert (
        layers["backbone.patch_embed.proj.weight"] == layers["backbone.cls_token"] == layers["backbone.pos_embed"] == 0
    )
    assert layers["backbone.blocks.0.attn.qkv.weight"] == 1
    assert layers["backbone.blocks.1.mlp.fc2.bias"] == 2
    assert layers["backbone.norm.weight"] == 3
    assert encoder.layer("backbone.rel_pos_bias.relative_position_bias_table") == 3


@pytest.mark.parametrize("positions", FORMS)
def test_undecayed_names_are_parameters(positions: str) -> None:
    encoder = small(positions=positions)
    assert encoder.no_weight_decay() <= {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"heads": 3}, "heads: found 3; it must divide the width 32"),
        ({"width": 30, "heads": 2, "positions": "sincos"}, "width: found 30; .*; try 32"),
        ({"patch_px": 5}, "image height: found 32 px; .* patch_px 5; try 30"),
        ({"init": "xavier"}, "init: found xavier with positions learned; .* set positions to sincos"),
        ({"init": "xavier", "positions": "relative"}, "init: found xavier with positions relative; "),
    ],
)
def test_params_that_do_not_go_together_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**params)


def test_rows_can_set_the_forms() -> None:
    model = schema("vit", ViT, {})
    assert check(model, {"positions": "relative", "layer_scale": 0.1}, "row").params()["layer_scale"] == 0.1
    assert check(model, {"layer_scale": None}, "row").params()["layer_scale"] is None
    for wrong in ({"layer_scale": 0}, {"positions": "rotary"}, {"init": "zeros"}):
        with pytest.raises(SpecError, match=next(iter(wrong))):
            check(model, wrong, "row")
