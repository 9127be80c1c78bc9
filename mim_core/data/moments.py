"""Mean and deviation of a pack's channels, by sums over pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mim_core.data.work import Arrays, Work

TOGETHER = 1024
"""Images whose values are added up as one; another number would change the last bits of a pack's mean."""


def channel_moments(images: np.ndarray, chunk: int = TOGETHER) -> np.ndarray:
    """Mean and standard deviation [2, c] of each channel in [0, 1], over all pixels of [n, c, H, W], in float64."""
    return _moments((_sums(images[start : start + chunk]) for start in range(0, len(images), chunk)), images.shape)


def moments_on_disk(path: Path, work: Work) -> np.ndarray:
    """Give `channel_moments` of an `.npy` file of images."""
    shape = np.load(path, mmap_mode="r").shape
    spans = [(start, min(start + TOGETHER, shape[0])) for start in range(0, shape[0], TOGETHER)]
    pieces = [(path, start, stop) for start, stop in spans]
    summed = work.map("measure", _sums_on_disk, pieces, [stop - start for start, stop in spans])
    return _moments((arrays["sums"] for arrays in summed), shape)


def _sums_on_disk(path: Path, start: int, stop: int) -> Arrays:
    return {"sums": _sums(np.load(path, mmap_mode="r")[start:stop])}


def _sums(images: np.ndarray) -> np.ndarray:
    """Sums [2, c] of each channel's values in [0, 1] and of their squares, to the last bit as NumPy adds them at once.

    With several channels that is image by image, which needs little memory; one channel it adds up as a whole.
    """
    channels = images.shape[1]
    step = max(1, (1 << 20) // images[0].size) if channels > 1 else len(images)
    sums = np.zeros((2, channels))
    for start in range(0, len(images), step):
        values = images[start : start + step].astype(np.float64)
        values /= 255
        for power in (0, 1):
            by_image = values.reshape(len(values), channels, -1).sum(2) if channels > 1 else [values.sum((0, 2, 3))]
            sums[power] = functools.reduce(np.add, by_image, sums[power])
            np.multiply(values, values, out=values)
    return sums


def _moments(parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    sums = functools.reduce(np.add, parts, np.zeros((2, shape[1])))
    mean, square = sums / (shape[0] * shape[2] * shape[3])
    # A constant channel has no deviation to divide by.
    return np.stack([mean, np.sqrt(np.maximum(square - mean**2, 1e-12)).clip(1e-3)])
