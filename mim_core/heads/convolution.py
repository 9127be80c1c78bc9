"""Up-convolutions from features to a whole picture (Context Encoder: Pathak et al., CVPR 2016, section 3.1)."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from mim_core.blocks import begin_as_dcgan
from mim_core.grid import Entries, Grid, Wanted, chosen, patchify
from mim_core.heads.head import Head, all_present
from mim_core.spec import Depth


class ChannelwiseDecoder(Head):
    """Decodes the features to a map of the target's entries over the picture, of which wanted positions are read.

    Which of the two published forms comes first follows from the features. A map goes through a channel-wise fully
    connected layer and a 1x1 convolution that mixes the channels (the feature-learning net); a bottleneck of 1x1 goes
    through a 4x4 transposed convolution to a map of 4x4 (the code's inpainting net). Then come 4x4 transposed
    convolutions of stride 2, norm and ReLU before each, and a bilinear resize where doublings miss the picture's side.

    `base`: channels in the end; up to 8 times as many in the beginning, halved from layer to layer. The paper gives no
    channel counts for its feature-learning net. `layers`: doublings; by default as many as come nearest to the picture.
    `norm`: batch norm, as in the inpainting net. `final`: tanh bounds predictions to [-1, 1], as in its code, whose
    pictures are in that range. `region`: with `centre`, the picture is the central part of half the side only, for
    masks that hide no more; positions outside get zeros and no gradient, and must not be wanted.

    Convolutions with a norm behind have no bias (the code zeroes biases every step).
    Raises ValueError where `centre` does not fall on whole entries.
    """

    def __init__(
        self,
        width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        base: PositiveInt = 64,
        layers: Depth | None = None,
        norm: Literal["batch", "none"] = "batch",
        final: Literal["none", "tanh"] = "none",
        region: Literal["whole", "centre"] = "whole",
    ) -> None:
        super().__init__(width, grid, entries)
        self.features = features or grid.shape
        picture = (grid.shape[0] * entries.side, grid.shape[1] * entries.side)
        self.margin = (0, 0)
        if region == "centre":
            if picture[0] % 4 or picture[1] % 4:
                raise ValueError(
                    f"region: found centre for a target of {picture[0]} x {picture[1]} entries; both sides must be "
                    "multiples of 4; choose whole, or another target resolution"
                )
            self.margin = (picture[0] // 4, picture[1] // 4)
        self.picture = (picture[0] - 2 * self.margin[0], picture[1] - 2 * self.margin[1])
        bottleneck = self.features == (1, 1)
        shape = (4, 4) if bottleneck else self.features
        if layers is None:
            ratio = max(self.picture[0] / shape[0], self.picture[1] / shape[1])
            layers = max(1, round(math.log2(ratio)))
        channels = [base * 2 ** max(0, min(4, layers) - layer) for layer in range(1, layers + 1)]
        plain = norm == "none"
        first: list[nn.Module] = [nn.ConvTranspose2d(width, channels[0], 4, bias=plain)]
        if not bottleneck:
            first = [ChannelwiseLinear(width, math.prod(shape)), nn.Conv2d(width, channels[0], 1, bias=plain)]
        stages: list[nn.Module] = []
        for layer, (into, out) in enumerate(itertools.pairwise([*channels, entries.maps]), 1):
            stages += [nn.Identity() if plain else nn.BatchNorm2d(into), nn.ReLU()]
            bias = plain or layer == layers
            stages.append(nn.ConvTranspose2d(into, out, 4, stride=2, padding=1, bias=bias))
        self.decoder = nn.Sequential(*first, *stages, nn.Tanh() if final == "tanh" else nn.Identity())
        self.decoder.apply(begin_as_dcgan)

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        wanted: Wanted,
        kept: Int[Tensor, "b n"] | None = None,
        summary: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "m v"]:
        all_present(kept)
        maps = self.decoder(features.transpose(1, 2).reshape(len(features), -1, *self.features))
        if maps.shape[-2:] != self.picture:
            maps = F.interpolate(maps, self.picture, mode="bilinear")
        rows, columns = self.margin
        maps = F.pad(maps, (columns, columns, rows, rows))
        return chosen(patchify(maps, self.entries.side), wanted)


class ChannelwiseLinear(nn.Module):
    """Connect every cell of a map with every other, each channel by itself: d n^2 weights for d channels of n cells.

    The paper counts them as m n^4, for m maps of n x n, and names no bias.
    """

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, cells, cells))
        # Keeps the features' scale.
        nn.init.normal_(self.weight, std=cells**-0.5)

    def forward(self, maps: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return torch.einsum("bdi,dij->bdj", maps.flatten(2), self.weight).reshape(maps.shape)
