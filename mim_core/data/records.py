"""Datasets whose images are files: what is known of each image, and the source that it makes."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from mim_core.data.fit import Fit, Placing, place
from mim_core.data.images import Channels, RefusedError, decode
from mim_core.data.pack import NOT_JUDGED, SPLITS, Sample, Source
from mim_core.data.splits import MARK, Published, digest, published_splits
from mim_core.data.work import Arrays, current

Map = Callable[[], np.ndarray]
"""Reads an image's map [h, w], only when the image is drawn; it pickles."""
Frame = tuple[int, int] | None
LOOK_IMAGES = 512
"""Images that are looked at as one piece of work."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its annotations, all in px of the image as `frame` says (see `images.decode`)."""

    path: Path
    shape: tuple[int, int, int]
    frame: tuple[int, int] | None = None
    label: int = -1
    presence: np.ndarray | None = None
    boxes: np.ndarray | None = None
    box_flags: np.ndarray | None = None
    instances: Map | None = None
    semantic: Map | None = None
    origin: tuple[int, ...] = ()
    mark: bytes = b""
    """The digest of its file, where it is known already."""


class NoImagesError(ValueError):
    """A dataset without one good image; `quarantined` says what each one has."""

    def __init__(self, root: Path, quarantined: list[dict[str, str]]) -> None:
        super().__init__(f"{root}: found no readable image ({len(quarantined)} refused); add images and run again")
        self.quarantined = quarantined


@dataclass
class Found:
    """What reading a dataset has found so far: good images by the format's own sets, and what is broken."""

    root: Path
    channels: Channels
    records: dict[str, Sequence[Record]] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
    """What a copy of the dataset needs: annotations and every file that they name and that is there."""
    seen: dict[tuple[Path, Frame], tuple[int, int, int] | RefusedError] = field(default_factory=dict)
    marks: dict[Path, bytes] = field(default_factory=dict)
    count: int = 0
    """Files that were looked at."""

    def refuse(self, what: Path | str, reason: object) -> None:
        """List a file, or a place in one such as `labels.csv line 3`, with the reason why it is left out."""
        name = what.relative_to(self.root).as_posix() if isinstance(what, Path) else what
        self.quarantined.append({"file": name, "reason": str(reason)})

    def use(self, path: Path) -> Path:
        """Note a file as part of the dataset, where it is there."""
        if os.path.isfile(path) and os.access(path, os.R_OK):  # False also for names that no file can have
            self.files.add(path)
        return path

    def look(self, images: Iterable[tuple[Path, Frame]]) -> None:
        """Decode images that `shape` will be asked for, by several processes where that is worth it."""
        wanted = list(images)
        shapes, marks, reasons = self.looked([str(path) for path, _ in wanted], [frame for _, frame in wanted])
        for index, image in enumerate(wanted):
            reason = reasons.get(index)
            self.seen[image] = RefusedError(reason) if reason else tuple(shapes[index].tolist())
            self.marks[image[0]] = bytes(marks[index])

    def looked(
        self, names: Sequence[str], frames: Sequence[Frame] | None = None, below: Path | str = ""
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Decode files: their shapes [n, 3], the digests of their bytes [n], and why those are refused that are.

        `names` are theirs from the folder `below`; without `frames` they have none.
        """
        starts = range(0, len(names), LOOK_IMAGES)
        counts = [min(LOOK_IMAGES, len(names) - start) for start in starts]
        pieces = (
            (
                [os.path.join(below, name) for name in names[start : start + count]],
                frames[start : start + count] if frames else [None] * count,
                self.channels,
            )
            for start, count in zip(starts, counts, strict=True)
        )
        # Sets of one dataset are looked at one after the other, each as work of its own.
        name = f"read {self.count}" if self.count else "read"
        self.count += len(names)
        shapes, marks = np.zeros((len(names), 3), np.int32), np.zeros(len(names), MARK)
        reasons: dict[int, str] = {}
        for start, arrays in zip(starts, current().map(name, _look, pieces, counts), strict=True):
            shapes[start : start + len(arrays["shapes"])] = arrays["shapes"]
            marks[start : start + len(arrays["marks"])] = arrays["marks"]
            reasons |= {start + index: reason for index, reason in enumerate(arrays["reasons"].tolist()) if reason}
        return shapes, marks, reasons

    def shape(self, path: Path, frame: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Decode an image for its shape [c, H, W], as reading will: a truncated file shows only here.

        Raises RefusedError.
        """
        if (path, frame) in self.seen:
            self.use(path)
            found = self.seen[path, frame]
            if isinstance(found, RefusedError):
                raise found
            return found
        channels, height, width = decode(self.use(path), self.channels, frame).shape
        return channels, height, width

    def source(
        self,
        classes: list[str],
        annotations: Sequence[str],
        *,
        size: tuple[int, int],
        fit: Fit,
        validation: float,
        test: float,
        segments: Sequence[str] = (),
    ) -> Source:
        """Make the source of all good images, fitted to one `size`. Raises NoImagesError where there is none."""
        self._agree()
        parts = list(self.records.values())
        # One part stays what it is: a folder's makes its records only when they are asked for.
        records = parts[0] if len(parts) == 1 else list(itertools.chain(*parts))
        if not records:
            raise NoImagesError(self.root, self.quarantined)
        published: Published = {}
        for name, part in self.records.items():
            start = sum(map(len, published.values()))
            published = {**published, name: range(start, start + len(part))}
        labels = [record.label for record in records]
        owned = published_splits(published, lambda index: self._mark(records[index]), labels, validation, test)
        channels = self.channels

        def samples(split: str) -> Iterator[Sample]:
            return draw((records[index] for index in owned[split]), size, fit, channels)

        def rows(split: str, start: int, stop: int) -> Callable[[], Iterator[Sample]]:
            return functools.partial(draw, [records[index] for index in owned[split][start:stop]], size, fit, channels)

        boxed = owned if "boxes" in annotations else dict.fromkeys(SPLITS, ())
        left_out = {split: sum(_left_out(records[index], size, fit) for index in boxed[split]) for split in SPLITS}
        return Source(
            classes,
            {split: len(owned[split]) for split in SPLITS},
            samples,
            sorted(self.quarantined, key=lambda entry: entry["file"]),
            annotations=annotations,
            segments=list(segments),
            left_out=left_out,
            files=sorted(self.files),
            rows=rows,
        )

    def _mark(self, record: Record) -> bytes:
        return record.mark or self.marks.get(record.path) or digest(record.path)

    def _agree(self) -> None:
        """Keep the images with the most frequent number of channels: a pack has one."""
        counts = Counter(record.shape[0] for part in self.records.values() for record in part)
        if len(counts) < 2:
            return
        most = max(counts, key=lambda count: (counts[count], -count))
        for name, part in self.records.items():
            for record in part:
                if record.shape[0] != most:
                    self.refuse(record.path, f"has {record.shape[0]} channels, and most images here have {most}")
            self.records[name] = [record for record in part if record.shape[0] == most]


def _look(names: Sequence[str], frames: Sequence[Frame], channels: Channels) -> Arrays:
    """Decode images: their shapes [n, 3], the hashes of their files' bytes, and why those are refused that are."""
    shapes, marks, reasons = np.zeros((len(names), 3), np.int64), np.zeros(len(names), MARK), [""] * len(names)
    for index, (name, frame) in enumerate(zip(names, frames, strict=True)):
        try:
            shapes[index] = decode(Path(name), channels, frame).shape
            marks[index] = digest(Path(name))
        except RefusedError as reason:
            reasons[index] = str(reason)
    return {"shapes": shapes, "marks": marks, "reasons": np.array(reasons)}


def draw(records: Iterable[Record], size: tuple[int, int], fit: Fit, channels: Channels) -> Iterator[Sample]:
    """Read images, fitted to one size."""
    for record in records:
        yield sample(record, place(record.shape[1:], size, fit), channels)


def sample(record: Record, placing: Placing, channels: Channels) -> Sample:
    """Read an image, and fit it with its annotations."""
    boxes, flags, instances, semantic = record.boxes, record.box_flags, None, None
    if record.instances:
        instances = placing.mask(record.instances(), 0)
    if record.semantic:
        semantic = placing.mask(record.semantic(), NOT_JUDGED)
    if boxes is not None:
        flags = np.zeros(len(boxes), np.uint8) if flags is None else flags
        boxes, kept = placing.boxes(boxes)
        flags = flags[kept]
        if instances is not None:
            # Boxes are counted anew without those that are cut away, whose pixels fall to the background.
            numbers = np.concatenate([[0], np.where(kept, kept.cumsum(), 0)])
            instances = numbers[instances]
    return Sample(
        placing.image(decode(record.path, channels, record.frame)),
        record.label,
        boxes,
        flags,
        instances,
        semantic,
        record.presence,
        record.origin,
    )


def _left_out(record: Record, size: tuple[int, int], fit: Fit) -> int:
    if record.boxes is None or not len(record.boxes):
        return 0
    return int((~place(record.shape[1:], size, fit).boxes(record.boxes)[1]).sum())


def named(folder: Path, name: str) -> Path:
    """Give the path of a file that an annotation names below `folder`.

    Raises RefusedError where the name leads out of the folder, by itself; links are followed as everywhere.
    """
    path = PurePosixPath(name)
    if not name.strip() or not name.isprintable():  # also what is no UTF-8
        raise RefusedError(f"found {name!r}; a file must be named, in characters that can be shown")
    if "\\" in name or (len(name) > 1 and name[1] == ":"):
        raise RefusedError(f"found '{name}'; write the path with '/', from the dataset's own folder")
    if path.is_absolute() or ".." in path.parts:
        raise RefusedError(f"'{name}' leads out of the dataset's folder; write the path from there")
    return folder / path
