"""What detectors are made of: necks, windows, pooling, pasted masks, the sheet."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from mim_core.encoders import ENCODERS
from mim_core.metrics.boxes import Found, Truth
from mim_core.tasks.detect import sheet
from mim_core.tasks.detect.detectors import _align, paste
from mim_core.tasks.detect.necks import Fpn, SimplePyramid, Single
from mim_core.tasks.detect.proposals import Anchors, Windows, fitting, grid_windows, rpn


def encoder(patch_px: int, size: tuple[int, int]) -> Any:
    return ENCODERS["vit"](size, 3, patch_px=patch_px, width=16, depth=1, heads=2)


@pytest.mark.parametrize(("patch_px", "size"), [(16, (64, 96)), (4, (32, 48)), (14, (56, 84)), (2, (16, 12))])
def test_the_simple_pyramid_has_the_strides_that_it_says(patch_px: int, size: tuple[int, int]) -> None:
    of = encoder(patch_px, size)
    neck = SimplePyramid(of, size, width=8)
    wanted = [patch_px / scale for scale in (4, 2, 1, 0.5) if patch_px % scale == 0]
    assert neck.strides == [*wanted, 2 * wanted[-1]]
    assert neck.pooled == len(wanted)
    maps = neck(of.pyramid(torch.randn(2, 3, *size)))
    assert list(maps) == [*map(str, range(len(wanted))), "pool"]
    for stride, one in zip(neck.strides, maps.values(), strict=True):
        assert one.shape == (2, 8, *(-(-side // stride) for side in size))


def test_the_simple_pyramid_is_published_vitdet_s() -> None:
    """Li et al., ECCV 2022, section 3 and appendix: layers of each branch, in their order."""
    branches = SimplePyramid(encoder(16, (64, 64)), (64, 64)).branches
    last: list[type[nn.Module]] = [nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]
    first: list[list[type[nn.Module]]] = [
        [nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d],
        [nn.ConvTranspose2d],
        [],
        [nn.MaxPool2d],
    ]
    for branch, begins in zip(branches, first, strict=True):
        assert [type(layer) for layer in branch] == begins + last
        assert [layer.kernel_size for layer in branch if isinstance(layer, nn.Conv2d)] == [(1, 1), (3, 3)]
        assert branch[-1].weight.shape == (256,)


def test_one_scale_of_the_simple_pyramid_is_enough() -> None:
    neck = SimplePyramid(encoder(4, (32, 32)), (32, 32), scales=(2,), width=8)
    assert (neck.strides, neck.pooled) == ([2, 4], 1)


def test_a_swin_s_stages_are_normalised_before_its_pyramid_and_convolutions_are_not() -> None:
    swin = ENCODERS["swin"]((32, 32), 3, patch_px=2, width=16, depths=(1, 1), heads=(2, 2), window=4)
    neck = Fpn(swin, (32, 32), width=8)
    assert [type(norm) for norm in neck.norms] == [LayerNorm2d, LayerNorm2d]
    maps = swin.pyramid(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(neck([100 * maps[0], maps[1]]), neck(maps), rtol=1e-3, atol=1e-3)
    conv = ENCODERS["conv"]((32, 32), 3, base=4, layers=3, bottleneck=8)
    assert {type(norm) for norm in Fpn(conv, (32, 32)).norms} == {nn.Identity}
    assert Fpn(conv, (32, 32)).strides == [2, 4, 8, 16]


def test_one_map_is_the_encoder_s_own() -> None:
    alexnet = ENCODERS["alexnet"]((99, 99), 3, base=6)
    maps = alexnet.pyramid(torch.randn(1, 3, 99, 99))
    assert torch.equal(Single(alexnet, (99, 99))(maps)["0"], maps[2])
    assert torch.equal(Single(alexnet, (99, 99), level=1)(maps)["0"], maps[0])


@given(
    size=st.tuples(st.integers(16, 200), st.integers(16, 200)),
    places=st.tuples(*[st.floats(0, 1)] * 4),
    least=st.sampled_from([0.2, 0.25, 0.5]),
    ratio=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_some_window_overlaps_with_every_box_by_more_than_half(
    size: tuple[int, int], places: tuple[float, ...], least: float, ratio: float
) -> None:
    smallest = least * min(size)
    width = smallest + places[0] * (size[1] - smallest)
    height = np.clip(width * ratio ** (2 * places[1] - 1), smallest, size[0])
    width = np.clip(width, height / ratio, height * ratio)
    left, top = places[2] * (size[1] - width), places[3] * (size[0] - height)
    box = torch.tensor([[left, top, left + width, top + height]])
    windows = torch.from_numpy(grid_windows(size, least, ratio)).double()
    assert box_iou(box.double(), windows).max() > 0.55


def test_windows_follow_from_the_size_alone_and_lie_in_the_image() -> None:
    windows = grid_windows((32, 48), 0.25, 2.0)
    assert windows.tobytes() == grid_windows((32, 48), 0.25, 2.0).tobytes()
    assert len(np.unique(windows, axis=0)) == len(windows) < 2000
    assert windows.min() == 0
    assert windows[:, 2].max() == pytest.approx(48)
    assert windows[:, 3].max() == pytest.approx(32)
    module = Windows(None, (32, 48))
    assert not list(module.state_dict()), "what follows from the size is not saved"
    boxes, losses = module(ImageList(torch.zeros(2, 3, 32, 48), [(32, 48)] * 2), OrderedDict())
    assert len(boxes) == 2
    assert losses == {}


def test_counts_are_published_ones_from_800_px_on() -> None:
    assert fitting(1000, 64, (800, 1333)) == fitting(1000, 64, (1024, 1024)) == 1000
    assert fitting(1000, 64, (400, 600)) == 500
    assert fitting(1000, 64, (32, 32)) == 64


def test_anchors_lie_at_their_strides_whatever_the_maps_sizes_and_types() -> None:
    maps = [torch.zeros(1, 1, 4, 5, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 3, dtype=torch.bfloat16)]
    (boxes,) = Anchors([(8.0,), (16.0,)], (1.0,), [7, 14])(ImageList(torch.zeros(1, 3, 28, 35), [(28, 35)]), maps)
    assert boxes.dtype == torch.float32
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert middles[:20].reshape(4, 5, 2)[3, 4].tolist() == [28, 21]
    assert middles[20:].reshape(2, 3, 2)[1, 2].tolist() == [28, 14]
    assert (boxes[:20, 2:] - boxes[:20, :2] == 8).all()


def test_anchors_of_small_images_fit_them() -> None:
    neck = SimplePyramid(encoder(4, (32, 32)), (32, 32), scales=(2, 1), width=8)
    assert rpn(neck, (32, 32)).anchor_generator.sizes == ((8.0,), (16.0,), (32.0,))
    single = Single(encoder(4, (32, 32)), (32, 32))
    assert rpn(single, (32, 32)).anchor_generator.sizes == ((8.0, 16.0, 32.0),)


@pytest.mark.parametrize("patch_px", [16, 14])
def test_regions_are_pooled_where_they_are(patch_px: int) -> None:
    """On maps whose value is the place in px, a region's pooled mean is its middle."""
    size = (4 * patch_px, 6 * patch_px)
    neck = SimplePyramid(encoder(patch_px, size), size, scales=(2, 1), width=8)
    pool = _align(neck, 4)
    maps: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, stride in zip(("0", "1"), neck.strides, strict=False):
        y, x = torch.meshgrid(*(torch.arange(side // stride) * float(stride) for side in size), indexing="ij")
        maps[name] = torch.stack([x, y])[None]
    box = torch.tensor([[patch_px, patch_px, 3.5 * patch_px, 2.5 * patch_px]])
    pooled = pool(maps, [box], [size])[0].mean((1, 2))
    torch.testing.assert_close(pooled, (box[0, :2] + box[0, 2:]) / 2)


def test_regions_go_to_maps_by_their_size_as_published() -> None:
    """224 px belong to stride 16 (Lin et al., CVPR 2017, equation 1)."""
    neck = SimplePyramid(encoder(16, (64, 64)), (64, 64), width=8)
    sides = torch.tensor([40.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 800.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert _align(neck, 7).map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_masks_are_pasted_without_rounding_their_boxes() -> None:
    full = torch.ones(2, 28, 28)
    boxes = torch.tensor([[3.0, 5.0, 10.0, 12.0], [3.4, 5.0, 10.4, 12.0]])
    pasted = paste(full, boxes, (16, 20))
    assert pasted[0, 5:12, 3:10].all()
    assert pasted[0].sum() == 49
    half = full.clone()
    half[:, :, 14:] = 0
    columns = paste(half, torch.tensor([[2.0, 2.0, 14.0, 14.0]]).repeat(2, 1), (16, 20))[0].any(0).nonzero().flatten()
    assert (columns[0], columns[-1]) == (2, 7)
    assert paste(full[:0], boxes[:0], (16, 20)).shape == (0, 16, 20)
    assert paste(torch.ones(70, 28, 28), boxes[:1].repeat(70, 1), (16, 20)).sum() == 70 * 49


def truth(boxes: list[list[float]], classes: list[int], difficult: list[bool] | None = None) -> Truth:
    none = np.zeros(len(boxes), bool)
    aside = none if difficult is None else np.array(difficult)
    return Truth(np.array(boxes, np.float64).reshape(-1, 4), np.array(classes, np.int64), aside, none)


def found(boxes: list[list[float]], classes: list[int], scores: list[float]) -> Found:
    return Found(np.array(boxes, np.float64).reshape(-1, 4), np.array(classes, np.int64), np.array(scores))


def test_an_image_s_quality_is_the_overlap_of_what_there_is_and_what_is_drawn() -> None:
    here, there = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    real = truth([here, there], [0, 1])
    assert sheet.quality(found([here, there], [0, 1], [0.9, 0.8]), real) == 1
    assert sheet.quality(found([], [], []), real) == 0
    assert sheet.quality(found([here, there], [1, 0], [0.9, 0.8]), real) == 0
    assert sheet.quality(found([here], [0], [0.9]), real) == pytest.approx(2 / 3)
    assert sheet.quality(found([here, here, there], [0, 0, 1], [0.9, 0.8, 0.7]), real) == pytest.approx(4 / 5)
    assert sheet.quality(found([], [], []), truth([], [])) == 1
    hard = truth([here, there], [0, 1], [False, True])
    assert sheet.quality(found([here], [0], [0.9]), hard) == 1
    assert sheet.quality(found([here, there], [0, 1], [0.9, 0.8]), hard) == 1


def test_as_many_detections_are_shown_as_there_are_objects() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    real = [truth([box, box], [0, 1], [False, True]), truth([], []), truth([box], [1])]
    guesses = [found([box, box], [0, 1], [0.2, 0.1]), found([box], [0], [0.15]), found([], [], [])]
    kept, least = sheet.best(guesses, real)
    assert least == 0.15
    assert [one.scores.tolist() for one in kept] == [[0.2], [0.15], []]
    nothing, _ = sheet.best([found([], [], [])] * 3, real)
    assert [len(one.boxes) for one in nothing] == [0, 0, 0]


def test_images_are_chosen_from_the_best_to_the_worst() -> None:
    qualities = list(np.random.default_rng(0).permutation(101) / 100)
    chosen = [qualities[at] for at in sheet.spread(qualities, 5)]
    assert chosen == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert len(sheet.spread(qualities[:3], 5)) == 3


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (300, 400)])
def test_the_sheet_shows_small_images_large_and_large_ones_small(tmp_path: Path, size: tuple[int, int]) -> None:
    high, wide = size
    box = [wide * 0.25, high * 0.25, wide * 0.75, high * 0.75]
    image = torch.full((3, *size), 0.5)
    masks = np.zeros((1, *size), bool)
    masks[:, high // 4 : high * 3 // 4, wide // 4 : wide * 3 // 4] = True
    one = sheet.Example(image, truth([box], [0]), found([box], [0], [0.9]), masks)
    none = sheet.Example(image, truth([], []), found([], [], []), None)
    drawn = sheet.draw([one, none] * 4, ["thing"], "caption")
    assert 900 < drawn.width < 1300
    colours = np.asarray(drawn).reshape(-1, 3).tolist()
    assert colours.count(list(sheet.FOUND)) > 500
    assert colours.count(list(sheet.WRONG)) == 0
