"""Progressive upsampling (SETR-PUP), by which BEiT's paper reports ADE20K.

Source: Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers",
CVPR 2021, section 3.3 and its code; BEiT (Bao et al., ICLR 2022), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from pydantic import PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mim_core.grid import Level
from mim_core.tasks.segment.heads.layers import ConvNorm, resize, scoring


class ProgressiveUpsampling(nn.Module):
    """LayerNorm, then 3x3 convolutions of `hidden` channels in turns with doublings of the last map.

    There are as many of both as come from the map's stride to the image: four from a stride of 16 px. As in the code,
    classes are scored before the last doubling. No doubling goes beyond the image.
    """

    def __init__(self, levels: Sequence[Level], classes: int, *, hidden: PositiveInt = 256) -> None:
        super().__init__()
        width, stride = levels[-1].width, levels[-1].stride
        self.norm = LayerNorm2d(width, eps=1e-6)
        widths = [width, *[hidden] * max(1, math.ceil(math.log2(stride)))]
        self.convs = nn.ModuleList(ConvNorm(before, after) for before, after in pairwise(widths))
        self.score = scoring(hidden, classes)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        out: Tensor = self.norm(maps[-1])
        for at, conv in enumerate(self.convs):
            if at:
                out = resize(out, [min(2 * side, most) for side, most in zip(out.shape[-2:], size, strict=True)])
            out = conv(out)
        return self.score(out)  # type: ignore[no-any-return]
