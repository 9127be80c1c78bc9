"""The convolutional encoders behind the encoder contract: published sizes, maps that fit, and pixels as tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mim_core.encoders.alexnet import AlexNet
from mim_core.encoders.conv import Conv, ConvNet
from mim_core.grid import Grid


def conv(size: tuple[int, int] = (32, 48), channels: int = 3, **params: Any) -> Conv:
    torch.manual_seed(0)
    return Conv(size, channels, **{"base": 4, "layers": 3, "bottleneck": 10} | params).eval()


def alexnet(size: tuple[int, int] = (72, 104), channels: int = 3, **params: Any) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(size, channels, **{"base": 6} | params).eval()


SMALL: list[ConvNet] = [conv(), alexnet(), alexnet(batch_norm=True)]
each_encoder = pytest.mark.parametrize("encoder", SMALL, ids=["conv", "alexnet", "alexnet_norm"])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolutions(encoder: nn.Module) -> list[nn.Conv2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]


def test_alexnet_is_the_published_one_without_groups() -> None:
    with torch.device("meta"):
        encoder = AlexNet((227, 227), 3)
        features, summary = encoder.encode(encoder.embed(torch.empty(2, 3, 227, 227)))
        maps = encoder.pyramid(torch.empty(2, 3, 227, 227))
    assert [layer.out_channels for layer in convolutions(encoder)] == [96, 256, 384, 384, 256]
    assert features.shape == (2, 36, 256)
    assert summary.shape == (2, 0, 256)
    assert encoder.feature_shape == (6, 6)
    assert [each.shape[1:] for each in maps] == [(96, 55, 55), (256, 27, 27), (256, 13, 13), (256, 6, 6)]
    assert count(encoder) == 34_944 + 614_656 + 885_120 + 1_327_488 + 884_992


def test_the_inpainting_encoder_is_the_published_one() -> None:
    with torch.device("meta"):
        encoder = Conv((128, 128), 3).eval()
        features, summary = encoder.encode(encoder.embed(torch.empty(2, 3, 128, 128)))
        maps = encoder.pyramid(torch.empty(2, 3, 128, 128))
    assert [layer.out_channels for layer in convolutions(encoder)] == [64, 64, 128, 256, 512, 4000]
    assert features.shape == (2, 1, 4000)
    assert summary.shape == (2, 0, 4000)
    assert encoder.feature_shape == (1, 1)
    assert [each.shape[1:] for each in maps] == [(64, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    weights = 16 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 4000)
    normed = 64 + 128 + 256 + 512 + 4000
    assert count(encoder) == weights + (64 + normed) + 2 * normed
    assert [len(stage) for stage in encoder.stages] == [2, 3, 3, 3, 3, 3]
    assert {module.negative_slope for module in encoder.modules() if isinstance(module, nn.LeakyReLU)} == {0.2}


def test_widths_stop_doubling_at_eight_times_the_base() -> None:
    with torch.device("meta"):
        encoder = conv((512, 512), layers=7)
    assert [layer.out_channels for layer in convolutions(encoder)] == [4, 4, 8, 16, 32, 32, 32, 10]


@each_encoder
def test_shapes(encoder: ConvNet) -> None:
    images = torch.randn(2, 3, encoder.grid.height, encoder.grid.width)
    tokens = encoder.embed(images)
    features, summary = encoder.encode(tokens)
    h, w = encoder.feature_shape
    assert tokens.shape == (2, encoder.grid.count, encoder.embed_width) == (2, images[0, 0].numel(), 3)
    assert features.shape == (2, h * w, encoder.width)
    assert summary.shape == (2, 0, encoder.width)
    torch.testing.assert_close(encoder.features(images).flatten(2).transpose(1, 2), features)


@pytest.mark.parametrize("size", [(67, 67), (68, 130), (128, 96), (99, 101)])
def test_alexnets_map(size: tuple[int, int]) -> None:
    encoder = alexnet(size, channels=1)
    images = torch.randn(1, 1, *size)
    assert encoder.features(images).shape == (1, 16, *encoder.feature_shape)
    torch.testing.assert_close(encoder.pyramid(images)[-1], encoder.features(images))


@pytest.mark.parametrize(("size", "layers"), [((32, 32), 3), ((33, 47), 3), ((8, 16), 1), ((64, 80), 4), ((40, 40), 2)])
def test_convs_map(size: tuple[int, int], layers: int) -> None:
    encoder = conv(size, channels=5, layers=layers)
    images = torch.randn(2, 5, *size)
    assert encoder.features(images).shape == (2, 10, *encoder.feature_shape)
    assert [each.shape[2] for each in encoder.pyramid(images)] == [size[0] >> layer + 1 for layer in range(layers)]


@pytest.mark.parametrize(
    ("encoder", "cell"),
    [
        (conv((128, 128), layers=5), 32),
        (conv((32, 48), layers=3), 8),
        (conv((36, 48), layers=3), 6),
        (alexnet((128, 96)), 32),
        (alexnet((72, 104)), 8),
        (alexnet((227, 227)), 1),
    ],
)
def test_predictions_lie_on_the_largest_cells_that_tile_the_image(encoder: ConvNet, cell: int) -> None:
    assert encoder.grid.patch_px == 1
    assert encoder.output == Grid(encoder.grid.height, encoder.grid.width, cell)


@each_encoder
def test_a_hidden_pixel_does_not_reach_the_features(encoder: ConvNet) -> None:
    images = torch.randn(2, 3, encoder.grid.height, encoder.grid.width, requires_grad=True)
    hidden = torch.rand(2, encoder.grid.count) < 0.5
    encoder(torch.where(hidden[..., None], torch.ones(3), encoder.embed(images))).square().sum().backward()
    assert images.grad is not None
    pixels = encoder.grid.pixels(hidden)[:, None].expand_as(images)
    assert (images.grad[pixels] == 0).all()
    assert (images.grad[~pixels] != 0).any()


@each_encoder
def test_every_parameter_learns(encoder: ConvNet) -> None:
    encoder.zero_grad()
    images = torch.randn(2, 3, encoder.grid.height, encoder.grid.width)
    encoder(encoder.embed(images)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@each_encoder
def test_half_precision(encoder: ConvNet) -> None:
    images = torch.randn(2, 3, encoder.grid.height, encoder.grid.width)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(encoder.embed(images))
    assert features.isfinite().all()
    features.float().sum().backward()


def test_norms_take_each_batchs_own_statistics_in_training() -> None:
    encoder = conv((32, 32)).train()
    with torch.no_grad():
        features = encoder.stages[-1][1](torch.randn(8, 10, 1, 1) * 3 + 2)
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(10), atol=1e-5, rtol=0)


@each_encoder
def test_layers_are_the_convolutions(encoder: ConvNet) -> None:
    layers = [encoder.layer(f"{name}.weight") for name, module in encoder.named_modules() if hasattr(module, "weight")]
    assert sorted(set(layers)) == list(range(1, encoder.depth + 1))
    assert layers == sorted(layers)
    assert encoder.depth == len(convolutions(encoder))
    assert encoder.no_weight_decay() == set()


@each_encoder
def test_dropped_tokens_are_refused(encoder: ConvNet) -> None:
    assert not encoder.drops
    with pytest.raises(ValueError, match="kept: found dropped tokens"):
        encoder.encode(torch.zeros(1, 3, 3), torch.arange(3)[None])


def test_convs_weights_begin_as_published() -> None:
    encoder = conv(base=16, bottleneck=64)
    for layer in convolutions(encoder):
        assert layer.bias is not None
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert torch.cat([norm.weight for norm in norms]).std().item() == pytest.approx(0.02, rel=0.3)
    assert not torch.cat([norm.bias for norm in norms]).any()


@pytest.mark.parametrize(
    ("build", "size", "params", "message"),
    [
        (conv, (32, 32), {"layers": 5}, "layers: found 5; .* to 1 x 1, .*choose at most 3"),
        (conv, (64, 31), {"layers": 3}, "layers: found 3; .* to 8 x 3, .*choose at most 2"),
        (conv, (7, 64), {"layers": 1}, "layers: found 1; .*use images of 8 px or more"),
        (alexnet, (66, 80), {}, "image height: found 66 px; AlexNet needs 67 or more"),
        (alexnet, (80, 32), {}, "image width: found 32 px; AlexNet needs 67 or more"),
    ],
)
def test_errors(build: Any, size: tuple[int, int], params: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(size, **params)
