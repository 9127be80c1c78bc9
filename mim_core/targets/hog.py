"""Histograms of oriented gradients as the target (MaskFeat, section 3.2)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mim_core.grid import Entries, Grid, patchify, resize, unpatchify
from mim_core.targets.base import Px, Target, parts


class Hog(Target):
    """For each channel and cell of `cell_px` px, how strong the gradients of each of `bins` orientations are.

    Gradients of the normalised image by 3 x 3 Sobel filters over a border of mirrored pixels; each votes with its
    magnitude for the bin of its orientation, opposite ones for the same; a cell's bins are divided by their L2 norm.
    `gaussian_px` weighs the votes by a Gaussian window of so many px (deviation half of that), tiled over the image:
    none in the authors' image models, 16 in MMSelfSup's. Raises ValueError where cells do not divide a position or
    windows the image.
    """

    borrows = "edge strength from the original"
    recovers = False
    strokes: Tensor
    window: Tensor

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        bins: Annotated[int, Field(ge=2)] = 9,
        cell_px: Px = 8,
        gaussian_px: Px | None = None,
    ) -> None:
        super().__init__(grid, mean, std, Entries(bins * len(mean), parts(grid, cell_px)))
        self.bins = bins
        window = torch.ones(1, 1)
        if gaussian_px:
            if grid.height % gaussian_px or grid.width % gaussian_px:
                fits = [px for px in range(1, math.gcd(grid.height, grid.width) + 1)
                        if math.gcd(grid.height, grid.width) % px == 0]  # fmt: skip
                raise ValueError(
                    f"gaussian_px: found {gaussian_px}; it must divide the image's {grid.height} x {grid.width} px; "
                    f"choose one of {fits}"
                )
            window = gaussian(gaussian_px).tile(grid.height // gaussian_px, grid.width // gaussian_px)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("strokes", strokes(bins, cell_px), persistent=False)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n k"]:
        cells = F.normalize(self._histograms(images), dim=2).flatten(1, 2)
        return patchify(cells, self.entries.side)

    def render(self, prediction: Float[Tensor, "b n k"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Draw each cell's edges: a stroke an orientation, as bright as its share of the cell's energy.

        Strokes run along the edge, which is across the gradient, and channels are summed: a grey picture in [0, 1]. A
        histogram of norm 1 does not tell an edge from faint noise, so each cell has the strength of the original's.
        """
        cells = unpatchify(prediction, self.grid.shape, self.entries.side)
        share = cells.reshape(len(images), -1, self.bins, *self.shape).clamp(min=0).square()
        strength = torch.linalg.vector_norm(self._histograms(images), dim=2, keepdim=True)
        strength = strength / strength.sum(1, keepdim=True).amax((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
        # The root, as on the scale of the eye: the faint edges of an image show beside its strongest.
        bright = (share * strength).sum(1).sqrt()
        drawn = F.conv_transpose2d(bright, self.strokes, stride=self.strokes.shape[-1])
        return drawn.clamp(0, 1).expand_as(images)

    def _histograms(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c bins h w"]:
        """Votes for each orientation, the mean over each cell (not HOG's sum: the norm takes the difference away)."""
        # Slices rather than convolutions, which some devices compute in lower precision: votes would change bins.
        mirrored = F.pad(images, (1, 1, 1, 1), mode="reflect")
        rows = mirrored[..., :-2, :] + 2 * mirrored[..., 1:-1, :] + mirrored[..., 2:, :]
        columns = mirrored[..., :-2] + 2 * mirrored[..., 1:-1] + mirrored[..., 2:]
        across, down = rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]
        votes = torch.hypot(across, down) * self.window
        orientation = (torch.atan2(across, down) / math.pi * self.bins).floor().long() % self.bins
        every = torch.arange(self.bins, device=images.device).view(-1, 1, 1)
        each = (orientation[:, :, None] == every) * votes[:, :, None]  # [b, c, bins, H, W]
        return resize(each.flatten(0, 1), self.shape).reshape(*each.shape[:3], *self.shape)


def gaussian(side: int) -> Float[Tensor, "side side"]:
    """A Gaussian window that sums to 1, with a deviation of half its side (whole px)."""
    at = torch.arange(side) - (side - 1) / 2
    bell = torch.exp(-0.5 * (at / max(1, side // 2)).square())
    window = bell[:, None] * bell
    return window / window.sum()


def strokes(bins: int, side: int) -> Float[Tensor, "bins 1 side side"]:
    """A bright line through the middle of a cell for each bin of orientation, a pixel wide and soft at its sides."""
    at = torch.arange(side) - (side - 1) / 2
    angle = ((torch.arange(bins) + 0.5) * math.pi / bins).view(-1, 1, 1)
    off = (at * angle.sin() + at[:, None] * angle.cos()).abs()
    length = (at.square() + at[:, None].square()).sqrt()
    return ((1 - off).clamp(0, 1) * (side / 2 + 0.5 - length).clamp(0, 1))[:, None]
