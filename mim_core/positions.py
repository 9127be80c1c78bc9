"""Fixed positions: what tells tokens where they are without being learned."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mim_core.grid import Grid


def sincos(grid: Grid, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed 2-D sine and cosine positions (MAE, appendix A.1): half the width for columns, then half for rows.

    Each half holds the sines of its coordinate at width / 4 frequencies from 1 down to 1 / 10000, then the cosines.
    Raises ValueError where 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"width: found {width}; sincos positions need a multiple of 4; try {width // 4 * 4 + 4}")
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]]
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1)
