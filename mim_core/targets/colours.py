"""Quantised colours as the target: classes on the un-normalised [0, 1] scale, in bins of equal width."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mim_core.grid import Entries, Grid, patchify
from mim_core.targets.base import Px, Target, parts

Bits = Annotated[int, Field(ge=1, le=8)]
MOST_CLASSES = 2**16


class ColourGrid(Target):
    """The mean colour of each of `side` x `side` parts of a position, all channels in one class.

    ViT, appendix B.1.2: one class of the patch's mean colour in 3 bits a channel (`mean_colour`), or 4 x 4 of them. The
    class is the sum of bin x (2^bits)^channel: red + 8 green + 64 blue at 3 bits. `render` shows the centre of the
    likeliest class's bin. Raises ValueError where parts do not divide a position, or classes are too many.
    """

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        side: Px = 4,
        bits: Bits = 3,
    ) -> None:
        fits = [number for number in range(1, grid.patch_px + 1) if grid.patch_px % number == 0]
        if side not in fits:
            raise ValueError(
                f"side: found {side}; it must divide the {grid.patch_px} px that a position of the encoder's output "
                f"covers; choose one of {fits}"
            )
        classes = 2 ** (bits * len(mean))
        if classes > MOST_CLASSES:
            raise ValueError(
                f"bits: found {bits} for each of {len(mean)} channels; that makes {classes} classes, and a head can "
                f"have {MOST_CLASSES}; choose {max(1, 16 // len(mean))} or fewer"
            )
        super().__init__(grid, mean, std, Entries(1, side, classes))
        self.bins = 2**bits

    def forward(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n k"]:
        bins = quantise(self.cells(self.colours(images)), self.bins)
        place = self.bins ** torch.arange(bins.shape[1], device=bins.device)
        return patchify((bins * place[:, None, None]).sum(1, keepdim=True), self.entries.side)

    def render(self, prediction: Float[Tensor, "b n v"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all positions."""
        place = self.bins ** torch.arange(images.shape[1], device=images.device)
        bins = self.likeliest(prediction) // place[:, None, None] % self.bins
        return self.picture((bins + 0.5) / self.bins)


def mean_colour(grid: Grid, mean: tuple[float, ...], std: tuple[float, ...], *, bits: Bits = 3) -> ColourGrid:
    """The mean colour of a position as one class (ViT, appendix B.1.2); see `ColourGrid`."""
    return ColourGrid(grid, mean, std, side=1, bits=bits)


class ColourBins(Target):
    """Each channel of each pixel in one of `bins` bins, each with classes of its own (SimMIM, section 3.4: 8 or 256).

    `cell_px` above 1 averages the image over cells of so many px first. `render` shows the centres of the likeliest
    bins. Raises ValueError where cells do not divide a position.
    """

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        bins: Annotated[int, Field(ge=2, le=256)] = 8,
        cell_px: Px = 1,
    ) -> None:
        super().__init__(grid, mean, std, Entries(len(mean), parts(grid, cell_px), bins))

    def forward(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n k"]:
        return patchify(quantise(self.cells(self.colours(images)), self.entries.classes), self.entries.side)

    def render(self, prediction: Float[Tensor, "b n v"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all positions."""
        return self.picture((self.likeliest(prediction) + 0.5) / self.entries.classes)


def quantise(colours: Float[Tensor, "*any"], bins: int) -> Int[Tensor, "*any"]:
    """Give the bin of each value among `bins` of equal width on [0, 1]; values beyond fall in the outer ones."""
    return (colours * bins).long().clamp(0, bins - 1)
