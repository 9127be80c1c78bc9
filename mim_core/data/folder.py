"""A folder of images: flat and unlabelled, or one sub-folder a class (torchvision's ImageFolder layout).

Files that are no readable image are left out and listed with the reason; nothing is dropped in silence but names that
begin with a point, which systems leave behind.
"""

from __future__ import annotations

import os
from pathlib import Path

from mim_core.data.fit import Fit
from mim_core.data.images import Channels, RefusedError
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
    readable = scan(found)
    classes = sorted({path.relative_to(root).parts[0] for path in readable if path.parent != root})
    found.files.update(readable)
    found.records["train"] = [
        Record(
            path,
            shape,
            label=classes.index(path.relative_to(root).parts[0]) if path.parent != root else -1,
            origin=(index,),
        )
        for index, (path, shape) in enumerate(readable.items())
    ]
    annotations = ("labels",) if classes else ()
    return found.source(classes, annotations, size=size_px, fit=fit, validation=validation, test=test)


def scan(found: Found) -> dict[Path, tuple[int, int, int]]:
    """Find the readable images of a dataset's folder, sorted, with their shapes [c, H, W]; the others are refused.

    Links are followed, and each real folder is read once, so that a link to a folder above ends.
    """
    paths: list[Path] = []

    def refuse(path: str | Path, reason: object) -> None:
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
        for path in (Path(at, name) for name in visible(files)):
            if _is_utf8(path.relative_to(found.root)):
                paths.append(path)
            else:
                refuse(path, "the file's name is not UTF-8; rename it")
    paths.sort()
    found.look((path, None) for path in paths)
    readable: dict[Path, tuple[int, int, int]] = {}
    for path in paths:
        shape = found.seen.pop((path, None))
        if isinstance(shape, RefusedError):
            refuse(path, shape)
        else:
            readable[path] = shape
    found.quarantined.sort(key=lambda entry: entry["file"])
    return readable


def visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
