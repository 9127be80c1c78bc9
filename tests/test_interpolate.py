"""Weights at another image size: the published tables, and networks that go on as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline

from mim_core.encoders.interpolate import Way, adapt, positions, relative_bias
from mim_core.encoders.swin import Swin
from mim_core.encoders.vit import ViT

PARITY = Path(__file__).parent / "parity"
SMALL: dict[str, Any] = {"patch_px": 8, "width": 16, "depth": 2, "heads": 2}
SHARED = "backbone.rel_pos_bias.relative_position_bias_table"
OWN = "backbone.blocks.{}.attn.relative_position_bias_table"
WINDOWS = "backbone.layers.{}.blocks.{}.attn.relative_position_bias_table"


def vit(size: tuple[int, int] = (32, 32), **params: Any) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(size, 3, **SMALL | params).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def swin(size: tuple[int, int], window: int) -> Swin:
    torch.manual_seed(0)
    return Swin(size, 3, patch_px=4, width=8, depths=(1, 1), heads=(1, 2), window=window).eval()


def features(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = encoder(encoder.embed(images))
    return out


def smooth(shape: tuple[int, int], heads: int = 2) -> torch.Tensor:
    """A table whose bias falls with distance, with three entries of the class token."""
    y, x = np.mgrid[1 - shape[0] : shape[0], 1 - shape[1] : shape[1]]
    falling = np.stack([np.exp(-(y**2 + x**2) / 4 / (head + 1)) for head in range(heads)], -1)
    return torch.tensor(np.concatenate([falling.reshape(-1, heads), np.eye(3, heads)]), dtype=torch.float32)


@pytest.mark.parametrize(
    ("source", "wanted", "before", "after", "extra"),
    [
        ("vit/src_grid4_plus3", "vit/dst_grid7_plus3", (4, 4), (7, 7), 3),
        ("swin/src_win6", "swin/dst_win7", (6, 6), (7, 7), 0),
    ],
)
def test_tables_of_relative_bias_become_the_published_ones(
    source: str, wanted: str, before: tuple[int, int], after: tuple[int, int], extra: int
) -> None:
    arrays = np.load(PARITY / "simmim_relpos_remap.npz")
    ours = relative_bias(torch.from_numpy(arrays[source]), before, after, extra)
    torch.testing.assert_close(ours, torch.from_numpy(arrays[wanted]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("before", "after"), [((4, 5), (6, 9)), ((5, 4), (3, 7))])
def test_each_side_is_spread_out_by_its_own_progression(before: tuple[int, int], after: tuple[int, int]) -> None:
    table = torch.randn((2 * before[0] - 1) * (2 * before[1] - 1) + 3, 2, dtype=torch.float64)

    def coordinates(source: int, wanted: int) -> np.ndarray:
        # The root of the progression's sum, found otherwise; 1.01 where the wanted range is shorter than any.
        sides = np.linspace(1.01, 1.5, 490001)
        sums = sum(sides**power for power in range(source - 1))
        q = sides[max(0, np.searchsorted(sums, wanted - 1) - 1)]
        reach = [sum(q**power for power in range(count + 1)) for count in range(source - 1)]
        return np.array([*(-far for far in reversed(reach)), 0, *reach])

    y, x = (coordinates(*sides) for sides in zip(before, after, strict=True))
    asked = [np.arange(1 - side, side) for side in after]
    expected = [
        RectBivariateSpline(y, x, table[:-3, head].reshape(len(y), len(x)).numpy(), s=0)(*asked).ravel()
        for head in range(2)
    ]
    ours = relative_bias(table, before, after, 3)
    np.testing.assert_allclose(ours[:-3], np.stack(expected, 1), atol=1e-4)
    assert torch.equal(ours[-3:], table[-3:])


def test_a_side_that_stays_is_not_touched_and_near_offsets_keep_their_bias() -> None:
    table = smooth((5, 4))
    ours = relative_bias(table, (5, 4), (8, 4), 3)[:-3].reshape(15, 7, 2)
    source = table[:-3].reshape(9, 7, 2)
    # Offsets -1, 0 and 1 rows are where they were; the outermost go to the rim.
    torch.testing.assert_close(ours[6:9], source[3:6], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[[0, -1]], source[[0, -1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["geometric", "bicubic"])
def test_a_small_grid_has_too_few_offsets_for_a_cubic_spline(way: Way) -> None:
    one = torch.tensor([[2.0, 3.0]])
    torch.testing.assert_close(relative_bias(one, (1, 1), (3, 2), way=way), one.expand(15, 2))
    assert relative_bias(smooth((2, 1)), (2, 1), (3, 3), 3, way=way).isfinite().all()


def test_the_plain_resize_is_of_the_whole_table() -> None:
    table = smooth((4, 4))
    ours = relative_bias(table, (4, 4), (7, 7), 3, way="bicubic")
    maps = table[:-3].T.reshape(1, 2, 7, 7)
    resized = torch.nn.functional.interpolate(maps, size=(13, 13), mode="bicubic")
    torch.testing.assert_close(ours[:-3], resized.reshape(2, -1).T)
    assert torch.equal(ours[-3:], table[-3:])


def test_positions_are_resized_by_cubic_convolution_and_the_class_row_stays() -> None:
    def weight(away: float, a: float = -0.75) -> float:
        if away <= 1:
            return (a + 2) * away**3 - (a + 3) * away**2 + 1
        return a * away**3 - 5 * a * away**2 + 8 * a * away - 4 * a if away < 2 else 0.0

    table = torch.randn(1, 1 + 4 * 6, 3)
    source = table[0, 1:].reshape(4, 6, 3)
    expected = torch.zeros(8, 6, 3)
    for row in range(8):
        at = (row + 0.5) / 2 - 0.5
        for near in range(-2, 7):
            expected[row] += weight(abs(at - near)) * source[min(max(near, 0), 3)]
    ours = positions(table, (4, 6), (8, 6))
    torch.testing.assert_close(ours[0, 1:].reshape(8, 6, 3), expected)
    assert torch.equal(ours[:, :1], table[:, :1])
    assert torch.equal(positions(table, (4, 6), (4, 6)), table)


def test_tables_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="positions: found 16 rows; a grid of 3 x 4 has 12"):
        positions(torch.zeros(1, 17, 2), (3, 4), (4, 4))
    with pytest.raises(ValueError, match="relative bias: found 49 rows; a grid of 3 x 4 has 35"):
        relative_bias(torch.zeros(52, 2), (3, 4), (4, 4), 3)


@pytest.mark.parametrize("form", ["learned", "sincos", "relative", "relative_per_block"])
def test_weights_fit_the_encoder_that_they_come_from(form: str) -> None:
    source, target = vit(positions=form, layer_scale=0.1), ViT((32, 32), 3, **SMALL, positions=form, layer_scale=0.1)
    images = torch.randn(2, 3, 32, 32)
    for before in (None, (32, 32)):
        target.load_state_dict(adapt(source.state_dict(), target, before))
        torch.testing.assert_close(features(target.eval(), images), features(source, images))


def test_learned_positions_fit_another_size() -> None:
    source, target = vit(), vit((48, 64))
    weights = source.state_dict()
    adapted = adapt(weights, target)
    name = "backbone.pos_embed"
    torch.testing.assert_close(adapted[name], positions(weights[name], (4, 4), (6, 8)))
    assert all(adapted[key] is weights[key] for key in weights if key != name)
    target.load_state_dict(adapted)


def test_fixed_positions_are_the_encoders_own() -> None:
    source, target = vit(positions="sincos"), vit((48, 64), positions="sincos")
    fixed = target.backbone.pos_embed.clone()
    target.load_state_dict(adapt(source.state_dict(), target))
    assert torch.equal(target.backbone.pos_embed, fixed)
    with pytest.raises(ValueError, match=r"pos_embed: found learned positions; .* set the encoder's positions"):
        adapt(vit().state_dict(), target)
    # The other way about, the sines and cosines are where training goes on.
    adapt(source.state_dict(), vit((48, 64)))


def test_a_grid_that_is_not_square_needs_the_size_before() -> None:
    source = vit((32, 48))
    with pytest.raises(ValueError, match=r"pos_embed: found 24 rows, which fit neither .* nor a square one; give as"):
        adapt(source.state_dict(), vit((48, 48)))
    adapted = adapt(source.state_dict(), vit((48, 48)), before=(32, 48))
    table = source.backbone.pos_embed
    torch.testing.assert_close(adapted["backbone.pos_embed"], positions(table, (4, 6), (6, 6)))
    # 6 x 4 patches are as many: the size before tells them apart.
    turned = adapt(source.state_dict(), vit((48, 32)), before=(32, 48))
    torch.testing.assert_close(turned["backbone.pos_embed"], positions(table, (4, 6), (6, 4)))
    with pytest.raises(ValueError, match="pos_embed: found 24 rows, which fit none of images of the size before"):
        adapt(source.state_dict(), vit((48, 48)), before=(32, 32))
    with pytest.raises(ValueError, match="image height: found 33 px"):
        adapt(source.state_dict(), vit((48, 48)), before=(33, 48))


@pytest.mark.parametrize("way", ["geometric", "bicubic"])
def test_a_shared_table_is_copied_to_every_block_and_resized(way: Way) -> None:
    source, target = vit(positions="relative"), vit((48, 64), positions="relative_per_block")
    weights = source.state_dict()
    adapted = adapt(weights, target, way=way)
    expected = relative_bias(weights[SHARED], (4, 4), (6, 8), 3, way=way)
    for block in range(2):
        torch.testing.assert_close(adapted[OWN.format(block)], expected)
    assert SHARED not in adapted
    assert adapted[OWN.format(0)].data_ptr() != adapted[OWN.format(1)].data_ptr()
    target.load_state_dict(adapted)


def test_a_copied_table_changes_no_feature() -> None:
    source, target = vit(positions="relative"), vit(positions="relative_per_block")
    target.load_state_dict(adapt(source.state_dict(), target))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features(target, images), features(source, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["geometric", "bicubic"])
@pytest.mark.parametrize("form", ["relative", "relative_per_block"])
def test_there_and_back(form: str, way: Way) -> None:
    small, large = vit((40, 48), positions=form), vit((80, 96), positions=form)
    weights = {
        name: smooth((5, 6)) if name.endswith("bias_table") else value for name, value in small.state_dict().items()
    }
    grown = adapt(weights, large, before=(40, 48), way=way)
    large.load_state_dict(grown)
    back = adapt(grown, small, before=(80, 96), way=way)
    for name, value in weights.items():
        if not name.endswith("bias_table"):
            assert torch.equal(back[name], value)
        elif way == "bicubic":
            torch.testing.assert_close(back[name], value, atol=0.05, rtol=0)
        else:
            # Far offsets move: up they are spread out, and down nearly all stay where they are.
            near = [table[:-3].reshape(9, 11, 2)[3:6, 4:7] for table in (back[name], value)]
            torch.testing.assert_close(*near, atol=1e-5, rtol=0)
            assert torch.equal(back[name][-3:], value[-3:])


def test_windows_of_another_size_fit() -> None:
    source, target = swin((32, 32), 2), swin((64, 64), 4)
    weights = source.state_dict()
    adapted = adapt(weights, target)
    name = WINDOWS.format(0, 0)
    torch.testing.assert_close(adapted[name], relative_bias(weights[name], (2, 2), (4, 4)))
    target.load_state_dict(adapted)
    for before in (None, (32, 32)):
        same = adapt(weights, swin((64, 64), 2), before)
        assert torch.equal(same[name], weights[name])


def test_windows_that_shrank_to_the_map_need_the_size_before() -> None:
    # The second stage's map is 2 x 4, and its windows with it.
    source, target = swin((16, 32), 4), swin((32, 64), 4)
    weights, name = source.state_dict(), WINDOWS.format(1, 0)
    assert len(weights[name]) == 3 * 7
    with pytest.raises(ValueError, match=r"layers.1.* found 21 rows, which fit neither"):
        adapt(weights, target)
    adapted = adapt(weights, target, before=(16, 32))
    torch.testing.assert_close(adapted[name], relative_bias(weights[name], (2, 4), (4, 4)))
    target.load_state_dict(adapted)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"width": 32}, r"of another shape: .*cls_token \[1, 1, 16\] for \[1, 1, 32\].* and \d+ more"),
        ({"depth": 3}, r"missing: backbone.blocks.2.norm1.weight.* and 6 more"),
        ({"depth": 1}, r"unexpected: backbone.blocks.1.norm1.weight"),
        ({"patch_px": 16}, r"shape: backbone.patch_embed.proj.weight \[16, 3, 8, 8\] for \[16, 3, 16, 16\]; only the"),
        ({"positions": "relative"}, r"missing: .*backbone.rel_pos_bias.* unexpected: backbone.pos_embed"),
        ({"layer_scale": 0.1}, r"missing: backbone.blocks.0.ls1.gamma"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_names(target: dict[str, Any], message: str) -> None:
    for before in (None, (32, 32)):
        with pytest.raises(ValueError, match=f"weights: they do not fit the encoder; .*{message}"):
            adapt(vit().state_dict(), vit(**target), before)


def test_tables_in_blocks_do_not_become_a_shared_one() -> None:
    with pytest.raises(ValueError, match=r"missing: backbone.rel_pos_bias.* unexpected: backbone.blocks.0.attn.relat"):
        adapt(vit(positions="relative_per_block").state_dict(), vit(positions="relative"))
