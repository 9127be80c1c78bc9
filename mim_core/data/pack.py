"""Packs: a dataset decoded once into arrays that training maps into memory.

A pack is a folder with `meta.json` and, for each split, `images.npy` uint8 [n, c, H, W], `labels.npy` int64 [n] (-1
where there is none), `boxes.npy` float32 [m, 5] (left, top, right, bottom in px, class) with `box_starts.npy` int64 [n
+ 1], `instances.npy` uint8 [n, H, W] (0 background, k the image's k-th box) where the source has masks, and
`origins.npy` int64 [n, o], which says where each image's pixels come from, as the source defines it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One image with its labels; see the module's docstring for the arrays' meaning."""

    image: np.ndarray
    label: int = -1
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    instances: np.ndarray | None = None
    origin: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """What a source offers: samples by split, drawn only when they are iterated, and what it had to leave out."""

    classes: list[str]
    counts: Mapping[str, int]
    samples: Callable[[str], Iterator[Sample]]
    quarantined: list[dict[str, str]] = field(default_factory=list)


def write(
    source: Source, folder: Path, about: Mapping[str, Any], progress: Callable[[int], None] = lambda n: None
) -> None:
    """Write a source as a pack; the folder appears when it is complete.

    Raises ValueError where the training split is empty.
    """
    if not source.counts["train"]:
        raise ValueError(f"{folder.name}: no readable training image; add images to the dataset's folder")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    done = 0
    shape: tuple[int, ...] = ()
    moments = np.zeros((2, 1))
    labelled: dict[str, int] = {}
    for split in SPLITS:
        writer = None
        for sample in source.samples(split):
            if writer is None:
                shape = sample.image.shape
                writer = _Writer(part / split, source.counts[split], sample)
            writer.add(sample)
            done += 1
            if done % 100 == 0:
                progress(done)
        if writer is None:
            continue
        writer.close()
        labelled[split] = int((writer.labels >= 0).sum())
        if split == "train":
            moments = channel_moments(writer.images)
    meta = {
        **about,
        "channels": shape[0],
        "size": list(shape[1:]),
        "classes": source.classes,
        "counts": dict(source.counts),
        "labelled": labelled,
        "mean": moments[0].tolist(),
        "std": moments[1].tolist(),
        "quarantined": source.quarantined,
    }
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


class _Writer:
    """The arrays of one split while they are filled."""

    def __init__(self, folder: Path, count: int, first: Sample) -> None:
        folder.mkdir(parents=True)
        self.folder, self.at = folder, 0
        self.images = open_memmap(folder / "images.npy", "w+", np.uint8, (count, *first.image.shape))
        self.instances = None
        if first.instances is not None:
            self.instances = open_memmap(folder / "instances.npy", "w+", np.uint8, (count, *first.image.shape[1:]))
        self.labels = np.full(count, -1, np.int64)
        self.boxes: list[np.ndarray] = []
        self.origins: list[tuple[int, ...]] = []

    def add(self, sample: Sample) -> None:
        self.images[self.at] = sample.image
        if self.instances is not None:
            self.instances[self.at] = sample.instances
        self.labels[self.at] = sample.label
        self.boxes.append(sample.boxes.astype(np.float32))
        self.origins.append(sample.origin)
        self.at += 1

    def close(self) -> None:
        assert self.at == len(self.images), "a source has to yield as many samples as it says"
        self.images.flush()
        if self.instances is not None:
            self.instances.flush()
        np.save(self.folder / "labels.npy", self.labels)
        np.save(self.folder / "boxes.npy", np.concatenate(self.boxes))
        np.save(self.folder / "box_starts.npy", np.cumsum([0, *map(len, self.boxes)]))
        np.save(self.folder / "origins.npy", np.array(self.origins, np.int64))


def channel_moments(images: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """Mean and standard deviation [2, c] of each channel in [0, 1], over all pixels, in float64."""
    sums = np.zeros((2, images.shape[1]))
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].astype(np.float64) / 255
        sums += part.sum((0, 2, 3)), (part**2).sum((0, 2, 3))
    mean, square = sums / (images.size / images.shape[1])
    # A constant channel has no deviation to divide by.
    return np.stack([mean, np.sqrt(np.maximum(square - mean**2, 1e-12)).clip(1e-3)])


@dataclass(frozen=True)
class Split:
    """One split of a pack, mapped into memory."""

    images: np.ndarray
    labels: np.ndarray
    folder: Path

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader worker maps the file itself; pickling the map would copy all images through a pipe.
        return open_split, (self.folder,)

    def tensor(self, index: int) -> Tensor:
        """One image as a uint8 tensor [c, H, W] of its own."""
        return torch.from_numpy(np.array(self.images[index]))

    def array(self, name: str) -> np.ndarray:
        """Another array of the split by its file name, such as `boxes`."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pack:
    """A pack on disk."""

    folder: Path
    meta: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.meta["size"]
        return height, width

    @property
    def channels(self) -> int:
        return int(self.meta["channels"])

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.meta["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.meta["std"])

    @property
    def classes(self) -> list[str]:
        return list(self.meta["classes"])

    def split(self, name: str) -> Split:
        """Open a split; raises ValueError where the pack has no such images."""
        folder = self.folder / name
        if not folder.is_dir():
            raise ValueError(f"{self.folder}: the pack has no {name} images; give its data row a {name} share")
        return open_split(folder)


def open_split(folder: Path) -> Split:
    """Map a split's folder."""
    return Split(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy"), folder)


def open_pack(folder: Path) -> Pack:
    """Open a pack; raises ValueError where the folder is none."""
    try:
        return Pack(folder, json.loads((folder / "meta.json").read_text()))
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no pack here; run `dvc repro prepare@{folder.name}`") from None


def label_budget(labels: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Choose `count` labelled images, as evenly over the classes as they allow; None chooses all.

    The choice depends on the seed alone, so every arm of a comparison sees the same labels.
    Raises ValueError where there are fewer labels.
    """
    labelled = np.flatnonzero(labels >= 0)
    if count is None:
        return labelled
    if count > len(labelled):
        raise ValueError(f"labels: found {count}; the training split has {len(labelled)} labelled images; lower it")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(labelled)
    # Rank of each image within its class: the lowest ranks together are the most even choice.
    ranks = np.zeros(len(shuffled), np.int64)
    for label in np.unique(labels[shuffled]):
        at = np.flatnonzero(labels[shuffled] == label)
        ranks[at] = np.arange(len(at))
    return np.sort(shuffled[np.argsort(ranks, kind="stable")[:count]])


def instance_classes(split: Split, index: int) -> np.ndarray:
    """Semantic map of an image: 0 background, class + 1 elsewhere [H, W]."""
    starts = split.array("box_starts")
    boxes = split.array("boxes")[starts[index] : starts[index + 1]]
    lookup = np.concatenate([[0], boxes[:, 4] + 1]).astype(np.int64)
    return lookup[split.array("instances")[index]]  # type: ignore[no-any-return]


def batched(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    """Cut indices into lists of at most `size`."""
    run: list[int] = []
    for index in indices:
        run.append(index)
        if len(run) == size:
            yield run
            run = []
    if run:
        yield run
