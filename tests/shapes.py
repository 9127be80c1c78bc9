"""A small pack with every annotation that there is, and tasks that learn from it in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mim_core.data.pack import Pack, Sample, Source, open_pack, write

SIZE = (32, 48)
COUNTS = {"train": 32, "validation": 8, "test": 12}
NAMES = ["red", "blue", "green"]
COLOURS = np.array([[230, 40, 40], [40, 60, 230], [40, 220, 60]], np.uint8)
FCN = {"name": "segment", "head": {"name": "fcn", "hidden": 16}}
DETECTOR = {
    "name": "detect",
    "detector": {"name": "faster_rcnn", "width": 32, "cells": 3, "sampled": 16},
    "neck": {"name": "simple_pyramid", "width": 16},
}


def shapes() -> Source:
    """A rectangle or two on noise, in the colour of their class, with every annotation that there is."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(COUNTS).index(split))
        for index in range(COUNTS[split]):
            image = rng.integers(90, 140, (*SIZE, 3)).astype(np.uint8)
            instances = np.zeros(SIZE, np.uint8)
            boxes = []
            for half, kind in enumerate(rng.permutation(3)[: 1 + index % 2]):
                height, width = rng.integers(9, 22), rng.integers(9, 22)
                top, left = rng.integers(0, SIZE[0] - height + 1), 24 * half + rng.integers(0, 25 - width)
                image[top : top + height, left : left + width] = COLOURS[kind]
                instances[top : top + height, left : left + width] = half + 1
                boxes.append((left, top, left + width, top + height, kind))
            presence = np.isin(np.arange(3), [box[4] for box in boxes]).astype(np.int8)
            found = np.array(boxes, np.float32)
            yield Sample(image.transpose(2, 0, 1), int(boxes[0][4]), found, None, instances, presence=presence)

    annotations = ("boxes", "instances", "labels", "presence")
    return Source(NAMES, COUNTS, samples, annotations=annotations, segments=["background", *NAMES])


def shaped_pack(folder: Path) -> Pack:
    write(shapes(), folder, {"source": {"name": "shapes"}})
    return open_pack(folder)
