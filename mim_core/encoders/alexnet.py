"""AlexNet's convolutions behind the encoder contract, the Context Encoder's network for learning features.

Sources: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012, section 3.5;
Pathak et al., "Context Encoders: Feature Learning by Inpainting", CVPR 2016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mim_core.encoders.conv import ConvNet
from mim_core.grid import Level, no_taps


class AlexNet(ConvNet):
    """conv1 to pool5: 227 px come to 6 x 6 x 256.

    Widths are the published 96, 256, 384, 384, 256, or in proportion to `base`. In place of two groups the convolutions
    see all channels, there is no local response normalisation, and weights begin as He et al. (ICCV 2015) have them:
    the published N(0, 0.01) shrinks the signal at each layer. `batch_norm` follows each convolution with a BatchNorm.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        base: Annotated[int, Field(ge=3, multiple_of=3)] = 96,
        batch_norm: bool = False,
    ) -> None:
        """Build for images of `size` (height, width) px. Raises ValueError below 67 px, where pool5 gets too little."""
        for name, side in zip(("height", "width"), size, strict=True):
            if side < 67:
                raise ValueError(f"image {name}: found {side} px; AlexNet needs 67 or more; use larger images or conv")
        height, width = (_features(side) for side in size)
        wide, wider = base * 8 // 3, base * 4
        super().__init__(size, channels, stride=32, shape=(height, width), width=wide, depth=5)
        self.stages = nn.ModuleList(
            [
                _stage(channels, base, 11, stride=4, padding=0, batch_norm=batch_norm),
                nn.Sequential(_pool(), *_stage(base, wide, 5, padding=2, batch_norm=batch_norm)),
                nn.Sequential(_pool(), *_stage(wide, wider, 3, padding=1, batch_norm=batch_norm)),
                _stage(wider, wider, 3, padding=1, batch_norm=batch_norm),
                _stage(wider, wide, 3, padding=1, batch_norm=batch_norm),
            ]
        )
        self.pool = _pool()

    def features(self, image: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Give pool5's map."""
        out: Tensor = self.pool(super().features(image))
        return out

    def levels(self, taps: Sequence[int] | None = None) -> list[Level]:
        """Say what `pyramid` gives; strides are nominal, as maps do not tile the image."""
        no_taps(taps, "convolutional encoder")
        widths = [self.block_widths[at] for at in (0, 1, 4, 4)]
        return [Level(width, stride) for width, stride in zip(widths, (4, 8, 16, 32), strict=True)]

    def pyramid(
        self, images: Float[Tensor, "b c H W"], taps: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b d h w"]]:
        """Give the maps of conv1, conv2, conv5 and pool5 for dense tasks: nominal strides 4, 8, 16, 32 px."""
        no_taps(taps, "convolutional encoder")
        maps = self.maps(images)
        return [maps[0], maps[1], maps[4], self.pool(maps[4])]


def _features(side: int) -> int:
    """Give the side of pool5's map."""
    side = (side - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, 2)


def _stage(before: int, after: int, kernel: int, *, padding: int, batch_norm: bool, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    norm = [nn.BatchNorm2d(after)] if batch_norm else []
    return nn.Sequential(conv, *norm, nn.ReLU())
