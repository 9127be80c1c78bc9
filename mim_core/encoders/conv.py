"""Convolutional encoders: what they share, and the inpainting encoder of the Context Encoder's code.

Source: Pathak et al., "Context Encoders: Feature Learning by Inpainting", CVPR 2016, section 3.1, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from mim_core.blocks import begin_as_dcgan
from mim_core.grid import Grid, Level, no_taps
from mim_core.spec import Depth


class ConvNet(nn.Module):
    """A chain of convolutions whose masks hide pixels and whose tokens are the pixels themselves.

    A subclass puts convolution i, with what goes with it, at `stages[i]`. `stride` is the nominal step of its features
    in px, `shape` the features' map (height, width). Such a map need not tile the image, so `output`, where predictions
    are accounted for, does not follow it: its cell is the greatest square of whole pixels that tiles the image and is
    no larger than `stride` (1 px at worst, as for 227 x 227).
    """

    drops = False
    decays_token = True
    """Whether weight decay holds for a mask token in front of it, as in the published pretraining."""
    stages: nn.ModuleList

    def __init__(
        self, size: tuple[int, int], channels: int, *, stride: int, shape: tuple[int, int], width: int, depth: int
    ) -> None:
        super().__init__()
        common = math.gcd(*size)
        self.grid = Grid(*size, 1)
        self.output = Grid(*size, max(side for side in range(1, stride + 1) if common % side == 0))
        self.feature_shape = shape
        self.embed_width = channels
        self.width = width
        self.depth = depth

    def maps(self, image: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b d h w"]]:
        """Give what comes out of each convolution's stage, in their order."""
        out = []
        for stage in self.stages:
            image = stage(image)
            out.append(image)
        return out

    def embed(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n c"]:
        """Give the pixels as tokens, row by row."""
        return images.flatten(2).transpose(1, 2)

    def encode(
        self, tokens: Float[Tensor, "b n c"], kept: Int[Tensor, "b k"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b 0 d"]]:
        """Give the features and, as there is no class token, an empty summary."""
        features = self(tokens, kept)
        return features, features[:, :0]

    def forward(self, tokens: Float[Tensor, "b n c"], kept: Int[Tensor, "b k"] | None = None) -> Float[Tensor, "b m d"]:
        """Put the pixels back in their places and run the convolutions; the features go row by row.

        Raises ValueError where tokens were dropped.
        """
        if kept is not None:
            raise ValueError("kept: found dropped tokens; convolutions need every pixel; use a fill that keeps all")
        image = tokens.transpose(1, 2).reshape(len(tokens), self.embed_width, *self.grid.shape)
        return self.features(image).flatten(2).transpose(1, 2)

    def features(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Give the last map."""
        return self.maps(image)[-1]

    def blocks(self, images: Float[Tensor, "b c H W"]) -> list[tuple[Float[Tensor, "b m d"], Float[Tensor, "b 0 d"]]]:
        """Give the features after each convolution, row by row; no class token."""
        outs = [each.flatten(2).transpose(1, 2) for each in self.maps(images)]
        return [(out, out[:, :0]) for out in outs]

    @property
    def block_widths(self) -> list[int]:
        """Width of what `blocks` gives, convolution by convolution."""
        return [next(int(m.out_channels) for m in stage.modules() if isinstance(m, nn.Conv2d)) for stage in self.stages]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the papers' code never decays, beside vectors and biases: none."""
        return set()

    def layer(self, name: str) -> int:
        """Give a parameter's layer for layer-wise decay: convolution i is i + 1; layer 0 is empty."""
        return int(name.removeprefix("stages.").split(".")[0]) + 1


class Conv(ConvNet):
    """The inpainting encoder: `layers` halving convolutions, then one that sees 4 x 4 of their map at once.

    128 px come to one vector of `bottleneck` numbers by the defaults. Widths are base, base, then double at each
    convolution up to 8 times base: 64, 64, 128, 256, 512.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        base: PositiveInt = 64,
        layers: Depth = 5,
        bottleneck: PositiveInt = 4000,
    ) -> None:
        """Build for images of `size` (height, width) px.

        Raises ValueError where the halved map is smaller than 4 x 4. BatchNorm cannot train on one image where the
        features are one vector.
        """
        height, width = (side >> layers for side in size)
        if min(height, width) < 4:
            most = min(size).bit_length() - 3  # The greatest n with side >> n of 4 or more.
            remedy = f"choose at most {most}" if most > 0 else "use images of 8 px or more"
            raise ValueError(
                f"layers: found {layers}; they halve {size[0]} x {size[1]} px to {height} x {width}, and the last "
                f"convolution needs 4 x 4; {remedy}"
            )
        super().__init__(
            size, channels, stride=2**layers, shape=(height - 3, width - 3), width=bottleneck, depth=layers + 1
        )
        widths = [channels, *(base * min(8, 2 ** max(0, index - 1)) for index in range(layers))]
        self.stages = nn.ModuleList(
            _stage(before, after, stride=2, padding=1, norm=index > 0)
            for index, (before, after) in enumerate(pairwise(widths))
        )
        self.stages.append(_stage(widths[-1], bottleneck, stride=1, padding=0, norm=True))

    def levels(self, taps: Sequence[int] | None = None) -> list[Level]:
        """Say what `pyramid` gives."""
        no_taps(taps, "convolutional encoder")
        return [Level(width, 2 ** (at + 1)) for at, width in enumerate(self.block_widths[:-1])]

    def pyramid(
        self, images: Float[Tensor, "b c H W"], taps: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b d h w"]]:
        """Give the halving convolutions' maps for dense tasks: strides 2, 4, ... px. The bottleneck's is not one."""
        no_taps(taps, "convolutional encoder")
        return self.maps(images)[:-1]


def _stage(before: int, after: int, *, stride: int, padding: int, norm: bool) -> nn.Sequential:
    # The published code zeroes the convolutions' biases at every step; before a BatchNorm they have no effect.
    parts: list[nn.Module] = [nn.Conv2d(before, after, 4, stride, padding)]
    if norm:
        parts.append(nn.BatchNorm2d(after))
    for part in parts:
        begin_as_dcgan(part)
    return nn.Sequential(*parts, nn.LeakyReLU(0.2))
