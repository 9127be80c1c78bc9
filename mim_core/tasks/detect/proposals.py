"""Proposals: where objects may be. A source is a module `(images, maps, targets) -> (boxes an image, losses)`.

Fast R-CNN took selective search's windows, which is an algorithm of its own that no dependency brings. In its place
stand Faster R-CNN's region proposal network, which is trained along, and a fixed grid of windows that looks at nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mim_core.spec import Depth, OneOf, Piece, Table
from mim_core.tasks.detect.necks import Maps, Numbers

Share = Annotated[float, Field(gt=0, lt=1)]
PUBLISHED_PX = 800
"""Shorter side of the images for which the published counts were chosen."""
STEP, SHIFT = 1.6, 0.25
"""Ratio of a window's side to the next smaller one, and distance between windows as a share of their side: whatever the
box, some window overlaps with it by 0.57 or more (found by trying)."""


def fitting(published: int, least: int, size: tuple[int, int]) -> int:
    """Give a count in proportion to the images' shorter side; from 800 px on it is the published one."""
    return max(least, round(published * min(1.0, min(size) / PUBLISHED_PX)))


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors, with strides that are told and not guessed from the maps' sizes, and always in fp32."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        shapes = [one.shape[-2:] for one in feature_maps]
        anchors = torch.cat(self.grid_anchors(shapes, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


def rpn(
    neck: Any,
    size: tuple[int, int],
    *,
    anchors_px: Numbers | None = None,
    ratios: Numbers = (0.5, 1.0, 2.0),
    convs: Depth = 1,
    before: PositiveInt | None = None,
    after: PositiveInt | None = None,
    sampled: PositiveInt | None = None,
    overlap: Share = 0.7,
    positive: Share = 0.7,
    negative: Share = 0.3,
) -> nn.Module:
    """Region proposal network (Ren et al., "Faster R-CNN", NIPS 2015), torchvision's, trained jointly with the rest.

    `anchors_px`: sides of the square anchors, ascending and equally many for each of the neck's maps. Left out, they
    double from 1/25 of the shorter side (8 px at least) to no more than that side, with as many more in between as the
    maps need: 32, 64 ... 512 px on the five maps of a pyramid at 800 px, as published; 8, 16, 32 px on three at 32 px.
    `ratios`: height over width. `convs`: 3 x 3 convolutions of the head (ViTDet: 2). `before` and `after`: boxes that
    are kept a map before, and an image after, suppression of those that `overlap` a better one. `sampled`: anchors an
    image that the loss looks at, which count as objects from an overlap of `positive` and as none below `negative`.
    Left out, counts are the published 2000, 1000 and 256 at 800 px, and in proportion on smaller images.
    Raises ValueError where anchors cannot be shared out over the maps.
    """
    maps = len(neck.strides)
    sides = list(anchors_px) if anchors_px else _anchors(size, maps)
    if len(sides) % maps:
        raise ValueError(
            f"detector.proposals.anchors_px: found {len(sides)} sides; the neck has {maps} maps, and each must get "
            "equally many; give a multiple of that"
        )
    each = len(sides) // maps
    sizes = [sorted(sides)[at * each : (at + 1) * each] for at in range(maps)]
    kept, drawn = fitting(1000, 64, size), fitting(256, 64, size)
    counts = before or 2 * kept, after or kept
    return RegionProposalNetwork(  # type: ignore[no-any-return]
        Anchors(sizes, ratios, neck.strides),
        RPNHead(neck.width, each * len(ratios), convs),
        positive,
        negative,
        sampled or drawn,
        0.5,
        *(dict.fromkeys(("training", "testing"), count) for count in counts),
        overlap,
    )


def _anchors(size: tuple[int, int], maps: int) -> list[float]:
    shorter = min(size)
    least = min(shorter, max(8.0, shorter / 25))
    octaves = math.floor(math.log2(shorter / least) + 1e-9)
    count = maps * math.ceil((octaves + 1) / maps)
    return [least * 2 ** (octaves * at / max(1, count - 1)) for at in range(count)]


class Windows(nn.Module):
    """A fixed dense grid of windows, of many sizes and shapes, that follows from the images' size alone.

    Widths and heights go down from the image's own by factors of 1.6, and windows of a size lie a quarter of their side
    apart, so that every box in the image overlaps with one by more than half, down to sides of `least` (a share of the
    shorter side) and for sides that differ by a factor of up to `ratio`. It learns nothing.
    """

    windows: Tensor

    def __init__(
        self,
        neck: Any,
        size: tuple[int, int],
        *,
        least: Share = 0.25,
        ratio: Annotated[float, Field(ge=1, le=8)] = 2.0,
    ) -> None:
        super().__init__()
        windows = torch.from_numpy(grid_windows(size, least, ratio))
        self.register_buffer("windows", windows, persistent=False)

    def forward(
        self, images: ImageList, maps: Maps, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [self.windows] * len(images.image_sizes), {}


def grid_windows(size: tuple[int, int], least: float, ratio: float) -> Float[np.ndarray, "n 4"]:
    """Give the windows (left, top, right, bottom) in px of images of `size` (height, width); see `Windows`."""
    heights, widths = (_sides(side, least * min(size)) for side in size)
    windows = []
    for height in heights:
        for width in widths:
            if max(height / width, width / height) <= ratio * STEP * (1 + 1e-9):
                tops, lefts = _starts(size[0], height), _starts(size[1], width)
                top, left = (one.ravel() for one in np.meshgrid(tops, lefts, indexing="ij"))
                windows.append(np.stack([left, top, left + width, top + height], 1))
    return np.concatenate(windows).astype(np.float32)


def _sides(whole: int, least: float) -> list[float]:
    """Sides of windows from the whole side down to the first that is near enough to `least`."""
    sides = [float(whole)]
    while sides[-1] > least * math.sqrt(STEP):
        sides.append(sides[-1] / STEP)
    return sides


def _starts(whole: int, side: float) -> np.ndarray:
    return np.linspace(0, whole - side, math.ceil((whole - side) / (SHIFT * side) - 1e-9) + 1)


PROPOSALS: Table = {"rpn": rpn, "grid": Windows}
LearnedPiece = Annotated[Piece, OneOf({"rpn": rpn}), Field(validate_default=True)]
AnyPiece = Annotated[Piece, OneOf(PROPOSALS), Field(validate_default=True)]
