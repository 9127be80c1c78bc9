"""Fully convolutional networks (FCN).

Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from mim_core.grid import Level
from mim_core.spec import Counts
from mim_core.tasks.segment.heads.layers import ConvNorm, Share, convolution, resize, scoring


class FCN(nn.Module):
    """Convolutions on the last map, scores of each class, and scores of finer maps added on the way up.

    `kernels`: one convolution of `hidden` channels for each, before the scores. `norm`: with "batch" each is followed
    by BatchNorm and ReLU, and `dropout` leaves out whole channels before the scores (mmsegmentation's FCNHead); with
    "none" each is followed by ReLU and dropout of single values, as fc6 and fc7 are in the paper. `skips`: how many
    finer maps are scored too, 2, 1 and 0 for the paper's FCN-8s, 16s and 32s; left out, 2 or as many as there are (none
    in a plain ViT, whose maps are all equally fine).

    The Context Encoder's protocol is FCN-AlexNet, a net of stride 32: hidden 4096, kernels [6, 1], norm none, dropout
    0.5, skips 0. The scores of finer maps start at zero, as in section 4.2. Otherwise than in the paper, resizing is
    bilinear throughout and not learned, maps are padded at the convolution and not at the image's edge, and new layers
    start as mmsegmentation's (the paper takes fc6 and fc7 from a classifier, and starts all scores at zero).
    """

    def __init__(
        self,
        levels: Sequence[Level],
        classes: int,
        *,
        hidden: PositiveInt = 256,
        kernels: Counts = (3,),
        norm: Literal["batch", "none"] = "batch",
        dropout: Share = 0.1,
        skips: NonNegativeInt | None = None,
    ) -> None:
        """Raises ValueError where there are fewer finer maps than `skips`."""
        super().__init__()
        finer = [at for at, level in enumerate(levels) if level.stride < levels[-1].stride]
        if skips is not None and skips > len(finer):
            raise ValueError(
                f"head.skips: found {skips}; {len(finer)} of the encoder's maps are finer than its last; choose at "
                f"most {len(finer)}, or leave it out"
            )
        self.skipped = finer[::-1][: 2 if skips is None else skips]
        widths = [levels[-1].width, *[hidden] * len(kernels)]
        layers: list[nn.Module] = []
        for kernel, (before, after) in zip(kernels, pairwise(widths), strict=True):
            if norm == "batch":
                layers.append(ConvNorm(before, after, kernel))
            else:
                layers += [*convolution(before, after, kernel, bias=True), nn.ReLU(), nn.Dropout(dropout)]
        if norm == "batch":
            layers.append(nn.Dropout2d(dropout))
        self.layers = nn.Sequential(*layers)
        self.score = scoring(widths[-1], classes)
        self.skip_scores = nn.ModuleList(scoring(levels[at].width, classes) for at in self.skipped)
        for score in self.skip_scores:
            nn.init.zeros_(score.weight)  # type: ignore[arg-type]

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        out: Tensor = self.score(self.layers(maps[-1]))
        for at, score in zip(self.skipped, self.skip_scores, strict=True):
            finer = score(maps[at])
            out = resize(out, finer.shape[-2:]) + finer
        return out
