"""The form of PASCAL VOC 2007 and 2012 (Everingham et al. 2010, and the development kit's manual)."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Annotated, Literal
from xml.etree.ElementTree import Element

import numpy as np
import scipy
from pydantic import BeforeValidator, Field

from mim_core.data.annotations import box_inside, read_lines, read_xml
from mim_core.data.fit import Fit
from mim_core.data.images import EXTENSIONS, Channels, RefusedError, read_values
from mim_core.data.pack import DIFFICULT, NOT_JUDGED, Source
from mim_core.data.records import Found, Record
from mim_core.data.splits import Share
from mim_core.spec import Pair

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
Names = Annotated[
    tuple[str, ...],
    Field(min_length=1, max_length=254),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
LISTS = {"main": "Main", "segmentation": "Segmentation"}
MASKS = ("SegmentationClass", "SegmentationObject")


def voc(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    lists: Literal["main", "segmentation"] = "main",
    classes: Names = CLASSES,
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read a folder such as VOC2007 or VOC2012: JPEGImages, Annotations, ImageSets, SegmentationClass and -Object.

    `lists` picks ImageSets/Main, for boxes and presence, or ImageSets/Segmentation, which has masks too. `train.txt`,
    `val.txt` and `test.txt` there are the splits; a test list without annotations is passed over, as VOC2012's. Where
    there is no other test list, val is the test split and `validation` is a share of the training images by a hash of
    their bytes; `trainval.txt` is read only where neither train.txt nor val.txt is there.

    Boxes count pixels from 1, both ends inside, so (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax, ymax),
    clipped to the image. A class of which an image has difficult objects alone is not judged in `presence`. Masks are
    palette images: 0 background, 255 the border, which no one judges. An object's mask belongs to the box of its class
    that it overlaps most. An image is left out whole where a part of its annotation is broken.

    An image is read as it is stored where that has the size that its annotation says, and turned as its EXIF says only
    where this gives it. Its origin is its place in the sorted names. Not used are `folder`, `filename`, `source`,
    `owner`, `depth`, `segmented`, an object's `pose`, `truncated`, `occluded`, `part`, `point` and `actions`, the lists
    a class, and ImageSets/Layout and /Action. Raises ValueError where a folder or list is missing or nothing is good.
    """
    found = Found(root, channels)
    _check_folders(root)
    named = _names(root, LISTS[lists], found)
    for folder in LISTS.values():  # a copy of the dataset serves both
        if folder != LISTS[lists] and (root / "ImageSets" / folder).is_dir():
            _note(root, _names(root, folder, Found(root, channels)), found)
    _note(root, named, found)
    places = {name: place for place, name in enumerate(sorted({name for names in named.values() for name in names}))}
    for kind, names in named.items():
        records: list[Record] = []
        found.records[kind] = records
        for name in names:
            image = _image(root, name)
            try:
                record = _read(root, name, image, classes, lists == "segmentation", places[name], found)
            except RefusedError as reason:
                found.refuse(image, reason)
            else:
                records.append(record)
    segmented = lists == "segmentation"
    return found.source(
        list(classes),
        ("boxes", "instances", "presence", "semantic") if segmented else ("boxes", "presence"),
        size=size_px,
        fit=fit,
        validation=validation,
        test=test,
        segments=["background", *classes] if segmented else [],
    )


def _check_folders(root: Path) -> None:
    missing = [name for name in ("JPEGImages", "Annotations", "ImageSets") if not (root / name).is_dir()]
    if missing:
        years = sorted(path.name for path in root.glob("VOC2*"))
        hint = f"it has {years}; give one of them" if years else "give a folder such as VOC2012"
        raise ValueError(f"{root}: {missing} are not there; a VOC folder has them; {hint}")


def _names(root: Path, folder: str, found: Found) -> dict[str, list[str]]:
    """Names of images by set; each name once."""
    at = root / "ImageSets" / folder
    sets = [kind for kind in ("train", "val", "test") if (at / f"{kind}.txt").is_file()]
    files = {kind: at / f"{kind}.txt" for kind in sets}
    if not files.keys() & {"train", "val"}:
        files["train"] = at / "trainval.txt"
    named: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for kind, path in files.items():
        named[kind] = []
        for number, line in read_lines(found.use(path), root):
            place = f"{path.relative_to(root).as_posix()} line {number}"
            if len(line.split()) > 1 or Path(line).name != line or not line.isprintable():
                found.refuse(place, f"found {line!r}; a line is the name of one image without its ending")
            elif line in owner:
                found.refuse(place, f"'{line}' is listed in {owner[line]} already; an image has one set")
            else:
                owner[line] = place
                named[kind].append(line)
    hidden = named.get("test", [])
    if hidden and not any(os.path.exists(root / "Annotations" / f"{name}.xml") for name in hidden):
        found.refuse(files["test"], f"none of its {len(hidden)} images has an annotation, so it is no test set")
        del named["test"]
    return named


def _note(root: Path, named: dict[str, list[str]], found: Found) -> None:
    for name in (name for names in named.values() for name in names):
        found.use(_image(root, name))
        found.use(root / "Annotations" / f"{name}.xml")
        for folder in MASKS:
            found.use(root / folder / f"{name}.png")
    for path in sorted((root / "ImageSets").glob("[MS]*/*.txt")):
        if path.parent.name in LISTS.values() and path.stem in ("train", "val", "trainval", "test"):
            found.use(path)


def _image(root: Path, name: str) -> Path:
    paths = [root / "JPEGImages" / f"{name}{ending}" for ending in (".jpg", *sorted(EXTENSIONS))]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _read(
    root: Path, name: str, image: Path, classes: tuple[str, ...], segmented: bool, place: int, found: Found
) -> Record:
    annotation = read_xml(root / "Annotations" / f"{name}.xml")
    frame = (int(_number(annotation, "size/height")), int(_number(annotation, "size/width")))
    shape = found.shape(image, frame)
    boxes = np.zeros((0, 5))
    flags = np.zeros(0, np.uint8)
    presence = np.zeros(len(classes), np.int8)
    for index, thing in enumerate(annotation.findall("object")):
        try:
            box, label, flag = _object(thing, classes, frame)
        except RefusedError as reason:
            raise RefusedError(f"{name}.xml object {index + 1}: {reason}") from None
        boxes, flags = np.concatenate([boxes, [[*box, label]]]), np.append(flags, np.uint8(flag))
        if presence[label] != 1:
            presence[label] = -1 if flag else 1
    instances = semantic = None
    if segmented:
        paths = [root / folder / f"{name}.png" for folder in MASKS]
        lookup = _numbers(read_values(paths[0]), read_values(paths[1]), boxes, len(classes), frame)
        semantic = functools.partial(read_values, paths[0])
        instances = functools.partial(_renumbered, paths[1], lookup)
    return Record(
        image,
        shape,
        frame,
        presence=presence,
        boxes=boxes,
        box_flags=flags,
        instances=instances,
        semantic=semantic,
        origin=(place,),
    )


def _number(element: Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise RefusedError(f"'{path}' is missing")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RefusedError(f"{path}: found '{text[:60]}'; it must be a finite number")
    return number


def _object(
    thing: Element, classes: tuple[str, ...], frame: tuple[int, int]
) -> tuple[tuple[float, float, float, float], int, int]:
    """The box, class and flags of an object."""
    name = (thing.findtext("name") or "").strip()
    if name not in classes:
        raise RefusedError(f"its class '{name[:60]}' is not among the {len(classes)} classes")
    left, top, right, bottom = (_number(thing, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    difficult = (thing.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise RefusedError(f"difficult: found '{difficult[:60]}'; it must be 0 or 1")
    box = box_inside((left - 1, top - 1, right, bottom), frame)
    return box, classes.index(name), DIFFICULT * int(difficult)


def _numbers(
    classes: np.ndarray, objects: np.ndarray, boxes: np.ndarray, count: int, frame: tuple[int, int]
) -> np.ndarray:
    """Check an image's two masks; gives the box's number, from 1 on, of each value of the object mask [256]."""
    for folder, mask in zip(MASKS, (classes, objects), strict=True):
        if mask.shape != frame:
            raise RefusedError(
                f"{folder}: the mask is {mask.shape[0]} x {mask.shape[1]} px, the image {frame[0]} x {frame[1]}"
            )
    worst = int(classes[classes != NOT_JUDGED].max(initial=0))
    if worst > count:
        raise RefusedError(f"{MASKS[0]}: found the value {worst}; values are 0 to {count}, and 255")
    lookup = np.zeros(256, np.uint8)
    values = [int(value) for value in np.unique(objects) if value not in (0, NOT_JUDGED)]
    if not values:
        return lookup
    overlaps = np.full((len(values), len(boxes)), -1.0)
    for row, value in enumerate(values):
        inside = objects == value
        votes = np.bincount(classes[inside], minlength=256)
        label = int(votes[1:NOT_JUDGED].argmax())
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        same = boxes[:, 4] == label if votes[label + 1] else np.zeros(len(boxes), bool)
        overlaps[row, same] = _overlap(tight, boxes[same, :4])
    for row, column in zip(*scipy.optimize.linear_sum_assignment(overlaps, maximize=True), strict=True):
        if overlaps[row, column] > 0:
            lookup[values[row]] = column + 1
    lost = [value for value in values if not lookup[value]]
    if lost:
        raise RefusedError(f"{MASKS[1]}: object {lost[0]} overlaps no box of its class in {MASKS[0]}")
    return lookup


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box with others [n]."""
    inner = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = inner.clip(0).prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
    return np.asarray(shared / union)


def _renumbered(path: Path, lookup: np.ndarray) -> np.ndarray:
    return np.asarray(lookup[read_values(path)])
