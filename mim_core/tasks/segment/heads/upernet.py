"""UPerNet: pooled context at the coarsest map, and a feature pyramid down to the finest.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, section 3.1, as mmsegmentation has
it; on a plain ViT with the rescaled maps of BEiT's code for segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from mim_core.grid import Level
from mim_core.spec import Counts
from mim_core.tasks.segment.heads.layers import ConvNorm, Share, resize, scoring


class UPerNet(nn.Module):
    """Pyramid pooling at `pools` x `pools` cells, lateral and top-down paths of `hidden` channels, all maps fused.

    BEiT's code has hidden 768 for its base model and 1024 for its large one.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        classes: int,
        *,
        hidden: PositiveInt = 512,
        pools: Counts = (1, 2, 3, 6),
        dropout: Share = 0.1,
    ) -> None:
        super().__init__()
        widths = [level.width for level in levels]
        self.rescale = rescaling(levels)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNorm(widths[-1], hidden, 1)) for side in pools
        )
        self.context = ConvNorm(widths[-1] + len(pools) * hidden, hidden)
        self.lateral = nn.ModuleList(ConvNorm(width, hidden, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(ConvNorm(hidden, hidden) for _ in widths[:-1])
        self.fuse = nn.Sequential(ConvNorm(len(widths) * hidden, hidden), nn.Dropout2d(dropout))
        self.score = scoring(hidden, classes)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        maps = [rescale(each) for rescale, each in zip(self.rescale, maps, strict=True)]
        last = maps[-1]
        pooled = [resize(pool(last), last.shape[-2:]) for pool in self.pools]
        outs = [self.context(torch.cat([last, *pooled], 1))]
        for lateral, each in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            outs.insert(0, lateral(each) + resize(outs[0], each.shape[-2:]))
        outs = [*(smooth(out) for smooth, out in zip(self.smooth, outs[:-1], strict=True)), outs[-1]]
        finest = outs[0].shape[-2:]
        return self.score(self.fuse(torch.cat([resize(out, finest) for out in outs], 1)))  # type: ignore[no-any-return]


def rescaling(levels: Sequence[Level]) -> nn.ModuleList:
    """Make a pyramid of a plain ViT's maps, which are all of one stride; maps that are a pyramid stay as they are.

    Four maps become 4, 2, 1 and 1/2 times as fine (16 px patches: strides 4, 8, 16, 32 px) by two transposed
    convolutions of 2x2 with BatchNorm and GELU between, by one, as they are, and by max pooling; other numbers of maps
    go on in the same steps. No map becomes finer than the image.
    """
    plain = len(levels) > 1 and len({level.stride for level in levels}) == 1
    doublings = [len(levels) - 2 - at if plain else 0 for at in range(len(levels))]
    return nn.ModuleList(_rescale(level, times) for level, times in zip(levels, doublings, strict=True))


def _rescale(level: Level, doublings: int) -> nn.Module:
    if doublings < 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True)
    layers: list[nn.Module] = []
    for _ in range(min(doublings, level.stride.bit_length() - 1)):
        if layers:
            layers += [nn.BatchNorm2d(level.width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(level.width, level.width, 2, stride=2))
    return nn.Sequential(*layers)
