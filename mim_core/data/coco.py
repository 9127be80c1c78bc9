"""Objects in the form of COCO's instances files (Lin et al. 2014, https://cocodataset.org/#format-data)."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pycocotools import mask as rle  # type: ignore[import-untyped]
from pydantic import Field, FiniteFloat, PositiveInt

from mim_core.data.annotations import Entry, box_inside, by_number, entry, read_json
from mim_core.data.fit import Fit
from mim_core.data.images import Channels, RefusedError
from mim_core.data.pack import CROWD, NOT_JUDGED, Source
from mim_core.data.records import Found, Record, named
from mim_core.data.splits import Share
from mim_core.spec import Pair

Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Frame = tuple[int, int]


class Category(Entry):
    id: Id
    name: Annotated[str, Field(min_length=1)]


class Image(Entry):
    id: Id
    file_name: str
    width: PositiveInt
    height: PositiveInt


class Object(Entry):
    id: Id
    image_id: Id
    category_id: Id
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    """left, top, width, height in px"""
    segmentation: Any = None
    iscrowd: Literal[0, 1] = 0


def coco(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    masks: Literal["auto", "none"] = "auto",
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read `annotations/instances_<set>.json`, whose images lie in `<set>/`, `images/<set>/`, `images/` or `root`.

    Also the form `<set>/_annotations.coco.json`, images beside it. A set is train..., val... or test...; a single file
    of any name is the training set. Where there is no test set, as in COCO itself, val is the test split, and
    `validation` is a share of the training set by a hash of the images' bytes; so is `test` where there is only one
    set. Boxes come with the crowd flag; masks (polygons, run lengths as numbers or text) become instances unless
    `masks` is none, smaller objects over larger ones and those over crowds, and every object must have one if any has.
    Of more than 254 classes there are no semantic maps, for 255 means not judged.
    Boxes are clipped to their image. An image is left out whole where one of its annotations is broken, for the rest
    would say that nothing is there.

    An image is read as it is stored where that has the file's `width` and `height`, and turned as its EXIF says only
    where this gives them, so that boxes stay in place. Its origin is its id. Not used are `info`, `licenses`, an
    image's `license`, `coco_url`, `flickr_url` and `date_captured`, an annotation's `area`, `keypoints` and
    `num_keypoints`, a category's `supercategory`, `keypoints` and `skeleton`; and images that no file lists.
    Raises ValueError where a file is missing or no such JSON, or categories are broken or differ between the sets.
    """
    found = Found(root, channels)
    files = {
        kind: (path, read_json(found.use(path), root, "images", "annotations", "categories"), folders)
        for kind, (path, folders) in _sets(root).items()
    }
    contents = [content for _, content, _ in files.values()]
    with_masks = masks == "auto" and any(
        isinstance(value, dict) and value.get("segmentation")
        for content in contents
        for value in content["annotations"]
    )
    known: dict[int, str] = {}
    for path, content, _ in files.values():
        where = path.relative_to(root).as_posix()
        names = by_number(content["categories"], Category, where)
        if known and names != known:
            raise ValueError(
                f"{where}: categories differ from those of the other sets; all sets need the same ids and names"
            )
        known = names
    numbers = {number: place for place, number in enumerate(sorted(known))}
    for kind, (path, content, folders) in files.items():
        where = path.relative_to(root).as_posix()
        found.records[kind] = _records(content, where, folders, numbers, with_masks, found)
    classes = [known[number] for number in sorted(known)]
    return found.source(
        classes,
        ("boxes", "instances") if with_masks else ("boxes",),
        size=size_px,
        fit=fit,
        validation=validation,
        test=test,
        segments=["background", *classes] if with_masks and len(classes) < NOT_JUDGED else [],
    )


def _records(
    content: dict[str, list[Any]],
    where: str,
    folders: Sequence[Path],
    numbers: dict[int, int],
    with_masks: bool,
    found: Found,
) -> list[Record]:
    """The good images of one set; `numbers` gives the classes by the categories' ids."""
    images = _images(content["images"], where, folders, found)
    objects = _objects(content["annotations"], where, images, found)
    records: list[Record] = []
    found.look((listed[1], (listed[0].height, listed[0].width)) for listed in images.values() if listed)
    for number, listed in images.items():
        if listed is None:
            continue
        image, file = listed
        try:
            frame = (image.height, image.width)
            shape = found.shape(file, frame)
            mine = [checked(value, place, numbers, frame, with_masks) for place, value in objects.get(number, [])]
        except RefusedError as reason:
            found.refuse(file, reason)
            continue
        boxes = np.array([box for box, *_ in mine], np.float64).reshape(-1, 5)
        flags = np.array([flag for _, flag, _ in mine], np.uint8)
        instances = functools.partial(paint, [part for *_, part in mine], flags, frame) if with_masks else None
        record = Record(file, shape, frame, boxes=boxes, box_flags=flags, instances=instances, origin=(number,))
        records.append(record)
    return records


def _sets(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Annotation files by set, each with the folders where its images may lie."""
    sets: dict[str, tuple[Path, list[Path]]] = {}
    files = sorted(root.glob("annotations/instances_*.json"))
    named_sets = [(path, path.stem.removeprefix("instances_")) for path in files]
    if not files:
        named_sets = [(path, path.parent.name) for path in sorted(root.glob("*/_annotations.coco.json"))]
    if not named_sets:
        raise ValueError(
            f"{root}: found neither annotations/instances_*.json nor <set>/_annotations.coco.json; "
            "the annotations are one of the two; check the path"
        )
    for path, name in named_sets:
        kind = next((kind for kind in ("train", "val", "test") if name.startswith(kind)), "")
        kind = "train" if len(named_sets) == 1 else kind
        if not kind or kind in sets:
            names = [name for _, name in named_sets]
            raise ValueError(
                f"{root}: found the sets {names}; one each of train, val and test is read; take others out"
            )
        beside = [root / name, root / "images" / name, root / "images", root]
        sets[kind] = (path, beside if files else [path.parent])
    return sets


def _images(
    entries: list[Any], where: str, folders: Sequence[Path], found: Found
) -> dict[int, tuple[Image, Path] | None]:
    """The images by id, each with its file, or None where it is refused, as those are that share an id or a file."""
    read: list[tuple[str, Image]] = []
    for index, value in enumerate(entries):
        try:
            read.append((f"{where}: images[{index}]", entry(Image, value)))
        except RefusedError as reason:
            found.refuse(f"{where}: images[{index}]", reason)
    # Of images that share something nobody can say whose the boxes are.
    ids = Counter(image.id for _, image in read)
    names = Counter(image.file_name for _, image in read)
    images: dict[int, tuple[Image, Path] | None] = dict.fromkeys(ids)
    for place, image in read:
        try:
            if ids[image.id] > 1:
                raise RefusedError(f"the id {image.id} is that of {ids[image.id]} images; each needs its own")
            if names[image.file_name] > 1:
                raise RefusedError(f"'{image.file_name}' is listed {names[image.file_name]} times, under several ids")
            paths = [named(folder, image.file_name) for folder in folders]
        except RefusedError as reason:
            found.refuse(place, reason)
            continue
        # Where it is nowhere, the first place is named in the reason.
        images[image.id] = image, next((path for path in paths if os.path.isfile(path)), paths[0])
    return images


def _objects(
    entries: list[Any], where: str, images: dict[int, tuple[Image, Path] | None], found: Found
) -> dict[int, list[tuple[str, Any]]]:
    """Annotations by image, unchecked, each with its place; those of no image that is listed are refused."""
    objects: dict[int, list[tuple[str, Any]]] = {}
    seen: dict[Any, str] = {}
    for index, value in enumerate(entries):
        place = f"{where}: annotations[{index}]"
        owner = value.get("image_id") if isinstance(value, dict) else None
        if type(owner) is not int or owner not in images:
            found.refuse(place, f"it is of the image {owner!r}, which the file does not list")
            continue
        number = value.get("id")
        if type(number) is int and seen.setdefault(number, place) != place:
            value = RefusedError(
                f"the id {number} is that of annotations{seen[number].rpartition('annotations')[2]} too"
            )
        objects.setdefault(owner, []).append((place, value))
    return objects


def checked(
    value: Any, place: str, numbers: dict[int, int], frame: Frame, with_mask: bool
) -> tuple[tuple[float, ...], int, Any]:
    """Check one annotation of an image; gives its box with its class, its flag, and its mask as run lengths."""
    try:
        if isinstance(value, RefusedError):
            raise value
        found = entry(Object, value)
        if found.category_id not in numbers:
            raise RefusedError(f"category_id: found {found.category_id}, which is not among the categories")
        left, top, width, height = found.bbox
        box = box_inside((left, top, left + width, top + height), frame)
        part = run_lengths(found.segmentation, frame) if with_mask else None
    except RefusedError as reason:
        raise RefusedError(f"{place}: {reason}") from None
    return (*box, numbers[found.category_id]), CROWD * found.iscrowd, part


def run_lengths(segmentation: Any, frame: Frame) -> dict[str, Any]:
    """Check a mask and give it as COCO's compressed run lengths.

    It is a list of polygons [x, y, x, y, ...] in px, or run lengths down the columns as numbers or as COCO's text.
    Raises RefusedError. All is checked before pycocotools sees it, whose C code trusts its input.
    """
    height, width = frame
    if isinstance(segmentation, list) and segmentation:
        for index, polygon in enumerate(segmentation):
            where = f"segmentation[{index}]"
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                found = f"{len(polygon)} numbers" if isinstance(polygon, list) else type(polygon).__name__
                raise RefusedError(f"{where}: found {found}; a polygon has pairs of coordinates, three at least")
            if not all(type(number) in (int, float) for number in polygon):
                raise RefusedError(f"{where}: a coordinate is no number")
            points = np.array(polygon, np.float64).reshape(-1, 2)
            # The size's own distance beyond the edges is far more than rounding; NaN fails as well.
            if not ((points >= (-width, -height)) & (points <= (2 * width, 2 * height))).all():
                raise RefusedError(f"{where}: coordinates reach far beyond the image, or are no finite numbers")
        merged: dict[str, Any] = rle.merge(rle.frPyObjects(segmentation, height, width))
        return merged
    if not isinstance(segmentation, dict):
        raise RefusedError(f"segmentation: found {type(segmentation).__name__}; it must be polygons or run lengths")
    if segmentation.get("size") != [height, width]:
        raise RefusedError(f"segmentation.size: found {segmentation.get('size')}; the image is {[height, width]}")
    counts = segmentation.get("counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise RefusedError("segmentation.counts: run lengths are numbers from 0 on, or COCO's text for them")
    if sum(runs) != height * width:
        raise RefusedError(f"segmentation.counts: they add up to {sum(runs)} px; the image has {height * width}")
    packed: dict[str, Any] = rle.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return packed


def _uncompressed(text: str) -> list[int]:
    """Read COCO's text: numbers of 5 bits a character, lowest first; from the fourth on, less the last but one.

    Raises RefusedError where the text ends within a number or has other characters.
    """
    runs: list[int] = []
    number = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            raise RefusedError(f"segmentation.counts: found {letter!r} in COCO's text for run lengths")
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        number -= (1 << shift) if code & 16 else 0
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    if shift:
        raise RefusedError("segmentation.counts: COCO's text for run lengths ends within a number")
    return runs


def paint(parts: list[dict[str, Any]], flags: np.ndarray, frame: Frame) -> np.ndarray:
    """Lay masks over one another as numbers from 1 on [h, w]: crowds, then from the largest to the smallest."""
    instances = np.zeros(frame, np.uint16)
    areas = [int(rle.area(part)) for part in parts]  # one by one: pycocotools takes 255 at once
    for index in sorted(range(len(parts)), key=lambda index: (not flags[index] & CROWD, -areas[index])):
        instances[_decoded(parts[index])] = index + 1
    return instances


def _decoded(part: dict[str, Any]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools hands numpy 2 its arrays in the old way
        return np.asarray(rle.decode(part), bool)
