"""Targets that were fitted to data before: a palette's colours, a tokenizer's tokens."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mim_core.grid import Entries, Grid, patchify
from mim_core.targets.base import Px, Target, parts


class Fitted(Target):
    """A target with a frozen `tokenizer`, which no optimiser may move and which stays in evaluation mode."""

    def __init__(
        self, grid: Grid, mean: tuple[float, ...], std: tuple[float, ...], entries: Entries, tokenizer: Any
    ) -> None:
        super().__init__(grid, mean, std, entries)
        self.tokenizer: Any = tokenizer.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self


class Clusters(Fitted):
    """The nearest colour of a palette, a class for each pixel (iGPT, Chen et al., ICML 2020; SimMIM, section 3.4).

    `tokenizer` is a palette: `codes`, `colours` [codes, c] in [0, 1], and `nearest(colours [..., c])`. `fitted` names
    it in the params. `cell_px` above 1 averages the image over cells of so many px first. `render` shows the likeliest
    class's colour. Raises ValueError where cells do not divide a position, or the palette has other channels.
    """

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        tokenizer: Any,
        *,
        fitted: str,
        cell_px: Px = 1,
    ) -> None:
        super().__init__(grid, mean, std, Entries(1, parts(grid, cell_px), tokenizer.codes), tokenizer)
        if (channels := tokenizer.colours.shape[1]) != len(mean):
            raise ValueError(
                f"fitted: found '{fitted}' of {channels} channels; the images have {len(mean)}; fit a palette to them"
            )

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n k"]:
        colours = self.cells(self.colours(images)).movedim(1, -1)
        return patchify(self.tokenizer.nearest(colours)[:, None], self.entries.side)

    @torch.no_grad()
    def render(self, prediction: Float[Tensor, "b n v"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all positions."""
        return self.picture(self.tokenizer.colours[self.likeliest(prediction)[:, 0]].movedim(-1, 1))


class Tokens(Fitted):
    """The visual tokens of an image tokenizer, `side` x `side` at each position (BEiT, section 2.1: one).

    `tokenizer`: `stride` px a token, `codes`, `tokens(images)` and `decode(tokens)`, with images in [0, 1]. `fitted`
    names it in the params. Where its stride is not that of the tokens wanted, it reads a resized view of the same image
    (BEiT, section 2.1: 112 px beside the patches' 224; bicubic here, where the published code has Lanczos). `render`
    shows what the tokenizer makes of the likeliest tokens.
    """

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        tokenizer: Any,
        *,
        fitted: str,
        side: Px = 1,
    ) -> None:
        super().__init__(grid, mean, std, Entries(1, side, tokenizer.codes), tokenizer)
        self.view = [cells * tokenizer.stride for cells in self.shape]

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n k"]:
        tokens: Tensor = self.tokenizer.tokens(_resized(self.colours(images), self.view))
        return patchify(tokens[:, None], self.entries.side)

    @torch.no_grad()
    def render(self, prediction: Float[Tensor, "b n v"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all positions."""
        return _resized(self.tokenizer.decode(self.likeliest(prediction)[:, 0]), [self.grid.height, self.grid.width])


def _resized(images: Float[Tensor, "b c H W"], size: list[int]) -> Float[Tensor, "b c H2 W2"]:
    if list(images.shape[-2:]) != size:
        images = TF.resize(images, size, InterpolationMode.BICUBIC, antialias=True)
    # Bicubic weights overshoot at edges.
    return images.clamp(0, 1)
