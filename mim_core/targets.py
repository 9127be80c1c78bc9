"""Targets: what the head has to predict at each patch.

A target is called with the normalised images and gives `Float[b, n, k]` (kind "values") or `Int[b, n]` (kind
"classes"), one entry a patch; `render` turns a prediction for all patches back into pictures in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mim_core.masks import Grid


def patchify(images: Float[Tensor, "b c H W"], patch_px: int) -> Float[Tensor, "b n k"]:
    """Cut images into patches; k runs over (channel, row, column), pixel shuffle's order (SimMIM's, not MAE's)."""
    b, c, height, width = images.shape
    p = patch_px
    cut = images.reshape(b, c, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)


def unpatchify(patches: Float[Tensor, "b n k"], grid: Grid) -> Float[Tensor, "b c H W"]:
    """Put patches back: the inverse of `patchify`."""
    b, p, (h, w) = len(patches), grid.patch_px, grid.shape
    cut = patches.reshape(b, h, w, -1, p, p)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, grid.height, grid.width)


class Pixels(nn.Module):
    """The pixels themselves, in the encoder's normalised colours (SimMIM, section 3.4).

    `normalise: patch` gives each patch zero mean and unit variance first (MAE, section 3: better features). Predictions
    then hold no brightness, and `render` borrows the original patch's mean and deviation: `borrows` says so.
    """

    kind: Literal["values", "classes"] = "values"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        normalise: Literal["none", "patch"] = "none",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.normalise = normalise
        self.values = len(mean) * grid.patch_px**2
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def borrows(self) -> str:
        """What `render` takes from the original image, in words for the picture; empty where nothing."""
        return "patch mean and deviation from the original" if self.normalise == "patch" else ""

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n k"]:
        patches = patchify(images, self.grid.patch_px)
        if self.normalise == "none":
            return patches
        mean, deviation = _moments(patches)
        return (patches - mean) / deviation

    def render(self, prediction: Float[Tensor, "b n k"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Give pictures in [0, 1] of a prediction for all patches; `images` are the normalised originals."""
        if self.normalise == "patch":
            mean, deviation = _moments(patchify(images, self.grid.patch_px))
            prediction = prediction * deviation + mean
        return (unpatchify(prediction, self.grid) * self.std + self.mean).clamp(0, 1)


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    # Unbiased variance and 1e-6 inside the root, as in MAE's published code.
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


TARGETS = {"pixels": Pixels}
