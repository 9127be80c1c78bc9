"""Packs: a dataset decoded once into arrays that training maps into memory.

A pack is a folder with `meta.json` and a folder for each split, with `images.npy` uint8 [n, c, H, W], `labels.npy`
int64 [n] (-1 where there is none) and `origins.npy` int64 [n, o], which says where each image's pixels come from, as
the source defines it. The others are there where `annotations` in `meta.json` has their word:

presence    `presence.npy` int8 [n, k]: 1 a class is in the image, 0 it is not, -1 not judged
boxes       `boxes.npy` float32 [m, 5] (left, top, right, bottom in px, class) with `box_starts.npy` int64 [n + 1] and
            `box_flags.npy` uint8 [m] (see DIFFICULT, CROWD); an image without a box has no object in it
instances   `instances.npy` uint8 or uint16 [n, H, W]: 0 background, k the image's k-th box
semantic    `semantic.npy` uint8 [n, H, W]: class of `segments` in `meta.json`, 255 not judged
labels      stands there where any image has a label
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.lib.format import open_memmap
from torch import Tensor

SPLITS = ("train", "validation", "test")
ANNOTATIONS = ("boxes", "instances", "labels", "presence", "semantic")
DIFFICULT, CROWD = 1, 2
"""Bits of a box's flags: hard to recognise, so that evaluation passes it over; a region of many objects in one box."""
NOT_JUDGED = 255


@dataclass(frozen=True)
class Sample:
    """One image with its annotations; see the module's docstring for the arrays' meaning, without their n."""

    image: np.ndarray
    label: int = -1
    boxes: np.ndarray | None = None
    box_flags: np.ndarray | None = None
    instances: np.ndarray | None = None
    semantic: np.ndarray | None = None
    presence: np.ndarray | None = None
    origin: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """What a source offers: samples by split, drawn only when they are iterated, and what it had to leave out.

    `annotations` are the words of ANNOTATIONS that its samples have, `segments` the names of its semantic maps' values.
    `quarantined` lists what is broken, as `file` and `reason`; `left_out` counts, by split, the boxes that fitting
    the images to one size cut away. `files` are those that a copy of the dataset needs.
    """

    classes: list[str]
    counts: Mapping[str, int]
    samples: Callable[[str], Iterator[Sample]]
    quarantined: list[dict[str, str]] = field(default_factory=list)
    annotations: Sequence[str] = ()
    segments: list[str] = field(default_factory=list)
    left_out: Mapping[str, int] = field(default_factory=dict)
    files: Sequence[Path] = ()


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
                writer = _Writer(part / split, source, source.counts[split], sample)
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
        "annotations": sorted(source.annotations),
        "segments": source.segments,
        "counts": dict(source.counts),
        "labelled": labelled,
        "mean": moments[0].tolist(),
        "std": moments[1].tolist(),
        "left_out": dict(source.left_out),
        "quarantined": source.quarantined,
    }
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


class _Writer:
    """The arrays of one split while they are filled."""

    def __init__(self, folder: Path, source: Source, count: int, first: Sample) -> None:
        folder.mkdir(parents=True)
        self.folder, self.at, self.annotations = folder, 0, set(source.annotations)
        assert self.annotations <= set(ANNOTATIONS), f"annotations are words of {ANNOTATIONS}"
        self.shape = (count, *first.image.shape[1:])
        self.images = open_memmap(folder / "images.npy", "w+", np.uint8, (count, *first.image.shape))
        self.labels = np.full(count, -1, np.int64)
        self.presence = np.full((count, len(source.classes)), -1, np.int8)
        self.maps: dict[str, np.memmap] = {}
        for name in self.annotations & {"instances", "semantic"}:
            self.maps[name] = open_memmap(folder / f"{name}.npy", "w+", np.uint8, self.shape)
        self.boxes: list[np.ndarray] = []
        self.flags: list[np.ndarray] = []
        self.origins: list[tuple[int, ...]] = []

    def add(self, sample: Sample) -> None:
        given = {name for name in ANNOTATIONS[:2] + ANNOTATIONS[3:] if getattr(sample, name) is not None}
        given |= {"labels"} if sample.label >= 0 else self.annotations & {"labels"}
        assert given == self.annotations, f"a source says {sorted(self.annotations)}, its sample has {sorted(given)}"
        self.images[self.at] = sample.image
        self.labels[self.at] = sample.label
        self.origins.append(sample.origin)
        if sample.presence is not None:
            self.presence[self.at] = sample.presence
        if sample.boxes is not None:
            self.boxes.append(sample.boxes.astype(np.float32))
            flags = np.zeros(len(sample.boxes), np.uint8) if sample.box_flags is None else sample.box_flags
            self.flags.append(flags.astype(np.uint8))
        if sample.instances is not None:
            if sample.instances.max(initial=0) > 255 and self.maps["instances"].dtype == np.uint8:
                self._widen()
            self.maps["instances"][self.at] = sample.instances
        if sample.semantic is not None:
            self.maps["semantic"][self.at] = sample.semantic
        self.at += 1

    def _widen(self) -> None:
        """Go on with instances of 16 bits: an image has more than 255 boxes."""
        path = self.folder / "instances.npy"
        wide = open_memmap(path.with_suffix(".wide"), "w+", np.uint16, self.shape)
        wide[: self.at] = self.maps["instances"][: self.at]
        path.with_suffix(".wide").replace(path)
        self.maps["instances"] = wide

    def close(self) -> None:
        assert self.at == len(self.images), "a source has to yield as many samples as it says"
        for array in (self.images, *self.maps.values()):
            array.flush()
        np.save(self.folder / "labels.npy", self.labels)
        np.save(self.folder / "origins.npy", np.array(self.origins, np.int64))
        if "presence" in self.annotations:
            np.save(self.folder / "presence.npy", self.presence)
        if "boxes" in self.annotations:
            np.save(self.folder / "boxes.npy", np.concatenate(self.boxes))
            np.save(self.folder / "box_flags.npy", np.concatenate(self.flags))
            np.save(self.folder / "box_starts.npy", np.cumsum([0, *map(len, self.boxes)]))


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
    opened: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader worker maps the file itself; pickling the map would copy all images through a pipe.
        return open_split, (self.folder,)

    def tensor(self, index: int) -> Tensor:
        """One image as a uint8 tensor [c, H, W] of its own."""
        return torch.from_numpy(np.array(self.images[index]))

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """Some images as one uint8 tensor [b, c, H, W] of its own."""
        return torch.from_numpy(np.asarray(self.images)[list(indices)])

    def array(self, name: str) -> np.ndarray:
        """Map another array of the split by its file name, such as `boxes`; it is opened once.

        Raises ValueError where the pack's source does not give it.
        """
        if name not in self.opened:
            try:
                self.opened[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            except FileNotFoundError:
                raise ValueError(f"{self.folder}: the pack has no {name}; choose a dataset that has them") from None
        return self.opened[name]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of the arrays that there are."""
        return frozenset(path.stem for path in self.folder.glob("*.npy"))

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One image's boxes [m, 5] and their flags [m]."""
        starts = self.array("box_starts")
        span = slice(int(starts[index]), int(starts[index + 1]))
        return self.array("boxes")[span], self.array("box_flags")[span]


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

    @property
    def annotations(self) -> list[str]:
        return list(self.meta["annotations"])

    @property
    def segments(self) -> list[str]:
        return list(self.meta["segments"])

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
        meta = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no pack here; run `dvc repro prepare@{folder.name}`") from None
    if "annotations" not in meta:
        raise ValueError(f"{folder}: a pack of a former version; run `dvc repro --force prepare@{folder.name}`")
    return Pack(folder, meta)


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


def semantic_map(split: Split, index: int) -> Int64[np.ndarray, "H W"]:
    """Semantic map of an image: values of the pack's `segments`, 255 not judged.

    Where the source gives instances alone, it follows from them: 0 background, class + 1, and 255 in crowd regions.
    """
    if "semantic" in split.names:
        return np.array(split.array("semantic")[index], np.int64)
    boxes, flags = split.objects(index)
    values = np.where(flags & CROWD, NOT_JUDGED, boxes[:, 4].astype(np.int64) + 1)
    lookup = np.concatenate([[0], values])
    return np.array(lookup[split.array("instances")[index]])


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
