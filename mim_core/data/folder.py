"""A folder of images: flat and unlabelled, or one sub-folder a class (torchvision's ImageFolder layout).

Files that are no readable image are left out and listed with the reason; nothing is dropped in silence but names that
begin with a point, which systems leave behind.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from mim_core.data.pack import SPLITS, Sample, Source
from mim_core.spec import Pair

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def folder(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    test: Annotated[float, Field(ge=0, lt=1)] = 0.1,
) -> Source:
    """Read a folder of images as RGB of one `size_px` (height, width) in px: scaled to cover it, then centre cropped.

    Sub-folders are classes; images directly in `root` have no label. `validation` and `test` are shares of each class.
    An image's split follows from a hash of its bytes, so copies of one image never lie in two splits. An image's origin
    is its position in the sorted list of readable files. Raises ValueError where there is no readable image.
    """
    readable, quarantined = scan(root)
    if not readable:
        raise ValueError(
            f"{root}: found no readable image ({len(quarantined)} files refused); add images and run again"
        )
    classes = sorted({path.relative_to(root).parts[0] for path in readable if path.parent != root})
    owned = split_files(root, readable, validation, test)

    def samples(split: str) -> Iterator[Sample]:
        for index in owned[split]:
            path = readable[index]
            label = classes.index(path.relative_to(root).parts[0]) if path.parent != root else -1
            yield Sample(decode(path, size_px), label, origin=(index,))

    counts = {split: len(owned[split]) for split in SPLITS}
    return Source(classes, counts, samples, quarantined, annotations=("labels",) if classes else ())


def scan(root: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """Find the readable images under `root`, sorted, and the refused files, each with its `file` and `reason`.

    Links are followed, and each real folder is read once, so that a link to a folder above ends.
    """
    readable: list[Path] = []
    quarantined: list[dict[str, str]] = []

    def quarantine(path: str | Path, reason: str) -> None:
        name = os.fsencode(os.path.relpath(path, root)).decode(errors="backslashreplace")
        quarantined.append({"file": Path(name).as_posix(), "reason": reason})

    def unlisted(error: OSError) -> None:
        quarantine(error.filename, f"the folder cannot be listed ({error.strerror})")

    seen: set[str] = set()
    for at, folders, files in os.walk(root, onerror=unlisted, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            quarantine(at, "a link to a folder that is read already under another name")
            folders.clear()
            continue
        seen.add(real)
        # Real folders before links, so that a folder keeps its own name where a link to it stands beside it.
        folders[:] = sorted(_visible(folders), key=lambda name: (os.path.islink(os.path.join(at, name)), name))
        for path in (Path(at, name) for name in _visible(files)):
            reason = refuse(path) if _is_utf8(path.relative_to(root)) else "the file's name is not UTF-8; rename it"
            if reason:
                quarantine(path, reason)
            else:
                readable.append(path)
    return sorted(readable), sorted(quarantined, key=lambda entry: entry["file"])


def _visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(path: Path) -> str:
    """Say why a file cannot be used as an image; empty where it can."""
    try:
        status = path.stat()
    except OSError as error:
        return f"the file cannot be reached ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        return "not a file with content but a pipe, socket or device"
    if status.st_size == 0:
        return "the file is empty"
    if path.suffix.lower() not in EXTENSIONS:
        return f"'{path.suffix}' is not one of the image extensions {sorted(EXTENSIONS)}"
    try:
        _upright(path)  # decodes all of it, as reading will: a truncated file shows only here
    except PermissionError as error:
        return f"the file cannot be read ({error.strerror})"
    except UnidentifiedImageError:
        return "the content is no image of a known format"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"over Pillow's limit of {Image.MAX_IMAGE_PIXELS} px, meant against files made to fill the memory"
    except Exception as error:  # decoders raise many types, and any of them means the same here
        return f"the image cannot be decoded ({error})"
    return ""


def short_side(path: Path) -> int:
    """The shorter of an image's height and width in px, without decoding it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path) as image:
            return min(image.size)


def split_files(root: Path, paths: list[Path], validation: float, test: float) -> dict[str, list[int]]:
    """Share files out over the splits within each class, by a hash of their bytes; gives indices into `paths`.

    What rounding leaves over in one class is made up in the next, so that the shares hold over classes of a few images
    too; each class keeps an image for training.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    seen: dict[str, str] = {}
    for index, path in enumerate(paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        name = path.relative_to(root).parts[0] if path.parent != root else ""
        # A copy under another class stays with the first one's group, and so in its split.
        groups.setdefault(seen.setdefault(digest, name), {}).setdefault(digest, []).append(index)
    owned: dict[str, list[int]] = {split: [] for split in SPLITS}
    images = all_tested = all_validated = 0
    for copies in groups.values():
        digests = sorted(copies)
        images += len(digests)
        tested = min(round(test * images) - all_tested, len(digests) - 1)
        validated = min(round(validation * images) - all_validated, len(digests) - 1 - tested)
        all_tested, all_validated = all_tested + tested, all_validated + validated
        for rank, digest in enumerate(digests):
            split = "test" if rank < tested else "validation" if rank < tested + validated else "train"
            owned[split].extend(copies[digest])
    return {split: sorted(indices) for split, indices in owned.items()}


def decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode an image upright as RGB uint8 [3, H, W], scaled to cover `size` and cropped to its centre."""
    fitted = ImageOps.fit(_upright(path), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(fitted).transpose(2, 0, 1)


def _upright(path: Path) -> Image.Image:
    """Decode an image as RGB of 8 bits, turned as its EXIF says, on white where it is transparent.

    16 bits are scaled by their whole range, never by the image's own, so that images stay comparable.
    Raises what Pillow raises, and ValueError where the range of the pixels is unknown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # damage in EXIF or tags, beside the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    if not (pixels.min() >= 0 and pixels.max() <= white):
        found = f"pixels from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"{found} are not within 0 and {white:g}; save it with 8 or 16 bits a channel")
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
