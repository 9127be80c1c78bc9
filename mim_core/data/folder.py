"""A folder of images: flat and unlabelled, or one sub-folder a class (torchvision's ImageFolder layout).

Files that are no readable image are left out and listed with the reason; nothing is dropped in silence but names that
begin with a point, which systems leave behind.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from mim_core.data.fit import Fit
from mim_core.data.images import Channels
from mim_core.data.pack import Source
from mim_core.data.records import Found, Record
from mim_core.data.splits import Share
from mim_core.spec import Pair


def folder(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read a folder of images, fitted to one `size_px` (height, width) in px.

    Sub-folders are classes; images directly in `root` have no label. `validation` and `test` are shares of each class.
    An image's split follows from a hash of its bytes, so copies of one image never lie in two splits. An image's origin
    is its position in the sorted list of readable files. EXIF rotation is applied. Raises ValueError where there is no
    readable image.
    """
    found = Found(root, channels)
    images = scan(found)
    tops = [name.partition("/")[0] if "/" in name else "" for name in images.names]
    classes = sorted({top for top in tops if top})
    numbers = {"": -1, **{name: number for number, name in enumerate(classes)}}
    images.labels[:] = [numbers[top] for top in tops]
    found.records["train"] = images
    annotations = ("labels",) if classes else ()
    source = found.source(classes, annotations, size=size_px, fit=fit, validation=validation, test=test)
    return replace(source, files=Paths(root, images.names))


@dataclass(frozen=True)
class Paths(Collection[Path]):
    """Files by their names below a folder. A path takes several times the memory, and is made when it is asked for."""

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Path]:
        return (self.root / name for name in self.names)

    def __contains__(self, path: object) -> bool:
        return any(path == one for one in self)


@dataclass(frozen=True)
class Images(Sequence[Record]):
    """The images of a folder, `names` from there; a record is made when it is asked for.

    `shapes` [n, 3] (c, H, W), `marks` [n] (digests of the files) and `labels` [n] are theirs.
    """

    root: Path
    names: Sequence[str]
    shapes: np.ndarray
    marks: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        channels, height, width = self.shapes[index].tolist()
        return Record(
            self.root / self.names[index],
            (channels, height, width),
            label=int(self.labels[index]),
            origin=(range(len(self))[index],),
            mark=bytes(self.marks[index]),
        )


def scan(found: Found) -> Images:
    """Find the readable images of a dataset's folder, sorted by the parts of their names; the others are refused.

    Links are followed, and each real folder is read once, so that a link to a folder above ends. Nothing has a label.
    """
    names: list[str] = []

    def refuse(path: str, reason: object) -> None:
        name = os.fsencode(os.path.relpath(path, found.root)).decode(errors="backslashreplace")
        found.refuse(Path(name).as_posix(), reason)

    def unlisted(error: OSError) -> None:
        refuse(error.filename, f"the folder cannot be listed ({error.strerror})")

    seen: set[str] = set()
    for at, folders, files in os.walk(found.root, onerror=unlisted, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            refuse(at, "a link to a folder that is read already under another name")
            folders.clear()
            continue
        seen.add(real)
        # Real folders before links, so that a folder keeps its own name where a link to it stands beside it.
        folders[:] = sorted(visible(folders), key=lambda name: (os.path.islink(os.path.join(at, name)), name))
        inside = Path(at).relative_to(found.root).as_posix()
        for file in visible(files):
            name = file if inside == "." else f"{inside}/{file}"
            if _is_utf8(name):
                names.append(name)
            else:
                refuse(os.path.join(at, file), "the file's name is not UTF-8; rename it")
    names.sort(key=lambda name: name.replace("/", "\0"))  # no name has that, and it comes before all that one has
    shapes, marks, reasons = found.looked(names, below=found.root)
    for index, reason in reasons.items():
        found.refuse(names[index], reason)
    found.quarantined.sort(key=lambda entry: entry["file"])
    good = np.delete(np.arange(len(names)), list(reasons))
    labels = np.full(len(good), -1, np.int64)
    return Images(found.root, [names[index] for index in good], shapes[good], marks[good], labels)


def visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
