"""Transforms on uint8 images, drawn from the sample's own generator."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mim_core.spec import Range, Strict

CACHED = 1 << 16
"""Values that `normalise` works on at a time on a CPU."""


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(f"found {list(value)}; a crop's share of the area lies above 0 and not above 1")
    return value


def _above_zero(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] <= 0:
        raise ValueError(f"found {list(value)}; a ratio of width to height lies above 0")
    return value


class RandAugment(Strict):
    """RandAugment (Cubuk et al., 2020) in timm's form, by default the papers' `rand-m9-mstd0.5-inc1`.

    Each of `operations` draws from timm's 15, is left out half of the time, and has a magnitude from a normal round
    `magnitude` of `deviation`, in tenths of its range; in the `increasing` set more is always stronger.
    """

    magnitude: Annotated[int, Field(ge=0, le=10)] = 9
    deviation: Annotated[float, Field(ge=0, le=10)] = 0.5
    operations: Annotated[int, Field(gt=0, le=100)] = 2
    increasing: bool = True

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment one uint8 image [c, H, W] of 1 or 3 channels."""
        with seeded(rng):
            changed: Tensor = TF.pil_to_tensor(_rand_augment(self, min(image.shape[-2:]))(TF.to_pil_image(image)))
            return changed


@functools.cache
def _rand_augment(chosen: RandAugment, side: int) -> Any:
    config = f"rand-m{chosen.magnitude}-n{chosen.operations}-mstd{chosen.deviation:g}-inc{int(chosen.increasing)}"
    # timm's own training moves images by up to 0.45 of the shorter side, in px.
    return rand_augment_transform(config, {"translate_const": int(0.45 * side)})


Probability = Annotated[float, Field(ge=0, le=1)]
Crop = tuple[int, int, int, int, bool]
"""A crop's top, left, height and width in px, and whether it is flipped."""


class Augment(Strict):
    """What is done to a training image: the crop and flip of the papers' pretraining, and their fine-tuning's more.

    `scale` is the crop's share of the area, `ratio` its width over height, `flip` a probability. Then, where they are
    set: `jitter`, by up to which share brightness, contrast and saturation change (timm's recipes leave it out beside
    `randaugment`); `randaugment`, `{}` for the papers'; `erase`, the probability that a rectangle of 2 to 33 % becomes
    noise, of N(128, 64) on each value (in the papers' code N(0, 1) after normalisation). All is drawn from the sample's
    generator.
    """

    scale: Annotated[Range, AfterValidator(_share)] = (0.67, 1.0)
    ratio: Annotated[Range, AfterValidator(_above_zero)] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    randaugment: RandAugment | None = None
    erase: Probability = 0.0

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment one uint8 image [c, H, W]; the size stays."""
        return self.jointly(rng, image)[0]

    def jointly(self, rng: np.random.Generator, image: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """Augment one uint8 image [c, H, W], and what is annotated on it by the same crop and flip; sizes stay.

        `beside` holds torchvision's `tv_tensors`: masks are resized by nearest neighbour, boxes are cut at the edge.
        Raises ValueError where `randaugment` or `erase` is set beside them, and where colours are to be changed of an
        image that is neither grey nor RGB.
        """
        fixed = [name for name in ("randaugment", "erase") if getattr(self, name)]
        if beside and fixed:
            raise ValueError(
                f"augment.{fixed[0]}: found it set; masks and boxes cannot follow it; delete it (jitter may stay)"
            )
        image, *moved = self._placed(rng, image, *beside)
        return self._changed(rng, image), *moved

    def _changed(self, rng: np.random.Generator, image: Tensor) -> Tensor:
        """Change what an image shows; nothing is drawn for what is off."""
        if (self.jitter or self.randaugment) and len(image) not in (1, 3):
            name = "jitter" if self.jitter else "randaugment"
            raise ValueError(
                f"augment.{name}: found images of {len(image)} channels; it changes grey and RGB images only; delete it"
            )
        if self.jitter:
            with seeded(rng):
                image = v2.ColorJitter(self.jitter, self.jitter, self.jitter)(image)
        if self.randaugment:
            image = self.randaugment(image, rng)
        if self.erase and rng.random() < self.erase:
            with seeded(rng):
                image = _erased(image)
        return image

    def _placed(self, rng: np.random.Generator, image: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """Crop and flip."""
        height, width = image.shape[-2:]
        crop = top, left, h, w, flipped = self.placing(rng, height, width)
        if (h, w) != (height, width):
            beside = tuple(TF.resized_crop(one, top, left, h, w, [height, width]) for one in beside)
        return placed(image, crop), *(map(TF.horizontal_flip, beside) if flipped else beside)

    def placing(self, rng: np.random.Generator, height: int, width: int) -> Crop:
        """Draw what is done to an image of so many px."""
        box = crop_box(rng, height, width, self.scale, self.ratio)
        return *box, bool(rng.random() < self.flip)

    @property
    def only_places(self) -> bool:
        """Whether nothing but crop and flip is set: what `place` does to a whole batch."""
        return not (self.jitter or self.randaugment or self.erase)


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Have what draws from the global generators of Python, numpy and torch (CPU) draw what `rng` says.

    They are left as they were.
    """
    seed = int(rng.integers(2**32))
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _erased(image: Tensor) -> Tensor:
    """Put noise in a rectangle that torchvision draws; where none fits, nothing changes."""
    found = v2.RandomErasing(value="random").make_params([image])
    if found["v"] is None:
        return image
    noise = (128 + 64 * found["v"]).round().clamp(0, 255).to(torch.uint8)
    erased: Tensor = TF.erase(image, found["i"], found["j"], found["h"], found["w"], noise)
    return erased


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) as torchvision's RandomResizedCrop does: ten tries, then the centre."""
    for _ in range(10):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw what `rng.uniform` does, which looks at what it is given for longer."""
    return low + (high - low) * rng.random()


def placed(image: Tensor, crop: Crop) -> Tensor:
    """Crop, resize and flip one uint8 image [c, H, W]; the size stays.

    To the byte what torchvision's functions do, which take as long to come to it as the resize itself does.
    """
    (height, width), (top, left, h, w, flipped) = image.shape[-2:], crop
    if (h, w) != (height, width):
        part = image.narrow(1, top, h).narrow(2, left, w).unsqueeze(0)
        image = torch.ops.aten._upsample_bilinear2d_aa.default(part, [height, width], False).squeeze(0)
    return image.flip(-1) if flipped else image


def place(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop, resize and flip a batch of uint8 images [b, c, H, W] at once; gives floats of 0 to 255 of the same size.

    `boxes` int64 [b, 5] on the same device: `Augment.placing`'s. The resize is the bilinear one with antialiasing of
    the images one by one, without their rounding: as it goes row by row and column by column, it is two products of
    matrices, for which a GPU need not be told the sizes.
    """
    top, left, height, width, flipped = boxes.unbind(1)
    rows = _resizing(top, height, images.shape[-2])
    columns = _resizing(left, width, images.shape[-1])
    columns = torch.where(flipped[:, None, None] > 0, columns.flip(1), columns)
    return rows[:, None] @ images.to(torch.float32) @ columns[:, None].transpose(-2, -1)


def _resizing(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Weights [b, side, side] of each pixel of a line in those of a part of it, resized to the whole."""
    scale = (length.to(torch.float32) / side)[:, None, None]
    at = torch.arange(side, device=start.device)
    source = at - start[:, None, None]
    away = (source + 0.5 - scale * (at[:, None] + 0.5)) / scale.clamp(min=1)
    weights = (1 - away.abs()).clamp(min=0) * ((source >= 0) & (source < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn images [b, c, H, W] of 0 to 255 into floats of zero mean and unit deviation a channel."""
    scale, shift = _affine(tuple(mean), tuple(std), images.device)
    if images.device.type != "cpu":
        return images.to(torch.float32) * scale + shift
    # In parts that stay in the cache, in place: passes over a whole batch cost several times as much.
    out = torch.empty(images.shape)
    each = max(1, CACHED // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(images), each):
        out[start : start + each].copy_(images[start : start + each]).mul_(scale).add_(shift)
    return out


@functools.cache
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as one multiply and one add; made once, as a GPU waits for each copy of numbers to it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
