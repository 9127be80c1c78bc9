"""What the heads are made of; initial weights are those of mmsegmentation, in which the papers' code is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

Share = Annotated[float, Field(ge=0, lt=1)]


class ConvNorm(nn.Sequential):
    """A convolution that keeps the map's size, BatchNorm and ReLU.

    Weights are normal with variance 2 / fan out (He et al., ICCV 2015); the convolution has no bias.
    """

    def __init__(self, before: int, after: int, kernel: int = 3) -> None:
        super().__init__(*convolution(before, after, kernel, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Raises ValueError where a batch has one value a channel, of which there is no variance to learn from."""
        if self.training and maps.shape[0] * maps.shape[2] * maps.shape[3] < 2:
            raise ValueError(
                "head: found one image whose map is one cell; BatchNorm needs two values a channel while training; "
                "use a batch of 2 images or more"
            )
        for layer in self:
            maps = layer(maps)
        return maps


def convolution(before: int, after: int, kernel: int, *, bias: bool) -> list[nn.Module]:
    """Make a convolution that keeps the map's size; an even kernel sees one cell more to the right and below."""
    conv = nn.Conv2d(before, after, kernel, padding=(kernel - 1) // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv] if kernel % 2 else [nn.ZeroPad2d((0, 1, 0, 1)), conv]


def scoring(width: int, classes: int) -> nn.Conv2d:
    """Make the 1x1 convolution that scores each class: weights N(0, 0.01), bias 0."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(maps: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c H W"]:
    """Resize maps bilinearly, corners not aligned; the centre of a cell stays where it is in the image."""
    if list(maps.shape[-2:]) == list(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)
