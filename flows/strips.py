"""Strips of recovered pictures: the same images under the same masks, as the points of an ablation recover them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from flows.figures import STYLE, WIDTH_IN, empty, png

SHOWN = 4
GREY = 0.55


def recovered(files: Mapping[str, Path]) -> bytes:
    """Draw a row an image: the original, what of it is seen, and what each point makes of the rest.

    `files` maps a point's label to its pictures: originals and composites uint8 [b, c, H, W], hidden bool [b, H, W].
    """
    loaded = {label: dict(np.load(path)) for label, path in files.items()}
    if not loaded:
        return empty("No point has pictures.")
    first = next(iter(loaded.values()))
    originals = _shown(first["originals"])
    seen = np.where(first["hidden"][:SHOWN, ..., None], GREY, originals)
    columns = {"original": originals, "seen": seen}
    columns |= {label: _shown(one["composites"]) for label, one in loaded.items()}
    count, across = len(originals), len(columns)
    height, width = originals.shape[1:3]
    side = WIDTH_IN / max(across, 6)
    with matplotlib.rc_context(STYLE):
        close = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        figure = Figure((side * across, side * height / width * count + 0.45), layout=close)
        grid: Any = figure.subplots(count, across, squeeze=False)
        for column, (label, images) in enumerate(columns.items()):
            for row in range(count):
                axes = grid[row, column]
                axes.imshow(images[row], interpolation="nearest", vmin=0, vmax=1)
                axes.set_axis_off()
            grid[0, column].set_title(textwrap.fill(label, 13), fontsize=7)
        return png(figure)


def _shown(images: np.ndarray) -> np.ndarray:
    """Pictures as float [b, H, W, 3]; one channel is grey, further ones are left out."""
    few = images[:SHOWN].astype(np.float32) / 255
    few = few[:, :3] if few.shape[1] >= 3 else few[:, :1].repeat(3, 1)
    return few.transpose(0, 2, 3, 1)
