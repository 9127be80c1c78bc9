"""Fit images of any size to the one size of a pack, and their boxes and masks with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

Fit = Literal["cover", "contain", "stretch"]
"""`cover`: scaled until it fills the size, its middle kept. `contain`: scaled until it is inside, at the top left, and
black beyond; masks there are 0, or 255 (not judged) where they are semantic. `stretch`: each side scaled for itself."""
LEAST_SHARE = 0.25
"""A box is left out, and counted, where less than this share of its area remains in the image."""


@dataclass(frozen=True)
class Placing:
    """Where an image lies in one of `size`: its part `crop` (left, top, right, bottom in px) is scaled to `inner`.

    `inner` and `size` are (height, width) in px; `inner` begins at the top left.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    crop: tuple[float, float, float, float]

    def image(self, planes: UInt8[np.ndarray, "c h w"]) -> UInt8[np.ndarray, "c H W"]:
        """Resample bicubically, each channel for itself."""
        # Three channels at once are quicker, and give the same bytes.
        parts = [planes.transpose(1, 2, 0)] if len(planes) == 3 else list(planes)
        fitted = [np.asarray(self._resized(Image.fromarray(np.ascontiguousarray(part)))) for part in parts]
        inner = fitted[0].transpose(2, 0, 1) if len(planes) == 3 else np.stack(fitted)
        if self.inner == self.size:
            return np.ascontiguousarray(inner)
        whole = np.zeros((len(planes), *self.size), np.uint8)
        whole[:, : self.inner[0], : self.inner[1]] = inner
        return whole

    def _resized(self, image: Image.Image) -> Image.Image:
        return image.resize((self.inner[1], self.inner[0]), Image.Resampling.BICUBIC, box=self.crop)

    def mask(self, values: np.ndarray, beyond: int) -> np.ndarray:
        """Take each pixel's value [h, w] from where its centre lies; `beyond` fills what the image does not."""
        left, top, right, bottom = self.crop
        rows = top + (np.arange(self.inner[0]) + 0.5) * ((bottom - top) / self.inner[0])
        columns = left + (np.arange(self.inner[1]) + 0.5) * ((right - left) / self.inner[1])
        whole = np.full(self.size, beyond, values.dtype)
        whole[: self.inner[0], : self.inner[1]] = values[rows.astype(int)][:, columns.astype(int)]
        return whole

    def boxes(self, boxes: np.ndarray) -> tuple[Float32[np.ndarray, "m 5"], Bool[np.ndarray, " n"]]:
        """Move boxes [n, 5] along and clip them; gives those of which enough remains, and which ones they are."""
        left, top, right, bottom = self.crop
        height, width = self.inner
        across, down = width / (right - left), height / (bottom - top)
        moved = (boxes[:, :4].astype(np.float64) - [left, top, left, top]) * [across, down, across, down]
        clipped = moved.clip(0, [width, height, width, height])
        kept = _areas(clipped) >= LEAST_SHARE * _areas(moved)
        kept &= _areas(clipped) > 0
        fitted = np.concatenate([clipped[kept], boxes[kept, 4:]], 1)
        return fitted.astype(np.float32), kept


def place(frame: tuple[int, int], size: tuple[int, int], fit: Fit) -> Placing:
    """Place an image of `frame` in one of `size`, both (height, width) in px."""
    height, width = frame
    whole = (0.0, 0.0, float(width), float(height))
    if fit == "stretch":
        return Placing(size, size, whole)
    if fit == "contain":
        scale = min(size[0] / height, size[1] / width)
        return Placing(size, (max(1, round(height * scale)), max(1, round(width * scale))), whole)
    scale = max(size[0] / height, size[1] / width)
    kept = (min(size[0] / scale, height), min(size[1] / scale, width))
    left, top = (width - kept[1]) / 2, (height - kept[0]) / 2
    return Placing(size, size, (left, top, left + kept[1], top + kept[0]))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
