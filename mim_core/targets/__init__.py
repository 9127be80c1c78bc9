"""Targets: what the head has to predict at each position of the encoder's output.

`Target(grid, mean, std, **params)`; the fitted ones take a tokenizer as well. A target is called with normalised images
and gives the entries that its `entries` tells of: numbers `Float[b, n, k]`, or classes `Int[b, n, k]`. `render` turns a
prediction for all positions into pictures in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

from mim_core.targets.base import Target
from mim_core.targets.colours import ColourBins, ColourGrid, mean_colour
from mim_core.targets.fitted import Clusters, Tokens
from mim_core.targets.hog import Hog
from mim_core.targets.pixels import Pixels

__all__ = ["TARGETS"]

TARGETS: dict[str, Callable[..., Target]] = {
    "pixels": Pixels,
    "mean_colour": mean_colour,
    "colour_grid": ColourGrid,
    "colour_bins": ColourBins,
    "hog": Hog,
    "clusters": Clusters,
    "tokens": Tokens,
}
