"""Transforms on uint8 images, drawn from the sample's own generator."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from mim_core.spec import Range, Strict


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(f"found {list(value)}; a crop's share of the area lies above 0 and not above 1")
    return value


def _above_zero(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] <= 0:
        raise ValueError(f"found {list(value)}; a ratio of width to height lies above 0")
    return value


class Augment(Strict):
    """Random resized crop and horizontal flip, as the papers' pretraining uses them.

    `scale` is the crop's share of the area, `ratio` its width over height, `flip` a probability.
    """

    scale: Annotated[Range, AfterValidator(_share)] = (0.67, 1.0)
    ratio: Annotated[Range, AfterValidator(_above_zero)] = (3 / 4, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment one uint8 image [c, H, W]; the size stays."""
        return self.jointly(rng, image)[0]

    def jointly(self, rng: np.random.Generator, image: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """Augment one uint8 image [c, H, W], and what is annotated on it by the same crop and flip; sizes stay.

        `beside` holds torchvision's `tv_tensors`: masks are resized by nearest neighbour, boxes are cut at the edge.
        """
        height, width = image.shape[-2:]
        top, left, h, w = crop_box(rng, height, width, self.scale, self.ratio)
        parts = (image, *beside)
        if (h, w) != (height, width):
            parts = tuple(TF.resized_crop(one, top, left, h, w, [height, width], antialias=True) for one in parts)
        return tuple(map(TF.horizontal_flip, parts)) if rng.random() < self.flip else parts


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) as torchvision's RandomResizedCrop does: ten tries, then the centre."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 images [b, c, H, W] into floats of zero mean and unit deviation a channel."""
    # (x / 255 - mean) / std as one multiply and one add.
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32) * scale + shift
