"""A palette: each pixel's colour as one of a few, found by k-means.

Source: Chen et al., "Generative Pretraining From Pixels", ICML 2020 (iGPT): a 9-bit palette, 512 colours.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mim_core.tokenizers.dalle import Codes

IMAGES, PIXELS, DISTINCT = 1024, 500_000, 16
"""Images and their pixels that are drawn at most, and the distinct colours a code that k-means sees of them."""
CHUNK = 2**22
"""Distances that are held at a time (16 MiB)."""


class Palette(nn.Module):
    """Colours in [0, 1] by code; a token a pixel. It cannot be used before `fit` or loading."""

    stride = 1
    advice = "the images have few colours in effect: lower least_perplexity, or fit it to others"
    colours: Tensor

    def __init__(self, channels: int, *, codes: Codes = 512) -> None:
        super().__init__()
        self.codes = codes
        self.register_buffer("colours", torch.zeros(codes, channels))

    def fit(self, images: UInt8[np.ndarray, "b c H W"], seed: int) -> None:
        """Set the colours by k-means over the images' colours, of a sample of bounded size.

        Each distinct colour counts once, so that a large even background does not take the codes.
        Raises ValueError where there are fewer colours than codes.
        """
        rng = np.random.default_rng(seed)
        # Whole images first: single pixels from all over a large mapped file would each read a page of it.
        chosen = images[np.sort(rng.permutation(len(images))[:IMAGES])]
        pixels = np.moveaxis(chosen, 1, -1).reshape(-1, images.shape[1])
        if len(pixels) > PIXELS:
            pixels = pixels[rng.integers(len(pixels), size=PIXELS)]
        distinct = np.unique(pixels, axis=0)
        if len(distinct) < self.codes:
            raise ValueError(
                f"codes: found {self.codes}; the {len(pixels)} pixels read hold {len(distinct)} distinct colours, and "
                f"each code needs one; lower it to {len(distinct)} or less"
            )
        if len(distinct) > DISTINCT * self.codes:
            distinct = distinct[rng.permutation(len(distinct))[: DISTINCT * self.codes]]
        with warnings.catch_warnings():
            # A cluster that loses its last colour keeps its centre, which is as good a colour as before.
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            found, _ = scipy.cluster.vq.kmeans2(distinct / 255, self.codes, minit="++", seed=rng)
        self.colours.copy_(torch.from_numpy(found))

    @torch.no_grad()
    def nearest(self, colours: Float[Tensor, "*n c"]) -> Int[Tensor, "*n"]:
        """Give the code of the nearest colour in squared Euclidean distance; the lowest code where two are as near."""
        parts = torch.split(colours.reshape(-1, colours.shape[-1]).float(), max(1, CHUNK // self.codes))
        codes = [_distances(part, self.colours).argmin(1) for part in parts]
        return torch.cat(codes).reshape(colours.shape[:-1])

    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k H W"]:
        """Negative distances to the codes' colours: `codes` numbers a pixel, so for few pixels only."""
        pixels = images.movedim(1, -1)
        distances = _distances(pixels.flatten(0, 2).float(), self.colours)
        return -distances.reshape(*pixels.shape[:-1], self.codes).movedim(-1, 1)

    def tokens(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b H W"]:
        """Give each pixel's code."""
        return self.nearest(images.movedim(1, -1))

    def decode(self, tokens: Int[Tensor, "b H W"]) -> Float[Tensor, "b c H W"]:
        """Paint tokens in their colours."""
        return self.colours[tokens].movedim(-1, 1)


def _distances(pixels: Float[Tensor, "n c"], colours: Float[Tensor, "k c"]) -> Float[Tensor, "n k"]:
    # From differences: the expanded square as a matrix product would be rounded to bf16 or TF32 where these are on.
    return torch.cdist(pixels, colours, compute_mode="donot_use_mm_for_euclid_dist")
