"""What all targets share: the grid of predictions, the dataset's colours, and the way from classes to a map."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from mim_core.grid import Entries, Grid, resize, unpatchify

Px = PositiveInt


class Target(nn.Module):
    """A target of `entries` at each position of `grid`; `mean` and `std` are the dataset's, in units of [0, 1]."""

    borrows: str = ""
    """What `render` takes from the original image, in words for the picture; empty where nothing."""
    pixel_values: bool = False
    """Whether a prediction, put back on its grid, is a picture of the image's size in some colour space."""
    recovers: bool = True
    """Whether `render` shows the image itself, so that its error against the original means something."""
    mean: Tensor
    std: Tensor

    def __init__(self, grid: Grid, mean: tuple[float, ...], std: tuple[float, ...], entries: Entries) -> None:
        super().__init__()
        self.grid, self.entries = grid, entries
        self.shape = (grid.shape[0] * entries.side, grid.shape[1] * entries.side)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def colours(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Undo the normalisation: [0, 1] again, but for rounding."""
        return images * self.std + self.mean

    def cells(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        """Take the mean over the part of the image of each entry: one pixel an entry's part."""
        return resize(images, self.shape)

    def likeliest(self, prediction: Float[Tensor, "b n v"]) -> Int[Tensor, "b depth h w"]:
        """Give the class of the highest logit of each entry, laid out as a map."""
        classes = self.entries.logits(prediction).argmax(-2)
        return unpatchify(classes.flatten(2), self.grid.shape, self.entries.side)

    def picture(self, colours: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Show a map of colours at the image's size, every cell in one colour, within [0, 1]."""
        return resize(colours, (self.grid.height, self.grid.width)).clamp(0, 1)


def parts(grid: Grid, cell_px: int) -> int:
    """Give the cells across a position; raises ValueError where they do not divide it."""
    fits = [px for px in range(1, grid.patch_px + 1) if grid.patch_px % px == 0]
    if cell_px not in fits:
        raise ValueError(
            f"cell_px: found {cell_px}; it must divide the {grid.patch_px} px that a position of the encoder's output "
            f"covers; choose one of {fits}"
        )
    return grid.patch_px // cell_px
