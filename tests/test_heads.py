"""Heads: laws over the table, the published decoders' numbers, and parameter counts at the papers' scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import swin_base_patch4_window7_224
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim_core.devices import Compute
from mim_core.grid import Entries, Grid, patchify, resize, unpatchify
from mim_core.heads import HEADS, Head
from mim_core.spec import OneOf, Piece, SpecError, Strict, build, check

PARITY = Path(__file__).parent / "parity"
WIDTH = 12
GRID = Grid(32, 48, 8)
SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"hidden": 16},
    "inverse_swin_t": {"width": 16, "depths": (1, 2, 1), "heads": 4, "window": 2},
    "inverse_swin_b": {"width": 12, "depths": (2, 1), "heads": 2, "window": 3},
    "channelwise_decoder": {"base": 4},
    "transformer_decoder": {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0},
}
SIDES = [Entries(3, 1), Entries(3, 2), Entries(3, 4), Entries(2, 3), Entries(3, 8)]
ENTRIES = [*SIDES, Entries(1, 1, classes=5), Entries(2, 2, classes=4)]


class Row(Strict):
    head: Annotated[Piece, OneOf(HEADS)]


def small(name: str, entries: Entries = ENTRIES[0], grid: Grid = GRID, **params: Any) -> Head:
    torch.manual_seed(0)
    return HEADS[name](WIDTH, grid, entries, **SMALL[name] | params).eval()


def drawn(batch: int = 2) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    wanted = torch.rand(batch, GRID.count, generator=draws) < 0.5
    return torch.randn(batch, GRID.count, WIDTH, generator=draws), wanted


def everywhere(head: Head, features: Tensor, **wiring: Any) -> Tensor:
    """The prediction at all positions: [b, p, v]."""
    out: Tensor = head(features, torch.ones(len(features), head.grid.count, dtype=torch.bool), **wiring)
    return out.reshape(len(features), head.grid.count, -1)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("entries", ENTRIES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_gives_its_values_at_wanted_positions_in_their_order(name: str, entries: Entries) -> None:
    head, (features, wanted) = small(name, entries), drawn()
    with torch.no_grad():
        out, whole = head(features, wanted), everywhere(head, features)
    assert out.shape == (int(wanted.sum()), entries.values)
    torch.testing.assert_close(out, whole[wanted], atol=1e-6, rtol=1e-5)
    assert len(out.unique(dim=0)) == len(out)


@pytest.mark.parametrize("name", HEADS)
def test_no_wanted_positions_give_no_rows(name: str) -> None:
    head, (features, wanted) = small(name), drawn()
    assert head(features, wanted & False).shape == (0, 3)


@pytest.mark.parametrize("entries", [Entries(3, 8), Entries(1, 1, 5)], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_parameter_and_feature(name: str, entries: Entries) -> None:
    head, (features, wanted) = small(name, entries).train(), drawn()
    kept = torch.arange(0, GRID.count, 2).expand(2, -1) if head.restores else None
    features = features[:, : GRID.count // 2] if head.restores else features
    out = head(features.requires_grad_(), torch.ones_like(wanted), kept)
    (out * torch.randn_like(out)).sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 1e-8, key
    assert features.grad is not None
    assert (features.grad != 0).any(-1).all()


@pytest.mark.parametrize("name", HEADS)
def test_heads_run_in_bf16_on_either_attention(name: str) -> None:
    features, wanted = drawn()
    head = small(name)
    expected = head(features, wanted)
    for bf16 in (True, False):
        compute = Compute(torch.device("cpu"), bf16)
        with compute.autocast():
            out = compute.prepare(head)(features, wanted)
        torch.testing.assert_close(out.float(), expected, atol=5e-2 if bf16 else 1e-5, rtol=5e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_params_come_from_a_row(name: str) -> None:
    written = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL[name].items()}
    row = check(Row, {"head": {"name": name, **written}}, "row")
    built = build(HEADS, row.head, WIDTH, GRID, ENTRIES[0], GRID.shape)
    assert built.state_dict().keys() == small(name).state_dict().keys()
    with pytest.raises(SpecError, match=r"row\.head\.no: unknown key"):
        check(Row, {"head": {"name": name, "no": 1}}, "row")


@pytest.mark.parametrize("name", [name for name in HEADS if not HEADS[name].restores])
def test_a_head_that_cannot_restore_says_so(name: str) -> None:
    features, wanted = drawn()
    with pytest.raises(ValueError, match=r"kept tokens only; .* choose transformer_decoder"):
        small(name)(features, wanted, torch.arange(GRID.count).expand(2, -1))


@pytest.mark.parametrize("name", [name for name in HEADS if name != "channelwise_decoder"])
def test_a_head_of_positions_refuses_a_bottleneck(name: str) -> None:
    with pytest.raises(ValueError, match=r"found a feature map of \(1, 1\) for \(4, 6\) positions"):
        HEADS[name](WIDTH, GRID, ENTRIES[0], (1, 1), **SMALL[name])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("inverse_swin_t", {"heads": 6}, "heads: found 6 at width 16; 3 stages need a multiple of 4"),
        ("inverse_swin_t", {"heads": 4, "width": 18}, "heads: found 4 at width 18"),
        ("transformer_decoder", {"heads": 3}, "heads: found 3; it must divide the head's width 16"),
        ("transformer_decoder", {"width": 18}, "width: found 18; .* try 20"),
        ("channelwise_decoder", {"region": "centre"}, "region: found centre for a target of 4 x 6 entries"),
    ],
)
def test_params_that_cannot_work_are_refused_before_data(name: str, params: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        small(name, **params)


def test_linear_is_the_published_convolution_and_pixel_shuffle() -> None:
    head, (features, _) = small("linear", Entries(3, 8)), drawn()
    maps = features.transpose(1, 2).reshape(2, WIDTH, *GRID.shape)
    published = F.pixel_shuffle(F.conv2d(maps, head.project.weight[..., None, None], head.project.bias), 8)
    torch.testing.assert_close(unpatchify(everywhere(head, features), GRID.shape, 8), published)


def test_linear_can_normalise_first() -> None:
    head, (features, wanted) = small("linear", norm=True), drawn()
    torch.testing.assert_close(head(features * 7, wanted), head(features, wanted), atol=1e-4, rtol=1e-4)
    expected = head.project(F.layer_norm(features[wanted], (WIDTH,), eps=1e-6))
    torch.testing.assert_close(head(features, wanted), expected)


@pytest.mark.parametrize(
    ("name", "millions"), [("linear", 89.9), ("mlp", 90.9), ("inverse_swin_t", 115.2), ("inverse_swin_b", 174.8)]
)
def test_totals_with_swin_b_are_the_papers(name: str, millions: float) -> None:
    grid = Grid(192, 192, 32)
    with torch.device("meta"):
        encoder = swin_base_patch4_window7_224(img_size=192, window_size=6, num_classes=0)
        head = HEADS[name](encoder.num_features, grid, Entries(3, 32))
    total = (parameters(encoder) + parameters(head)) / 1e6
    assert total == pytest.approx(millions, rel=0.01 if "swin" in name else 0.001)


@pytest.mark.parametrize(("stride", "expansions"), [(32, 3), (8, 3), (4, 2), (2, 1), (1, 0), (12, 2), (3, 0)])
def test_inverse_swin_doubles_its_map_while_cells_can_be_halved(stride: int, expansions: int) -> None:
    grid = Grid(2 * stride, 4 * stride, stride)
    head = HEADS["inverse_swin_t"](WIDTH, grid, Entries(3, stride), width=16, depths=(1, 1, 1, 1), heads=8, window=2)
    maps = head.stages(head.embed(torch.randn(1, 8, WIDTH)).reshape(1, 2, 4, 16))
    assert maps.shape == (1, 2 * 2**expansions, 4 * 2**expansions, 16 // 2**expansions)
    assert everywhere(head, torch.randn(1, 8, WIDTH)).shape == (1, 8, 3 * stride**2)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_inverse_swin_lays_its_last_map_out_as_entries(side: int) -> None:
    entries = Entries(3, side)
    head, (features, wanted) = small("inverse_swin_t", entries), drawn()
    maps = head.norm(head.stages(head.embed(features).reshape(2, *GRID.shape, 16)))
    assert maps.shape == (2, 16, 24, 4)
    maps = maps.permute(0, 3, 1, 2)
    shape = (GRID.shape[0] * min(side, 4), GRID.shape[1] * min(side, 4))
    predicted = head.project(resize(maps, shape).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    picture = F.pixel_shuffle(predicted, max(1, side // 4))
    torch.testing.assert_close(head(features, wanted), patchify(picture, side)[wanted], atol=1e-6, rtol=1e-5)


def test_inverse_swin_shifts_every_second_window() -> None:
    head = small("inverse_swin_t")
    shifts = [block.shift_size for block in head.stages if hasattr(block, "shift_size")]
    assert shifts == [(0, 0), (0, 0), (1, 1), (0, 0)]


def test_the_channelwise_layer_has_the_papers_count() -> None:
    with torch.device("meta"):
        head = HEADS["channelwise_decoder"](256, Grid(227, 227, 1), Entries(3, 1), (6, 6))
    assert parameters(head.decoder[0]) == 256 * 6**4 == 331_776
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in head.decoder) == 5


def test_the_channelwise_layer_mixes_cells_and_no_channels() -> None:
    layer = small("channelwise_decoder").decoder[0]
    maps = torch.randn(1, WIDTH, *GRID.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(maps)[0, 5, 1, 2], maps)
    assert (gradient[0, 5] != 0).all()
    assert not gradient[0, :5].any()
    assert not gradient[0, 6:].any()


@pytest.mark.parametrize(("region", "widths"), [("centre", [8, 4, 2, 1]), ("whole", [8, 4, 2, 1, 1])])
def test_a_bottleneck_is_decoded_as_in_the_published_inpainting_net(region: str, widths: list[int]) -> None:
    with torch.device("meta"):
        head = HEADS["channelwise_decoder"](4000, Grid(128, 128, 16), Entries(3, 16), (1, 1), region=region)
    convolutions = [layer for layer in head.decoder if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in convolutions] == [*(64 * width for width in widths), 3]
    assert {layer.kernel_size for layer in convolutions} == {(4, 4)}


def test_a_centre_stands_in_a_picture_of_zeros() -> None:
    grid = Grid(64, 32, 8)
    torch.manual_seed(0)
    head = HEADS["channelwise_decoder"](WIDTH, grid, Entries(3, 8), (2, 1), base=4, region="centre").eval()
    picture = unpatchify(everywhere(head, torch.randn(2, 2, WIDTH)), grid.shape, 8)
    inside = torch.zeros_like(picture)
    inside[:, :, 16:48, 8:24] = 1
    assert torch.equal(picture != 0, inside.bool())


@pytest.mark.parametrize("features", [(1, 1), (3, 2)])
def test_a_picture_that_doublings_miss_is_resized(features: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = HEADS["channelwise_decoder"](WIDTH, GRID, Entries(2, 4), features, base=4, layers=1).eval()
    inputs = torch.randn(2, features[0] * features[1], WIDTH)
    small_picture = head.decoder(inputs.transpose(1, 2).reshape(2, WIDTH, *features))
    expected = F.interpolate(small_picture, (16, 24), mode="bilinear")
    torch.testing.assert_close(everywhere(head, inputs), patchify(expected, 4))


@pytest.mark.parametrize(("final", "bounded"), [("none", False), ("tanh", True)])
def test_tanh_bounds_a_picture(final: str, bounded: bool) -> None:
    head, (features, _) = small("channelwise_decoder", final=final, norm="none"), drawn()
    assert bool((everywhere(head, features * 1e6).abs() <= 1).all()) == bounded


def test_the_inpainting_nets_decoder_gives_its_published_picture() -> None:
    case = np.load(PARITY / "context_encoder_center128.npz")
    weights = {key: torch.tensor(case[key]).double() for key in case.files if key.startswith("G/")}
    hidden = torch.tensor(case["x"]).double()
    hidden[:, :, 36:92, 36:92] = torch.tensor(case["fill"])[:, None, None]

    def normalised(maps: Tensor, key: str) -> Tensor:
        return F.batch_norm(maps, None, None, weights[f"{key}.weight"], weights[f"{key}.bias"], training=True)

    maps = F.leaky_relu(F.conv2d(hidden, weights["G/0.0.weight"], weights["G/0.0.bias"], 2, 1), 0.2)
    for layer in (2, 5, 8, 11):
        maps = F.conv2d(maps, weights[f"G/0.{layer}.weight"], None, 2, 1)
        maps = F.leaky_relu(normalised(maps, f"G/0.{layer + 1}"), 0.2)
    maps = F.leaky_relu(normalised(F.conv2d(maps, weights["G/0.14.weight"]), "G/1"), 0.2)

    params: dict[str, Any] = {"base": 4, "final": "tanh", "region": "centre"}
    head = HEADS["channelwise_decoder"](8, Grid(128, 128, 16), Entries(3, 16), (1, 1), **params).double()
    # The published decoder's layers are the generator's from the third on.
    ours = {f"decoder.{int(key[2:].split('.')[0]) - 3}.{key.split('.')[1]}": weights[key] for key in weights
            if not key.startswith(("G/0.", "G/1."))}  # fmt: skip
    missing, unexpected = head.load_state_dict(ours, strict=False)
    assert all("running" in key or "tracked" in key for key in missing)
    # Biases before a batch norm, which takes them out again.
    assert unexpected == [f"decoder.{layer}.bias" for layer in (0, 3, 6, 9)]
    picture = unpatchify(everywhere(head, maps.flatten(2).transpose(1, 2)), (8, 8), 16)
    centre = picture[0, :, 32:96, 32:96]
    torch.testing.assert_close(centre[:, ::2, ::2].float(), torch.tensor(case["fake0"]), atol=1e-6, rtol=1e-5)


def maes_encoding() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """MAE's published weights, and what its encoder gives for them: features, kept and class token."""
    case = np.load(PARITY / "mae_pix.npz")
    weights = {key[3:]: torch.tensor(case[key]).float() for key in case.files if key.startswith("sd/")}
    images = torch.tensor(case["x"]).float()
    kept = torch.tensor(case["noise"]).argsort(1)[:, :4]
    tokens = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"][:, 1:]
    tokens = tokens.gather(1, kept[..., None].expand(-1, -1, 24))
    tokens = torch.cat([(weights["cls_token"] + weights["pos_embed"][:, :1]).expand(2, -1, -1), tokens], 1)
    for index in range(2):
        block, prefix = Block(24, 3, 2.0, qkv_bias=True), f"blocks.{index}."
        block.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        tokens = block(tokens)
    tokens = F.layer_norm(tokens, (24,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    return weights, tokens[:, 1:], kept, tokens[:, :1]


def test_the_transformer_decoder_gives_maes_published_predictions() -> None:
    weights, features, kept, summary = maes_encoding()
    head = HEADS["transformer_decoder"](24, Grid(64, 64, 16), Entries(3, 16), width=16, depth=1, heads=2, mlp_ratio=2.0)
    names = {"decoder_embed": "embed", "decoder_blocks": "blocks", "decoder_norm": "norm", "decoder_pred": "project"}
    ours = {"token": weights["mask_token"]}
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        if first in names:
            # MAE's values are in the order (row, column, channel), ours (channel, row, column).
            swapped = value.unflatten(0, (16, 16, 3)).movedim(2, 0).flatten(0, 2) if first == "decoder_pred" else value
            ours[f"{names[first]}.{rest}"] = swapped
    head.load_state_dict(ours)
    np.testing.assert_allclose(head.positions, weights["decoder_pos_embed"][0, 1:], atol=1e-3)
    # The case's table is rounded to float16.
    head.positions.copy_(weights["decoder_pos_embed"][0, 1:])
    predicted = everywhere(head, features, kept=kept, summary=summary)
    predicted = predicted.unflatten(-1, (3, 256)).transpose(-1, -2).flatten(-2)
    published = torch.tensor(np.load(PARITY / "mae_pix.npz")["pred"])
    torch.testing.assert_close(predicted, published, atol=1e-4, rtol=0)


def test_the_order_of_kept_tokens_is_nothing_to_a_decoder() -> None:
    head, (features, wanted) = small("transformer_decoder"), drawn()
    order = torch.randperm(GRID.count).expand(2, -1)
    shuffled = features.gather(1, order[..., None].expand_as(features))
    torch.testing.assert_close(head(shuffled, wanted, order), head(features, wanted), atol=1e-5, rtol=1e-5)


def test_dropped_positions_hold_the_mask_token_and_class_tokens_are_read() -> None:
    head, (features, wanted) = small("transformer_decoder"), drawn()
    kept = torch.arange(5, 11).expand(2, -1)
    with torch.no_grad():
        # Features whose embedding is the mask token.
        blank = torch.linalg.lstsq(head.embed.weight, (head.token[0, 0] - head.embed.bias)[:, None]).solution[:, 0]
        head.token.copy_(head.embed(blank))
    filled = blank.expand(2, GRID.count, -1).clone()
    filled[:, 5:11] = features[:, 5:11]
    torch.testing.assert_close(head(filled, wanted), head(features[:, 5:11], wanted, kept), atol=1e-4, rtol=1e-4)
    without = head(features, wanted, summary=torch.empty(2, 0, WIDTH))
    torch.testing.assert_close(without, head(features, wanted))
    assert not torch.allclose(head(features, wanted, summary=torch.randn(2, 1, WIDTH)), without)


@pytest.mark.parametrize("init", ["timm", "xavier"])
def test_a_decoder_starts_as_its_init_says(init: str) -> None:
    head = small("transformer_decoder", width=64, init=init)
    weight = head.blocks[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.std().item() == pytest.approx({"timm": 0.02, "xavier": bound / 3**0.5}[init], rel=0.1)
    assert not head.project.bias.any()
    assert head.token.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_decoder_at_its_defaults_is_maes() -> None:
    with torch.device("meta"):
        head = HEADS["transformer_decoder"](768, Grid(224, 224, 16), Entries(3, 16))
    blocks = 8 * 12 * 512**2
    assert parameters(head) == pytest.approx(blocks + 768 * 512 + 512 * 768, rel=0.01)
    assert len(head.blocks) == 8
