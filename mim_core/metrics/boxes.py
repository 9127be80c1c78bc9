"""Metrics of boxes and instance masks: average precision as COCO and as PASCAL VOC define it.

COCO's is computed by its own code [1], in memory; VOC's by ours, after the devkit's `VOCevaldet.m` [2]. Boxes are
(left, top, right, bottom) in px with exclusive ends, so that VOC's inclusive pixel numbers give the same areas.

[1] https://github.com/cocodataset/cocoapi, Lin et al., "Microsoft COCO", ECCV 2014
[2] Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as rle  # type: ignore[import-untyped]
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

Rle = dict[str, Any]
"""A mask of an image by runs, as COCO's code holds it."""
LEAST = 0.5
"""Overlap from which VOC counts a detection as right."""
MOST = 100
"""Detections of an image, class by class, that COCO looks at."""
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 10**10)}
"""COCO's ranges of area in square px."""


@dataclass(frozen=True)
class Truth:
    """The objects of one image; `masks` are theirs in the same order, or None.

    `difficult` ones are passed over: neither missed when they are not found nor wrong when they are. `crowd` marks
    regions of many objects, within which any number of detections are passed over.
    """

    boxes: Float[np.ndarray, "m 4"]
    classes: Int[np.ndarray, " m"]
    difficult: Bool[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    masks: Sequence[Rle] | None = None


@dataclass(frozen=True)
class Found:
    """What was detected in one image."""

    boxes: Float[np.ndarray, "m 4"]
    classes: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    masks: Sequence[Rle] | None = None


def encode(masks: Bool[np.ndarray, "m H W"]) -> list[Rle]:
    """Write masks by their runs."""
    return list(rle.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))) if len(masks) else []


def decode(masks: Sequence[Rle], size: tuple[int, int]) -> Bool[np.ndarray, "m H W"]:
    """Undo `encode` for images of `size` (height, width) px."""
    if not masks:
        return np.zeros((0, *size), bool)
    with warnings.catch_warnings():
        # pycocotools 2.0.11 converts its arrays as numpy 1 did.
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded = rle.decode(list(masks))
    return decoded.transpose(2, 0, 1).astype(bool)  # type: ignore[no-any-return]


def coco_ap(
    found: Sequence[Found],
    truth: Sequence[Truth],
    classes: int,
    size: tuple[int, int],
    by: Literal["boxes", "masks"] = "boxes",
) -> dict[str, float]:
    """Give COCO's average precisions over images of `size` (height, width) px, by the overlap of boxes or of masks.

    `ap` is the mean over overlaps 0.5, 0.55 ... 0.95 and over the classes that are there, `ap50` and `ap75` are at one
    overlap; `ap_small`, `ap_medium`, `ap_large` are given where the images are large enough for more than one range and
    there are such objects. An object's area is its mask's where there are masks, else its box's. Difficult objects are
    passed over, which COCO does not know. Raises ValueError where no object is to be found in any image.
    """
    _objects(truth)
    small = size[0] * size[1] <= AREAS["small"][1]
    ranges = {"": (0, 10**10), **({} if small else {f"_{name}": area for name, area in AREAS.items()})}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        judge = _Judge(_coco(truth, classes, size), _coco(found, classes, size), "bbox" if by == "boxes" else "segm")
        judge.params.areaRng = list(ranges.values())
        judge.params.areaRngLbl = list(ranges)
        judge.params.maxDets = [MOST]
        judge.evaluate()
        judge.accumulate()
    # [overlaps, recalls, classes, areas]; -1 where a class has no such object.
    precision = judge.eval["precision"][..., 0]
    parts = {f"ap{name}": precision[..., at] for at, name in enumerate(ranges)}
    parts |= {"ap50": precision[0, ..., 0], "ap75": precision[5, ..., 0]}
    return {name: float(part[part >= 0].mean()) for name, part in parts.items() if (part >= 0).any()}


class _Judge(COCOeval):  # type: ignore[misc]
    """COCO's code, which here passes difficult objects over too."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for one in objects:
                one["ignore"] = one["ignore"] or one["difficult"]


def _coco(images: Sequence[Truth | Found], classes: int, size: tuple[int, int]) -> Any:
    """Write objects as COCO's code wants them; it takes the number 0 for no object, so they count from 1."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        for at, (left, top, right, bottom) in enumerate(image.boxes.tolist()):
            one = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(image.classes[at]),
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
            }
            if image.masks is not None:
                one |= {"segmentation": image.masks[at], "area": float(rle.area(image.masks[at]))}
            if isinstance(image, Truth):
                one |= {"iscrowd": int(image.crowd[at]), "difficult": bool(image.difficult[at])}
            else:
                one |= {"score": float(image.scores[at])}
            annotations.append(one)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "height": size[0], "width": size[1]} for number in range(len(images))],
        "categories": [{"id": index} for index in range(classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def voc_ap(found: Sequence[Found], truth: Sequence[Truth], classes: int) -> dict[str, float]:
    """Give VOC's average precisions at an overlap of 0.5: means over the classes that have objects.

    `voc07_ap` is the mean of the best precision at recalls of at least 0, 0.1 ... 1 (VOC 2007); `voc10_ap` the area
    under the curve whose precision never rises with recall (2010 and later). Difficult objects and crowds are passed
    over.
    Raises ValueError where no object is to be found in any image.
    """
    _objects(truth)
    kinds, verdicts = _verdicts(found, truth, classes)
    counted = [one.classes[~(one.difficult | one.crowd)] for one in truth]
    totals = np.bincount(np.concatenate(counted).astype(np.int64), minlength=classes)
    aps = []
    for index in np.flatnonzero(totals):
        own = verdicts[(kinds == index) & (verdicts >= 0)]
        right = np.cumsum(own)
        aps.append((_eleven_points(right, int(totals[index])), _area(right, int(totals[index]))))
    seven, ten = np.mean(aps, axis=0)
    return {"voc07_ap": float(seven), "voc10_ap": float(ten)}


def _verdicts(found: Sequence[Found], truth: Sequence[Truth], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Judge all detections, in the order of their scores: class, and 1 right, 0 wrong, -1 passed over.

    A detection is held against the object of its image and class with which it overlaps most; the first to come to an
    object is right, later ones are wrong.
    """
    boxes, keys = _gather(found, classes)
    objects, object_keys = _gather(truth, classes)
    passed = np.concatenate([one.difficult | one.crowd for one in truth])
    order = np.argsort(-np.concatenate([one.scores for one in found]), kind="stable")
    boxes, keys = boxes[order], keys[order]
    # Every detection with every object of its image and class.
    by_key = np.argsort(object_keys, kind="stable")
    first, last = (np.searchsorted(object_keys[by_key], keys, side) for side in ("left", "right"))
    counts = last - first
    one = np.repeat(np.arange(len(keys)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    other = by_key[np.repeat(first, counts) + within]
    overlap = _overlaps(boxes[one], objects[other])
    best = np.full(len(keys), -1.0)
    np.maximum.at(best, one, overlap)
    at_best = np.flatnonzero(overlap == best[one])
    judged, at = np.unique(one[at_best], return_index=True)
    chosen = np.full(len(keys), -1)
    chosen[judged] = other[at_best[at]]
    hits = np.flatnonzero(best >= LEAST)
    verdicts = np.zeros(len(keys), np.int64)
    verdicts[hits[np.unique(chosen[hits], return_index=True)[1]]] = 1
    verdicts[hits[passed[chosen[hits]]]] = -1
    return keys % classes, verdicts


def _gather(images: Sequence[Truth | Found], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Give all images' boxes in one array, and a number for each box's image and class together."""
    boxes = np.concatenate([one.boxes.reshape(-1, 4) for one in images]).astype(np.float64)
    keys = [number * classes + one.classes.astype(np.int64) for number, one in enumerate(images)]
    return boxes, np.concatenate(keys)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [m, 4] with others [m, 4], one by one."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    inner = sides.clip(0).prod(1)
    return np.asarray(inner / (_areas(boxes) + _areas(others) - inner))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(1))


def _eleven_points(right: np.ndarray, total: int) -> float:
    """VOC 2007's average precision; `right` counts right detections up to each."""
    precision = right / np.arange(1, len(right) + 1)
    # In whole numbers: 3 of 10 objects are a recall of 0.3, which 3 * 0.1 passes in floating point.
    bests = [precision[10 * right >= tenth * total].max(initial=0) for tenth in range(11)]
    return float(np.mean(bests))


def _area(right: np.ndarray, total: int) -> float:
    """VOC 2010's average precision."""
    precision = right / np.arange(1, len(right) + 1)
    never_rising = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(right, prepend=0) / total * never_rising).sum())


def _objects(truth: Sequence[Truth]) -> None:
    if not any((~(one.difficult | one.crowd)).any() for one in truth):
        raise ValueError(
            f"boxes: found no object in {len(truth)} images that counts; average precision needs one; give the split "
            "images with objects"
        )
