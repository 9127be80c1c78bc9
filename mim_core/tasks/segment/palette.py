"""Colours for maps of classes that stay apart for readers with any form of colour blindness.

Okabe and Ito, "Color Universal Design", 2008, then whatever colour lies farthest from all before it, to the nearest of
four kinds of sight: trichromatic, and the three dichromatic ones of Machado et al., "A Physiologically-based Model for
Simulation of Color Vision Deficiency", IEEE TVCG 2009. Distances are those of OKLab (Ottosson, 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product

import numpy as np

Colour = tuple[int, int, int]
BACKGROUND: Colour = (0, 0, 0)
UNJUDGED: Colour = (255, 255, 255)
DARKEST = 0.4
"""Lightness from 0 to 1, below which colours are hard to tell from the background."""
OKABE_ITO: list[Colour] = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]
SIGHTS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
"""What each kind of sight makes of linear RGB."""
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@functools.cache
def palette(count: int) -> list[Colour]:
    """Give `count` colours; fewer are the first of more."""
    candidates: list[Colour] = [*OKABE_ITO, *product(range(0, 256, 17), repeat=3)]  # type: ignore[list-item]
    views = seen(candidates)
    nearest = apart(views, seen([BACKGROUND, UNJUDGED])).min(1)
    nearest[views[0, :, 0] < DARKEST] = 0
    chosen: list[Colour] = []
    for at in range(count):
        found = at if at < len(OKABE_ITO) else int(nearest.argmax())
        chosen.append(candidates[found])
        nearest = np.minimum(nearest, apart(views, views[:, found : found + 1])[:, 0])
    return chosen


def apart(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance [m, n] of colours as `seen` places them, [4, m, 3] and [4, n, 3], to the sight that sees the least."""
    return np.linalg.norm(some[:, :, None] - others[:, None], axis=-1).min(0)  # type: ignore[no-any-return]


def seen(colours: Sequence[Colour]) -> np.ndarray:
    """Place colours in OKLab as each kind of sight sees them: [4, n, 3]."""
    share = np.array(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    sights = np.clip(np.einsum("sij,nj->sni", SIGHTS, linear), 0, 1)
    return np.cbrt(sights @ TO_CONES.T) @ TO_LAB.T  # type: ignore[no-any-return]
