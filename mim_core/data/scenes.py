"""The embedded dataset `scenes`: handwritten digits blended on crops of photographs.

Real pixels that come with scikit-learn: 1,797 digits of 8 x 8 px (`digits.csv.gz`, UCI optical recognition of
handwritten digits) and two photographs of 640 x 427 px (`china.jpg`, `flower.jpg`). An image's class is that of its
largest digit; a share of the images hold smaller digits too. Splits share neither digits nor parts of the photographs.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt

from mim_core.data.pack import SPLITS, Sample, Source
from mim_core.spec import Pair

FILES = ("digits.csv.gz", "china.jpg", "flower.jpg")
DIGIT_SHARES = (0.7, 0.1, 0.2)
# Columns of each photograph, as shares of its width; a gap of pixels between them is not needed as crops stay inside.
BANDS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
CROP_PX = (28, 90)
MAIN_SHARE, CROWDED_SHARE, FURTHER_SHARE = (0.55, 0.9), (0.5, 0.65), (0.3, 0.42)
"""Side of a digit alone, of the main one among several, and of the others, as shares of the image's shorter side."""
Place = tuple[int, int, int]
"""(top, left, side) of a digit in px."""


def scenes(
    root: Path,
    *,
    size_px: Pair = (32, 32),
    train: PositiveInt = 12000,
    validation: NonNegativeInt = 1000,
    test: NonNegativeInt = 2000,
    several: Annotated[float, Field(ge=0, le=1)] = 0.2,
    seed: int = 0,
) -> Source:
    """Compose the dataset from its three files in `root`.

    `size_px` is the images' (height, width) in px, `several` the share with two or three digits. An image's origin is
    (digit, photograph, left, top, right, bottom): its main digit's row in the file, the crop in the photograph's px;
    the rows of further digits follow, -1 where there are none.
    """
    if min(size_px) < 16:
        raise ValueError(f"size_px: found {list(size_px)}; digits need 16 px a side at least")
    digits, classes = _read_digits(root / "digits.csv.gz")
    photographs = [np.asarray(Image.open(root / name).convert("RGB")) for name in FILES[1:]]
    owned = dict(zip(SPLITS, split_digits(classes), strict=True))
    counts = {"train": train, "validation": validation, "test": test}

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        for _ in range(counts[split]):
            yield _compose(rng, digits, classes, owned[split], photographs, BANDS[split], size_px, several)

    names = [str(digit) for digit in range(10)]
    annotations = ("boxes", "instances", "labels")
    return Source(names, counts, samples, annotations=annotations, segments=["background", *names])


def split_digits(classes: np.ndarray) -> list[np.ndarray]:
    """Share the digits out over the splits, class by class, in a fixed random order."""
    rng = np.random.default_rng(0)
    parts: list[list[np.ndarray]] = [[], [], []]
    cuts = np.cumsum(DIGIT_SHARES[:-1])
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(classes == digit))
        for part, rows_of_part in zip(parts, np.split(rows, (cuts * len(rows)).astype(int)), strict=True):
            part.append(rows_of_part)
    return [np.sort(np.concatenate(part)) for part in parts]


def _read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the digits as opacities [n, 8, 8] in [0, 1] and their classes [n]."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return (table[:, :64] / 16).reshape(-1, 8, 8).astype(np.float32), table[:, 64].astype(np.int64)


def _compose(
    rng: np.random.Generator,
    digits: np.ndarray,
    classes: np.ndarray,
    owned: np.ndarray,
    photographs: list[np.ndarray],
    band: tuple[float, float],
    size: tuple[int, int],
    several: float,
) -> Sample:
    height, width = size
    which = int(rng.integers(len(photographs)))
    photograph = photographs[which]
    first, last = (round(share * photograph.shape[1]) for share in band)
    side = int(rng.integers(CROP_PX[0], min(CROP_PX[1], last - first) + 1))
    left = int(rng.integers(first, last - side + 1))
    top = int(rng.integers(photograph.shape[0] - side + 1))
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    scene = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    further = int(rng.integers(1, 3)) if rng.random() < several else 0
    places: list[Place] = []
    for order in range(1 + further):
        share = rng.uniform(*(FURTHER_SHARE if order else CROWDED_SHARE if further else MAIN_SHARE))
        place = _place(rng, size, round(share * min(size)), places)
        if place:
            places.append(place)
    rows = rng.choice(owned, len(places), replace=False)
    instances = np.zeros(size, np.uint8)
    # The smaller digits first, so that the main one, whose class the image has, lies on top.
    for order in reversed(range(len(places))):
        scene = _blend(rng, scene, digits[rows[order]], places[order], instances, order + 1)
    boxes = [(*_box(instances == order + 1), classes[row]) for order, row in enumerate(rows)]
    padding = [-1] * (3 - len(places))
    return Sample(
        np.clip(scene.round(), 0, 255).astype(np.uint8).transpose(2, 0, 1),
        int(classes[rows[0]]),
        np.array(boxes, np.float32),
        instances=instances,
        origin=(int(rows[0]), which, left, top, left + side, top + side, *map(int, rows[1:]), *padding),
    )


def _place(rng: np.random.Generator, size: tuple[int, int], side: int, taken: list[Place]) -> Place | None:
    """Find a square for a digit of which those there cover at most half each, or None after twenty tries."""
    for _ in range(20):
        top, left = int(rng.integers(size[0] - side + 1)), int(rng.integers(size[1] - side + 1))
        covered = [
            max(0, min(top + side, other[0] + other[2]) - max(top, other[0]))
            * max(0, min(left + side, other[1] + other[2]) - max(left, other[1]))
            for other in taken
        ]
        if all(2 * area <= side**2 for area in covered):
            return top, left, side
    return None


def _blend(
    rng: np.random.Generator, scene: np.ndarray, digit: np.ndarray, place: Place, instances: np.ndarray, number: int
) -> np.ndarray:
    """Lay a digit over the scene in a random colour, and mark its pixels in `instances`."""
    top, left, side = place
    opacity = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    under = scene[top : top + side, left : left + side]
    weight = opacity[..., None]
    around = (under * weight).sum((0, 1)) / weight.sum()
    colour = rng.uniform(0, 255, 3)
    # Redraw until the eye can tell the digit from what it lies on: 90 of 255 in the root mean square of the channels.
    while np.sqrt(((colour - around) ** 2).mean()) < 90:
        colour = rng.uniform(0, 255, 3)
    out = scene.copy()
    out[top : top + side, left : left + side] = under + (colour - under) * weight * rng.uniform(0.75, 1.0)
    instances[top : top + side, left : left + side][opacity > 0.4] = number
    return out


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tightest box (left, top, right, bottom; right and bottom exclusive) round a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
