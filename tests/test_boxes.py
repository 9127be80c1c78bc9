"""Average precision: closed forms, literal definitions, and agreement with torchmetrics."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mim_core.metrics.boxes import Found, Truth, coco_ap, decode, encode, voc_ap

SIZE = (120, 160)
CLASSES = 3


def truth(boxes: Any, classes: Any = None, difficult: Any = None, crowd: Any = None, masks: Any = None) -> Truth:
    count = len(boxes)
    none = np.zeros(count, bool)
    return Truth(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.zeros(count, np.int64) if classes is None else np.array(classes),
        none if difficult is None else np.array(difficult, bool),
        none if crowd is None else np.array(crowd, bool),
        masks,
    )


def found(boxes: Any, scores: Any, classes: Any = None, masks: Any = None) -> Found:
    labels = np.zeros(len(boxes), np.int64) if classes is None else np.array(classes)
    return Found(np.array(boxes, np.float64).reshape(-1, 4), labels, np.array(scores, np.float64), masks)


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low = rng.uniform(0, [SIZE[1] - 20, SIZE[0] - 20], (count, 2))
    high = np.minimum(low + rng.uniform(3, 110, (count, 2)), [SIZE[1], SIZE[0]])
    return np.concatenate([low, high], 1)


def scene(seed: int, images: int = 12) -> tuple[list[Found], list[Truth]]:
    """Objects and detections, of which many lie near an object; scores have ties."""
    rng = np.random.default_rng(seed)
    all_found, all_truth = [], []
    for _ in range(images):
        real = boxes(rng, int(rng.integers(0, 6)))
        kinds = rng.integers(0, CLASSES, len(real))
        near = real.repeat(2, 0) + rng.normal(0, 4, (2 * len(real), 4))
        guessed = np.concatenate([near.clip(0, [SIZE[1], SIZE[0]] * 2), boxes(rng, 3)])
        guessed = np.concatenate([np.minimum(guessed[:, :2], guessed[:, 2:] - 1), guessed[:, 2:]], 1)
        said = np.concatenate([kinds.repeat(2), rng.integers(0, CLASSES, 3)])
        said = np.where(rng.random(len(said)) < 0.2, rng.integers(0, CLASSES, len(said)), said)
        all_truth.append(truth(real, kinds, rng.random(len(real)) < 0.2, rng.random(len(real)) < 0.1))
        all_found.append(found(guessed, rng.random(len(said)).round(1), said))
    return all_found, all_truth


def masks_of(box_array: np.ndarray) -> list[dict[str, Any]]:
    """Ellipses in boxes."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    masks = []
    for left, top, right, bottom in box_array:
        across, down = (x - (left + right) / 2) / (right - left), (y - (top + bottom) / 2) / (bottom - top)
        masks.append(across**2 + down**2 <= 0.25)
    return encode(np.array(masks, bool).reshape(-1, *SIZE))


@pytest.mark.parametrize("seed", range(3))
def test_coco_s_ap_is_torchmetrics(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.detection import MeanAveragePrecision  # type: ignore[import-not-found,unused-ignore]

        # By itself it rounds COCO's thresholds to fp32, which moves recalls that are equal to one.
        theirs = MeanAveragePrecision(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist()
        )
        all_found, all_truth = scene(seed)
        all_truth = [truth(one.boxes, one.classes, crowd=one.crowd) for one in all_truth]
        theirs.update(
            [
                {
                    "boxes": torch.from_numpy(one.boxes),
                    "scores": torch.from_numpy(one.scores),
                    "labels": torch.from_numpy(one.classes),
                }
                for one in all_found
            ],
            [
                {
                    "boxes": torch.from_numpy(one.boxes),
                    "labels": torch.from_numpy(one.classes),
                    "iscrowd": torch.from_numpy(one.crowd.astype(np.int64)),
                }
                for one in all_truth
            ],
        )
        wanted = theirs.compute()
    ours = coco_ap(all_found, all_truth, CLASSES, SIZE)
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium"}
    for name, their in names.items():
        assert ours[name] == pytest.approx(wanted[their].item(), abs=1e-6), name
    assert 0.02 < ours["ap"] < ours["ap50"] < 1


@pytest.mark.parametrize("by", ["boxes", "masks"])
def test_finding_all_gives_one_and_finding_nothing_gives_none(by: Any) -> None:
    _, objects = scene(5)
    objects = [truth(one.boxes, one.classes, masks=masks_of(one.boxes)) for one in objects]
    perfect = [found(one.boxes, np.full(len(one.boxes), 0.9), one.classes, one.masks) for one in objects]
    nothing = [found([], [], [], []) for _ in objects]
    assert coco_ap(perfect, objects, CLASSES, SIZE, by)["ap"] == pytest.approx(1)
    assert voc_ap(perfect, objects, CLASSES) == {"voc07_ap": pytest.approx(1), "voc10_ap": pytest.approx(1)}
    assert coco_ap(nothing, objects, CLASSES, SIZE, by)["ap"] == 0
    assert voc_ap(nothing, objects, CLASSES) == {"voc07_ap": 0, "voc10_ap": 0}


def test_masks_are_judged_by_their_pixels_and_boxes_by_theirs() -> None:
    box = [[20, 20, 80, 80]]
    full = np.zeros((1, *SIZE), bool)
    full[:, 20:80, 20:80] = True
    half = full.copy()
    half[:, :, 50:] = False  # overlap 0.5 with the whole
    objects = [truth(box, masks=encode(full))]
    detections = [found(box, [0.5], masks=encode(half))]
    assert coco_ap(detections, objects, 1, SIZE, "boxes")["ap"] == pytest.approx(1)
    assert coco_ap(detections, objects, 1, SIZE, "masks")["ap"] == pytest.approx(0.1)


def test_areas_are_told_apart_where_images_have_room_for_them() -> None:
    objects = [truth([[0, 0, 10, 10], [20, 20, 70, 70], [10, 10, 120, 110]])]
    hit_the_small = [found([[0, 0, 10, 10]], [0.5])]
    areas = coco_ap(hit_the_small, objects, 1, SIZE)
    assert (areas["ap_small"], areas["ap_medium"], areas["ap_large"]) == (pytest.approx(1), 0, 0)
    assert set(coco_ap(hit_the_small, objects, 1, (32, 32))) == {"ap", "ap50", "ap75"}


def test_hand_made_cases_of_voc() -> None:
    # Right, wrong, right at recalls 1/4, 1/4, 2/4: precisions 1, 1/2, 2/3; two objects are not found.
    objects = [truth([[10 * at, 0, 10 * at + 8, 8] for at in range(4)])]
    guesses = [found([[0, 0, 8, 8], [0, 50, 8, 58], [10, 0, 18, 8]], [0.9, 0.8, 0.7])]
    ours = voc_ap(guesses, objects, 1)
    # Recalls 0, 0.1, 0.2 reach precision 1; 0.3, 0.4, 0.5 reach 2/3; the rest none.
    assert ours["voc07_ap"] == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)
    assert ours["voc10_ap"] == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)


def test_a_recall_of_three_in_ten_reaches_the_point_of_three_tenths() -> None:
    objects = [truth([[10 * at, 0, 10 * at + 8, 8] for at in range(10)])]
    guesses = [found(objects[0].boxes[:3], [0.9, 0.8, 0.7])]
    assert voc_ap(guesses, objects, 1)["voc07_ap"] == pytest.approx(4 / 11)


def test_a_second_detection_of_an_object_is_wrong() -> None:
    objects = [truth([[0, 0, 10, 10], [50, 50, 60, 60]])]
    once = [found([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.5])]
    twice = [found([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], [0.9, 0.8, 0.5])]
    for metric in (lambda guesses: coco_ap(guesses, objects, 1, SIZE), lambda guesses: voc_ap(guesses, objects, 1)):
        for name, value in metric(once).items():
            if not name.endswith(("_small", "_medium", "_large")):
                assert metric(twice)[name] < value == pytest.approx(1), name
    assert voc_ap(twice, objects, 1)["voc10_ap"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_difficult_objects_and_crowds_are_passed_over() -> None:
    clear, other = [0, 0, 20, 20], [50, 50, 90, 90]
    inside = [52, 52, 70, 70]
    for flags in ({"difficult": [False, True]}, {"crowd": [False, True]}):
        objects = [truth([clear, other], **flags)]
        for guesses in ([clear], [clear, other]):
            scores = [0.5, 0.9][: len(guesses)]
            detections = [found(guesses, scores)]
            assert coco_ap(detections, objects, 1, SIZE)["ap"] == pytest.approx(1)
            assert voc_ap(detections, objects, 1)["voc07_ap"] == pytest.approx(1)
    # COCO passes over what lies inside a crowd, however often; VOC knows no crowds and finds too little overlap.
    detections = [found([clear, inside, inside], [0.5, 0.9, 0.8])]
    assert coco_ap(detections, [truth([clear, other], crowd=[0, 1])], 1, SIZE)["ap"] == pytest.approx(1)
    assert coco_ap(detections, [truth([clear, other], difficult=[0, 1])], 1, SIZE)["ap"] < 0.5


def test_average_precision_needs_an_object() -> None:
    nothing = [truth([]), truth([[0, 0, 5, 5]], difficult=[True])]
    guesses = [found([[0, 0, 5, 5]], [0.5])] * 2
    for metric in (lambda: coco_ap(guesses, nothing, 1, SIZE), lambda: voc_ap(guesses, nothing, 1)):
        with pytest.raises(ValueError, match=r"boxes: found no object in 2 images .*; give the split"):
            metric()


def literal_voc(all_found: list[Found], all_truth: list[Truth]) -> tuple[float, float]:
    """VOCevaldet.m, line by line."""
    sevens, tens = [], []
    for kind in range(CLASSES):
        positives, taken = 0, {}
        for image, one in enumerate(all_truth):
            for at in np.flatnonzero(one.classes == kind):
                taken[image, int(at)] = False
                positives += not (one.difficult[at] or one.crowd[at])
        if not positives:
            continue
        detections = [
            (float(one.scores[at]), image, one.boxes[at])
            for image, one in enumerate(all_found)
            for at in np.flatnonzero(one.classes == kind)
        ]
        detections.sort(key=lambda one: -one[0])
        right, wrong = [0], [0]
        for _, image, box in detections:
            best, which = -np.inf, -1
            for number, at in taken:
                if number != image:
                    continue
                other = all_truth[image].boxes[at]
                w, h = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
                if w > 0 and h > 0:
                    union = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1])
                    if w * h / (union - w * h) > best:
                        best, which = w * h / (union - w * h), at
            hit, miss = 0, 0
            if best >= 0.5:
                if not (all_truth[image].difficult[which] or all_truth[image].crowd[which]):
                    hit, miss = (0, 1) if taken[image, which] else (1, 0)
                    taken[image, which] = True
            else:
                miss = 1
            right.append(right[-1] + hit)
            wrong.append(wrong[-1] + miss)
        curve = [(r / positives, r / (r + w)) for r, w in zip(right, wrong, strict=True) if r + w]
        sevens.append(sum(max([p for r, p in curve if r >= t / 10 - 1e-12], default=0) for t in range(11)) / 11)
        area, before = 0.0, 0.0
        for at, (recall, _) in enumerate(curve):
            area += (recall - before) * max(p for _, p in curve[at:])
            before = recall
        tens.append(area)
    return float(np.mean(sevens)), float(np.mean(tens))


@pytest.mark.parametrize("seed", range(10, 16))
def test_voc_s_ap_is_what_its_definition_says(seed: int) -> None:
    all_found, all_truth = scene(seed)
    seven, ten = literal_voc(all_found, all_truth)
    assert voc_ap(all_found, all_truth, CLASSES) == {"voc07_ap": pytest.approx(seven), "voc10_ap": pytest.approx(ten)}
    assert 0 < seven < 1


def test_masks_come_back_from_their_runs() -> None:
    masks = np.random.default_rng(0).random((3, *SIZE)) < 0.3
    np.testing.assert_array_equal(decode(encode(masks), SIZE), masks)
    assert decode(encode(masks[:0]), SIZE).shape == (0, *SIZE)
