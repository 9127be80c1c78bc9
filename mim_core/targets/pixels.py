"""Pixels as the target: raw, normalised by patch or by window, or at a lower resolution."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mim_core.grid import Entries, Grid, patchify, unpatchify
from mim_core.targets.base import Px, Target, parts


class Pixels(Target):
    """The pixels themselves, in the encoder's normalised colours (SimMIM, section 3.4).

    `normalise: patch` gives each patch zero mean and unit variance first (MAE, section 3: better features).
    `normalise: window` does so to each pixel and channel by the mean and deviation of the square of `window_px` (odd)
    px around it, as far as it lies in the image (the normalised target that SimMIM's authors added to Swin's code).
    Such predictions hold no brightness, and `render` borrows the original's mean and deviation: `borrows` says so.

    `cell_px` above 1 averages the image over cells of so many px first (SimMIM, section 4.1: target resolution).
    Raises ValueError where cells do not divide a position, or do not go with the normalisation.
    """

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        normalise: Literal["none", "patch", "window"] = "none",
        window_px: Annotated[int, Field(ge=3)] = 47,
        cell_px: Px = 1,
    ) -> None:
        super().__init__(grid, mean, std, Entries(len(mean), parts(grid, cell_px)))
        if window_px % 2 == 0:
            raise ValueError(
                f"window_px: found {window_px}; it must be odd, to have a pixel in its middle; try {window_px + 1}"
            )
        if normalise == "window" and cell_px > 1:
            raise ValueError(f"cell_px: found {cell_px}; normalise 'window' works on whole pixels; choose 1 or 'patch'")
        if normalise == "patch" and self.entries.values < 2:
            raise ValueError(
                f"cell_px: found {cell_px}; normalise 'patch' needs two values in a patch or more; choose a smaller "
                "cell or normalise 'none'"
            )
        self.normalise, self.window_px = normalise, window_px
        self.pixel_values = cell_px == 1
        if normalise != "none":
            self.borrows = f"{normalise} mean and deviation from the original"

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n k"]:
        cells = self.cells(images)
        patches = patchify(cells, self.entries.side)
        if self.normalise == "none":
            return patches
        mean, deviation = self._moments(cells)
        return (patches - mean) / deviation

    def render(self, prediction: Float[Tensor, "b n k"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all positions; `images` are the normalised originals."""
        if self.normalise != "none":
            mean, deviation = self._moments(self.cells(images))
            prediction = prediction * deviation + mean
        return self.picture(self.colours(unpatchify(prediction, self.grid.shape, self.entries.side)))

    def _moments(self, cells: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Mean and deviation that each value is normalised by, laid out so as to go with patches [b, n, k]."""
        # Unbiased variance and 1e-6 inside the root, as in the published code of both.
        if self.normalise == "window":
            mean, variance = window_moments(cells, self.window_px)
            mean, variance = patchify(mean, self.entries.side), patchify(variance, self.entries.side)
        else:
            patches = patchify(cells, self.entries.side)
            mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()


def window_moments(images: Float[Tensor, "b c H W"], window_px: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel in the window around each pixel, cut at the image's border."""

    def mean(maps: Tensor) -> Tensor:
        # What of the window lies in the image is a rectangle, so a column's mean and then a row's is the mean.
        reach = window_px // 2
        down = F.avg_pool2d(maps, (window_px, 1), 1, (reach, 0), count_include_pad=False)
        return F.avg_pool2d(down, (1, window_px), 1, (0, reach), count_include_pad=False)

    reach = window_px // 2
    sides = []
    for length in images.shape[-2:]:
        at = torch.arange(length, device=images.device)
        sides.append((at + reach).clamp(max=length - 1) - (at - reach).clamp(min=0) + 1)
    count = (sides[0][:, None] * sides[1]).to(images.dtype)
    centre = mean(images)
    # Rounding can leave a flat window with a variance just below zero.
    variance = (mean(images.square()) - centre.square()).clamp(min=0)
    return centre, variance * count / (count - 1)
