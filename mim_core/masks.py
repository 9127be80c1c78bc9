"""Masks: which part of an image the encoder may not see.

`mask(rng, grid, **params) -> Bool[h, w]`, True = hidden, on the grid of the encoder's patches. A mask is a pure
function of its generator, and `generator(seed, epoch, index)` gives each sample its own: the same masks come out in any
process, with any number of loader workers, and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool
from pydantic import Field

Ratio = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Grid:
    """The patches of an image: `height` x `width` px in patches of `patch_px` px a side."""

    height: int
    width: int
    patch_px: int

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if side % self.patch_px:
                raise ValueError(
                    f"image {name}: found {side} px; it must be a multiple of the encoder's patch_px {self.patch_px}; "
                    f"try {side // self.patch_px * self.patch_px or self.patch_px}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.patch_px, self.width // self.patch_px

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]


def generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """Give the random generator of one sample in one epoch.

    Philox is counter-based, so its key is the address itself and nothing is drawn to make it. `stream` separates uses
    (0 masks, 1 augmentation, 2 order) so that changing one leaves the others' draws as they were.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed << 8 | stream, epoch << 40 | index], np.uint64)))


def random(
    rng: np.random.Generator, grid: Grid, *, ratio: Ratio = 0.6, unit_px: Annotated[int, Field(gt=0)] = 32
) -> Bool[np.ndarray, "h w"]:
    """Hide ceil(ratio * cells) cells of `unit_px` px, uniformly (SimMIM, section 3.2; its code rounds up).

    `ratio` is a share of the cells, so the share of hidden pixels is the next one that whole cells allow.
    """
    unit = unit_patches(grid, unit_px)
    rows, columns = grid.shape[0] // unit, grid.shape[1] // unit
    hidden = np.zeros(rows * columns, bool)
    # The lowest of equal-length noise, rather than a permutation: the same arithmetic runs in a batch on a device.
    hidden[np.argsort(rng.random(rows * columns))[: math.ceil(ratio * rows * columns)]] = True
    return hidden.reshape(rows, columns).repeat(unit, 0).repeat(unit, 1)


def unit_patches(grid: Grid, unit_px: int) -> int:
    """Give a mask unit's side in patches; raises ValueError where unit, patch and image do not divide."""
    fits = [u for u in range(grid.patch_px, min(grid.height, grid.width) + 1, grid.patch_px)
            if grid.height % u == 0 and grid.width % u == 0]  # fmt: skip
    if unit_px not in fits:
        raise ValueError(
            f"unit_px: found {unit_px}; it must be a multiple of the encoder's patch_px {grid.patch_px} and divide the "
            f"image's {grid.height} x {grid.width} px; choose one of {fits}"
        )
    return unit_px // grid.patch_px


MASKS = {"random": random}
