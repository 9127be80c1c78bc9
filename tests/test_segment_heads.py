"""Heads of segmentation: laws over the table and the encoders, and parity with other libraries' modules."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead
from transformers import BeitConfig, BeitForSemanticSegmentation

from mim_core.encoders import ENCODERS
from mim_core.grid import Level
from mim_core.spec import OneOf, Piece, Strict, check
from mim_core.tasks.segment.heads import SEGMENT_HEADS
from mim_core.tasks.segment.heads.fcn import FCN
from mim_core.tasks.segment.heads.linear import Linear
from mim_core.tasks.segment.heads.setr_pup import ProgressiveUpsampling
from mim_core.tasks.segment.heads.upernet import UPerNet
from mim_core.tasks.segment.segment import Segmenter

SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "fcn": {"hidden": 8},
    "setr_pup": {"hidden": 8},
    "upernet": {"hidden": 8},
}
# Sizes that are not square; AlexNet's maps do not tile the image, the small ViT's are 1 x 2 cells.
BODIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit", {"patch_px": 4, "width": 16, "depth": 4, "heads": 2}, (16, 24)),
    "vit_fine": ("vit", {"patch_px": 2, "width": 16, "depth": 5, "heads": 2, "positions": "relative"}, (6, 10)),
    "vit_coarse": ("vit", {"patch_px": 14, "width": 16, "depth": 2, "heads": 2}, (14, 28)),
    "swin": ("swin", {"patch_px": 2, "width": 8, "depths": (2, 2), "heads": (2, 2), "window": 2}, (16, 24)),
    "conv": ("conv", {"base": 4, "layers": 3, "bottleneck": 8}, (32, 48)),
    "alexnet": ("alexnet", {"base": 6}, (67, 83)),
}


class Row(Strict):
    head: Annotated[Piece, OneOf(SEGMENT_HEADS)]


def chosen(name: str, **params: Any) -> Piece:
    return check(Row, {"head": {"name": name, **SMALL[name], **params}}, "row").head


def segmenter(body: str, head: str, classes: int = 5, channels: int = 3, auxiliary: bool = True) -> Segmenter:
    name, params, size = BODIES[body]
    torch.manual_seed(0)
    return Segmenter(ENCODERS[name](size, channels, **params), classes, chosen(head), None, auxiliary)


def pixels(body: str, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *BODIES[body][2], generator=torch.Generator().manual_seed(1))


def test_each_head_has_small_params() -> None:
    assert set(SMALL) == set(SEGMENT_HEADS)


@pytest.mark.parametrize("head", SEGMENT_HEADS)
@pytest.mark.parametrize("body", BODIES)
def test_each_pixel_is_scored_and_the_gradient_reaches_the_encoder(body: str, head: str) -> None:
    model, images = segmenter(body, head), pixels(body)
    both = model.both(images)
    assert [tuple(scores.shape) for scores in both] == [(2, 5, *images.shape[-2:])] * 2
    assert both[0].dtype == torch.float32
    both[0].square().mean().backward()  # type: ignore[no-untyped-call]
    first = next(p for p in model.encoder.parameters() if p.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.head.parameters())
    model.eval()
    assert torch.equal(model(images), model.both(images)[0])


@pytest.mark.parametrize("head", SEGMENT_HEADS)
@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (150, 5)])
def test_any_number_of_classes_and_channels(head: str, classes: int, channels: int) -> None:
    model = segmenter("vit", head, classes, channels, auxiliary=False)
    (scores,) = model.both(pixels("vit", channels))
    assert scores.shape[1] == classes


@pytest.mark.parametrize("head", SEGMENT_HEADS)
def test_one_image_scores_the_same_alone_as_in_a_batch(head: str) -> None:
    model, images = segmenter("vit", head).eval(), pixels("vit")
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_a_batch_that_batch_norm_cannot_learn_from_is_refused() -> None:
    model, images = segmenter("vit", "upernet"), pixels("vit")
    with pytest.raises(ValueError, match=r"head: found one image whose map is one cell; .* batch of 2"):
        model.both(images[:1])
    assert model.eval()(images[:1]).shape == (1, 5, 16, 24)


def test_a_swin_s_maps_are_normed_but_the_last_which_comes_normed() -> None:
    kinds = [type(norm).__name__ for norm in segmenter("swin", "upernet").norms]
    assert kinds == ["LayerNorm2d", "Identity"]
    assert {type(norm) for norm in segmenter("vit", "upernet").norms} == {nn.Identity}


def test_linear_is_a_matrix_on_each_cell() -> None:
    head, maps = Linear([Level(6, 4)], 3), torch.randn(2, 6, 4, 5)
    expected = torch.einsum("kd,bdhw->bkhw", head.score.weight[:, :, 0, 0], maps)
    torch.testing.assert_close(head([maps], (16, 20)), expected)


def test_fcn_without_skips_is_torchvision_s() -> None:
    ours, theirs = FCN([Level(16, 8)], 3, hidden=4).eval(), FCNHead(16, 3).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    maps = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(ours([maps], (40, 56)), theirs(maps))


def test_fcn_8s_adds_the_scores_of_two_finer_maps_on_the_way_up() -> None:
    levels = [Level(4, 4), Level(6, 8), Level(8, 16), Level(10, 32)]
    head = FCN(levels, 3, hidden=5).eval()
    maps = [torch.randn(2, level.width, 32 // level.stride + 1, 64 // level.stride + 1) for level in levels]
    assert [int(score.in_channels) for score in head.skip_scores] == [8, 6]

    def up(scores: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(scores, like.shape[-2:], mode="bilinear")

    coarse = head.score(head.layers(maps[3]))
    # The finer scores start at zero, and learn from the first step on.
    out = head(maps, (32, 64))
    torch.testing.assert_close(out, up(up(coarse, maps[2]), maps[1]))
    out.sum().backward()
    assert all(score.weight.grad.abs().max() > 0 for score in head.skip_scores)
    for score in head.skip_scores:
        nn.init.normal_(score.weight)
    by_hand = up(up(coarse, maps[2]) + head.skip_scores[0](maps[2]), maps[1]) + head.skip_scores[1](maps[1])
    torch.testing.assert_close(head(maps, (32, 64)), by_hand)


def test_fcn_refuses_more_skips_than_there_are_finer_maps() -> None:
    assert not FCN([Level(8, 4)] * 4, 3).skipped
    assert FCN([Level(8, 2), Level(8, 4)], 3).skipped == [0]
    assert FCN([Level(8, 2), Level(8, 4), Level(8, 8)], 3, skips=1).skipped == [1]
    with pytest.raises(ValueError, match=r"head.skips: found 1; 0 of the encoder's maps are finer than its last"):
        FCN([Level(8, 4)] * 4, 3, skips=1)


def test_the_context_encoder_s_fcn_has_fc6_and_fc7() -> None:
    with torch.device("meta"):
        head = FCN([Level(256, 32)], 21, hidden=4096, kernels=(6, 1), norm="none", dropout=0.5, skips=0)
    expected = 36 * 256 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 21 + 21
    assert sum(p.numel() for p in head.parameters()) == expected
    assert head([torch.zeros(1, 256, 6, 7, device="meta")], (227, 227)).shape == (1, 21, 6, 7)


def test_setr_pup_at_the_paper_s_size() -> None:
    with torch.device("meta"):
        head = ProgressiveUpsampling([Level(1024, 16)], 150)
    assert len(head.convs) == 4
    convolutions = 9 * 1024 * 256 + 3 * 9 * 256**2 + 4 * 2 * 256
    assert sum(p.numel() for p in head.parameters()) == 2 * 1024 + convolutions + 256 * 150 + 150
    # Scored at half of the resolution, from which the last doubling comes to the image.
    assert head([torch.zeros(1, 1024, 6, 7, device="meta")], (96, 112)).shape == (1, 150, 48, 56)


@pytest.mark.parametrize(("stride", "cells", "size"), [(32, 6, 227), (14, 2, 28), (3, 4, 12), (1, 8, 8)])
def test_setr_pup_never_goes_beyond_the_image(stride: int, cells: int, size: int) -> None:
    head = ProgressiveUpsampling([Level(4, stride)], 2, hidden=4)
    out = head([torch.randn(2, 4, cells, cells)], (size, size))
    assert size / 2 < out.shape[-1] * (1 if size % 2 == 0 else 2) <= 2 * size
    assert out.shape[-1] <= size


def test_a_plain_vit_s_maps_become_a_pyramid() -> None:
    def sides(stride: int, count: int, cells: int) -> list[int]:
        head = UPerNet([Level(4, stride)] * count, 2, hidden=4)
        return [int(one(torch.randn(1, 4, cells, cells)).shape[-1]) for one in head.rescale.eval()]

    assert sides(16, 4, 14) == [56, 28, 14, 7]
    # No finer than the image; an odd map is halved upwards.
    assert sides(2, 4, 5) == [10, 10, 5, 3]
    assert sides(1, 4, 5) == [5, 5, 5, 3]
    assert sides(16, 2, 4) == [4, 2]
    assert sides(16, 1, 4) == [4]


def test_upernet_on_a_pyramid_takes_the_maps_as_they_are() -> None:
    head = UPerNet([Level(4, 4), Level(8, 8)], 2, hidden=4)
    assert not list(head.rescale.parameters())
    assert head([torch.randn(2, 4, 9, 7), torch.randn(2, 8, 4, 3)], (36, 28)).shape == (2, 2, 9, 7)


def test_upernet_with_its_auxiliary_head_is_that_of_transformers_beit() -> None:
    config = BeitConfig(
        image_size=64, patch_size=16, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        out_indices=[1, 2, 3, 4], num_labels=5, auxiliary_channels=12,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = BeitForSemanticSegmentation(config).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[operator,union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator,union-attr]
    levels, maps = [Level(24, 16)] * 4, [torch.randn(2, 24, 4, 4) for _ in range(4)]
    head, auxiliary = UPerNet(levels, 5, hidden=24).eval(), FCN([levels[2]], 5, hidden=12).eval()

    def take(module: nn.Module, *parts: nn.Module) -> None:
        """Fill a module with others' weights, in the order in which both have them; scores come last."""
        values = [one for part in parts for name, one in part.state_dict().items() if "classifier" not in name]
        values += [parts[-1].state_dict()[f"classifier.{name}"] for name in ("weight", "bias")]
        module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))

    take(head, theirs.fpn, theirs.decode_head)
    take(auxiliary, theirs.auxiliary_head)
    pyramid = theirs.fpn(maps)
    torch.testing.assert_close(head(maps, (64, 64)), theirs.decode_head(pyramid))
    torch.testing.assert_close(auxiliary([maps[2]], (64, 64)), theirs.auxiliary_head(pyramid))
