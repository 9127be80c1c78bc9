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

import contextlib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from numpy.lib.format import open_memmap

from mim_core.data.moments import moments_on_disk
from mim_core.data.work import Arrays, Work
from mim_core.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "test")
ANNOTATIONS = ("boxes", "instances", "labels", "presence", "semantic")
DIFFICULT, CROWD = 1, 2
"""Bits of a box's flags: hard to recognise, so that evaluation passes it over; a region of many objects in one box."""
NOT_JUDGED = 255
PIECE_BYTES, PIECE_IMAGES = 32 << 20, 1024
"""The most that is read at once while a pack is written: of images' bytes in the pack, and of images."""
YIELDS = "a source has to yield as many samples as it says"


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
    files: Collection[Path] = ()
    rows: Callable[[str, int, int], Callable[[], Iterable[Sample]]] | None = None
    """Draws a split's samples from one row up to another, by a function that pickles, so that several processes may
    draw, and a process draws on where another was killed. A source that draws only in order has none."""


def write(source: Source, folder: Path, about: Mapping[str, Any], work: Work | None = None) -> None:
    """Write a source as a pack; the folder appears when it is complete.

    `work` says by how many processes, and its folder, on the same disk, holds what there is until then: by default one
    beside the pack, which begins afresh. The pack is the same by any number of processes, and after any kill.
    Raises ValueError where the training split is empty.
    """
    if not source.counts["train"]:
        raise ValueError(f"{folder.name}: no readable training image; add images to the dataset's folder")
    work = work or Work(folder.with_name(f".{folder.name}.part"))
    assert work.folder, "a pack is written on disk"
    part = work.folder / "pack"
    shape: tuple[int, ...] = ()
    labelled = {}
    for split in (split for split in SPLITS if source.counts[split]):
        shape, labelled[split] = _write_split(source, split, part / split, work.folder / f"{split}.wide.npy", work)
    moments = moments_on_disk(part / "train" / "images.npy", work)
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
    write_atomically(part / "meta.json", json.dumps(meta, indent=1))
    work.forget()
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    shutil.rmtree(work.folder)


def _write_split(source: Source, split: str, folder: Path, wide: Path, work: Work) -> tuple[tuple[int, ...], int]:
    """Write a split's arrays in pieces; gives the images' shape [c, H, W], and how many have a label.

    `wide` holds instances in 16 bits, until it is known that 8 do for all.
    """
    count, words = source.counts[split], frozenset(source.annotations)
    assert words <= set(ANNOTATIONS), f"annotations are words of {ANNOTATIONS}"
    rows = source.rows
    drawn = iter(()) if rows else source.samples(split)
    first = next(iter(rows(split, 0, 1)())) if rows else next(drawn)
    shape, size = first.image.shape, first.image.shape[1:]
    _create(folder / "images.npy", np.uint8, (count, *shape))
    if "semantic" in words:
        _create(folder / "semantic.npy", np.uint8, (count, *size))
    if "instances" in words:
        _create(wide, np.uint16, (count, *size))
    step = min(max(PIECE_BYTES // first.image.nbytes, 1), PIECE_IMAGES)
    spans = [(start, min(start + step, count)) for start in range(0, count, step)]
    # A source that draws in order alone is drawn here; what a kill left of it is drawn and written anew.
    drawn = itertools.chain([first], drawn)
    pieces = (
        (folder, wide, start, stop, words, len(source.classes))
        + ((rows(split, start, stop),) if rows else (functools.partial(itertools.islice, drawn, stop - start),))
        for start, stop in spans
    )
    written = (
        work.map(f"write {split}", _write_rows, pieces, [stop - start for start, stop in spans])
        if rows
        else itertools.starmap(_write_rows, pieces)
    )
    parts: dict[str, list[np.ndarray]] = {}
    for arrays in written:
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
    assert rows or next(drawn, None) is None, YIELDS
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if "boxes" in whole:
        whole["box_starts"] = np.cumsum([0, *whole.pop("box_counts").tolist()])
    if "instances" in words:
        kind = np.uint16 if whole.pop("highest").max() > 255 else np.uint8
        _create(folder / "instances.npy", kind, (count, *size))
        for start, stop in spans:
            _put(folder / "instances.npy", start, np.load(wide, mmap_mode="r")[start:stop])
    for name, array in whole.items():
        np.save(folder / f"{name}.npy", array)
    return shape, int((whole["labels"] >= 0).sum())


def _write_rows(
    folder: Path,
    wide: Path,
    start: int,
    stop: int,
    words: frozenset[str],
    classes: int,
    draw: Callable[[], Iterable[Sample]],
) -> Arrays:
    """Write the images and maps of the rows from `start` to `stop`; gives what else they have."""
    samples = list(draw())
    assert len(samples) == stop - start, YIELDS
    for sample in samples:
        given = {name for name in ANNOTATIONS[:2] + ANNOTATIONS[3:] if getattr(sample, name) is not None}
        given |= {"labels"} if sample.label >= 0 else words & {"labels"}
        assert given == words, f"a source says {sorted(words)}, its sample has {sorted(given)}"
    _put(folder / "images.npy", start, [sample.image for sample in samples])
    arrays: Arrays = {
        "labels": np.array([sample.label for sample in samples], np.int64),
        "origins": np.array([sample.origin for sample in samples], np.int64),
    }
    if "presence" in words:
        arrays["presence"] = np.array([sample.presence for sample in samples], np.int8).reshape(-1, classes)
    if "semantic" in words:
        _put(folder / "semantic.npy", start, [sample.semantic for sample in samples])
    if "instances" in words:
        maps = [np.asarray(sample.instances) for sample in samples]
        _put(wide, start, maps)
        arrays["highest"] = np.array([max(one.max(initial=0) for one in maps)], np.int64)
    if "boxes" in words:
        boxes = [np.asarray(sample.boxes, np.float32) for sample in samples]
        flags = [
            np.zeros(len(own), np.uint8) if sample.box_flags is None else sample.box_flags.astype(np.uint8)
            for own, sample in zip(boxes, samples, strict=True)
        ]
        arrays |= {"boxes": np.concatenate(boxes), "box_flags": np.concatenate(flags)}
        arrays["box_counts"] = np.array([len(own) for own in boxes], np.int64)
    return arrays


def _create(path: Path, kind: type, shape: tuple[int, ...]) -> None:
    """Create an array of zeros on disk, where it is not there of this shape from a process that was killed."""
    with contextlib.suppress(OSError, ValueError):
        found = np.load(path, mmap_mode="r")
        if (found.shape, found.dtype) == (shape, np.dtype(kind)):
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    open_memmap(path, "w+", kind, shape).flush()


def _put(path: Path, start: int, rows: Any) -> None:
    """Write rows of an array on disk, and wait until they are there; a full disk is an OSError (in a map, a crash)."""
    array = np.load(path, mmap_mode="r")
    stacked = np.ascontiguousarray(np.stack(rows), array.dtype)
    assert stacked.shape[1:] == array.shape[1:], "a source's images have one shape"
    with path.open("r+b") as file:
        file.seek(array.offset + start * stacked[0].nbytes)
        file.write(stacked.data)
        file.flush()
        os.fsync(file.fileno())


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
        import torch  # processes that only write packs do without

        return torch.from_numpy(np.array(self.images[index]))

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """Some images as one uint8 tensor [b, c, H, W] of its own."""
        import torch

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
