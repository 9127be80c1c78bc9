"""Necks: what makes the maps that a detector looks at of an encoder's maps.

A neck has `width` (channels of all its maps) and `strides` of its maps in px, of which the first `pooled` are those
that regions are pooled from; `forward(maps)` takes what `encoder.pyramid` gives and gives maps by name, the finest
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BeforeValidator, Field, PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mim_core.encoders.alexnet import AlexNet
from mim_core.encoders.conv import ConvNet
from mim_core.spec import OneOf, Piece, Table

Maps = OrderedDict[str, Tensor]
Numbers = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    Field(min_length=1),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
"""Positive numbers, which YAML writes as a list."""
COARSEST = "pool"
"""Name of the map that only proposals are made from: every second cell of the last."""


class SimplePyramid(nn.Module):
    """Maps at several scales from an encoder's last map alone (Li et al., "Exploring Plain Vision Transformer Backbones
    for Object Detection", ECCV 2022, section 3: simple feature pyramid).

    `scales` are 4 (two deconvolutions with LayerNorm and GELU between), 2 (one deconvolution), 1, and 0.5 (maximum of
    2 x 2); each is followed by a 1 x 1 and a 3 x 3 convolution to `width`, both with LayerNorm. Left out, they are
    those that come to strides of whole px and maps of a cell or more. Raises ValueError for other scales.
    """

    def __init__(
        self, encoder: Any, size: tuple[int, int], *, scales: Numbers | None = None, width: PositiveInt = 256
    ) -> None:
        super().__init__()
        level = encoder.levels()[-1]
        fit = [scale for scale in (4, 2, 1, 0.5) if level.stride % scale == 0 and level.stride / scale <= min(size)]
        chosen = sorted(scales or fit, reverse=True)
        for scale in chosen:
            if scale not in fit:
                raise ValueError(
                    f"neck.scales: found {scale:g}; for images of {size[0]} x {size[1]} px and an encoder whose last "
                    f"map has a stride of {level.stride} px it must be one of {fit}; choose among them"
                )
        self.branches = nn.ModuleList(_branch(level.width, scale, width) for scale in chosen)
        self.width, self.pooled = width, len(chosen)
        strides = [round(level.stride / scale) for scale in chosen]
        self.strides = [*strides, 2 * strides[-1]]

    def forward(self, maps: Sequence[Float[Tensor, "b d h w"]]) -> Maps:
        outs = [branch(maps[-1]) for branch in self.branches]
        named = OrderedDict((str(at), out) for at, out in enumerate(outs))
        named[COARSEST] = F.max_pool2d(outs[-1], 1, stride=2)
        return named


class Fpn(nn.Module):
    """Feature pyramid network on maps that halve from one to the next (Lin et al., CVPR 2017), torchvision's.

    Maps of a transformer's stages are normalised first, as in Swin's detectors; a convolutional encoder's are not.
    Raises ValueError where the maps do not halve.
    """

    def __init__(self, encoder: Any, size: tuple[int, int], *, width: PositiveInt = 256) -> None:
        super().__init__()
        levels = encoder.levels()
        strides = [level.stride for level in levels]
        if any(2 * finer != coarser for finer, coarser in pairwise(strides)) or len(levels) < 2:
            raise ValueError(
                f"neck: found fpn on maps with strides {strides} px; it needs two or more, each twice the one before; "
                "choose simple_pyramid or single"
            )
        plain = isinstance(encoder, ConvNet)
        self.norms = nn.ModuleList(nn.Identity() if plain else LayerNorm2d(level.width) for level in levels)
        self.pyramid = FeaturePyramidNetwork([level.width for level in levels], width, LastLevelMaxPool())
        self.width, self.pooled, self.strides = width, len(levels), [*strides, 2 * strides[-1]]

    def forward(self, maps: Sequence[Float[Tensor, "b d h w"]]) -> Maps:
        normed = OrderedDict((str(at), norm(one)) for at, (norm, one) in enumerate(zip(self.norms, maps, strict=True)))
        named: Maps = self.pyramid(normed)
        return named


class Single(nn.Module):
    """One of an encoder's maps as it is: `level` of its pyramid, counted from 1; left out, the last, AlexNet's conv5.

    Raises ValueError where there is no such map.
    """

    def __init__(self, encoder: Any, size: tuple[int, int], *, level: PositiveInt | None = None) -> None:
        super().__init__()
        levels = encoder.levels()
        chosen = level or len(levels) - isinstance(encoder, AlexNet)  # its last is pool5
        if chosen > len(levels):
            raise ValueError(f"neck.level: found {chosen}; the encoder has {len(levels)} maps; choose one of them")
        self.at, self.width = chosen - 1, levels[chosen - 1].width
        self.pooled, self.strides = 1, [levels[chosen - 1].stride]

    def forward(self, maps: Sequence[Float[Tensor, "b d h w"]]) -> Maps:
        return OrderedDict([("0", maps[self.at])])


def _branch(width: int, scale: float, out: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    if scale == 4:
        parts += [nn.ConvTranspose2d(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU()]
        parts += [nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
        width = width // 4
    elif scale == 2:
        parts += [nn.ConvTranspose2d(width, width // 2, 2, 2)]
        width = width // 2
    elif scale == 0.5:
        parts += [nn.MaxPool2d(2, 2, ceil_mode=True)]
    parts += [nn.Conv2d(width, out, 1, bias=False), LayerNorm2d(out)]
    parts += [nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out)]
    return nn.Sequential(*parts)


NECKS: Table = {"simple_pyramid": SimplePyramid, "fpn": Fpn, "single": Single}
NeckPiece = Annotated[Piece, OneOf(NECKS)]


def usual(encoder: Any, detector: str) -> str:
    """Name the neck that goes with an encoder: one map for Fast R-CNN and AlexNet, else a pyramid of its maps."""
    if detector == "fast_rcnn" or isinstance(encoder, AlexNet):
        return "single"
    strides = [level.stride for level in encoder.levels()]
    return "fpn" if len(set(strides)) > 1 else "simple_pyramid"
