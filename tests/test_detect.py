"""Detection: laws over detectors, encoders and necks, a detector that learns, batches that keep objects in place."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_pieces import AUGMENT, ENCODER, TUNE
from PIL import Image
from torch import Tensor

from mim_core import checkpoint
from mim_core.data.pack import CROWD, DIFFICULT, Pack, Sample, Source, open_pack, write
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve
from mim_core.jobs import downstream
from mim_core.jobs.run import Run
from mim_core.params import DownstreamRow
from mim_core.spec import SpecError, build, check
from mim_core.tasks import TASKS
from mim_core.tasks.detect.batch import Boxed, BoxedFetch, truth
from mim_core.tasks.detect.detect import Detect
from mim_core.tasks.detect.detectors import DETECTORS
from mim_core.tasks.detect.necks import NECKS
from mim_core.tasks.task import Facts
from mim_core.train import Scalars
from mim_core.transforms import Augment

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = {"train": 48, "validation": 12, "test": 16}
SIZE = (32, 48)
COLOURS = np.array([[230, 40, 40], [40, 60, 230]], np.uint8)
NAMES = ["red", "blue"]
SMALL = {
    "faster_rcnn": {"name": "faster_rcnn", "width": 32, "cells": 3, "sampled": 16},
    "mask_rcnn": {"name": "mask_rcnn", "width": 32, "cells": 3, "sampled": 16, "mask_width": 8, "mask_cells": 4},
    "fast_rcnn": {"name": "fast_rcnn", "width": 32, "cells": 3, "sampled": 16},
    "fast_rcnn_on_a_grid": {"name": "fast_rcnn", "proposals": {"name": "grid", "least": 0.4}, "width": 32, "cells": 3},
    "faster_rcnn_of_vitdet": {"name": "faster_rcnn", "proposals": {"name": "rpn", "convs": 2}, "head": "convs"},
}
SMALL_NECKS = {
    "simple_pyramid": {"name": "simple_pyramid", "width": 16},
    "fpn": {"name": "fpn", "width": 16},
    "single": {"name": "single"},
}
SMALL_ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"patch_px": 4, "width": 16, "depth": 1, "heads": 2},
    "swin": {"patch_px": 2, "width": 16, "depths": (1, 1, 1), "heads": (2, 2, 2), "window": 2},
    "conv": {"base": 8, "layers": 3, "bottleneck": 8},
    "alexnet": {"base": 6},
}
DETECT = {
    "task": {"name": "detect", "detector": SMALL["faster_rcnn"], "neck": {"name": "simple_pyramid", "width": 16}},
    "data": "shapes",
    "init": "scratch",
    "encoder": ENCODER,
    "lr_grid": [1.0e-3],
    "seeds": [0],
    "augment": AUGMENT,
    "optim": {**TUNE, "epochs": 2},
    "precision": "fp32",
}
CPU = Compute(torch.device("cpu"), bf16=False)


def source() -> Source:
    """Up to two rectangles on noise, each in its class's colour; the last image of each split is empty."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(COUNTS).index(split))
        for index in range(COUNTS[split]):
            image = rng.integers(90, 140, (*SIZE, 3)).astype(np.uint8)
            instances = np.zeros(SIZE, np.uint8)
            rows = []
            for half in range(int(rng.integers(1, 3)) if index < COUNTS[split] - 1 else 0):
                height, width = rng.integers(9, 22), rng.integers(9, 22)
                top, left = rng.integers(0, SIZE[0] - height + 1), 24 * half + rng.integers(0, 25 - width)
                kind = int(rng.integers(2))
                image[top : top + height, left : left + width] = COLOURS[kind]
                instances[top : top + height, left : left + width] = half + 1
                rows.append((left, top, left + width, top + height, kind))
            boxes = np.array(rows, np.float32).reshape(-1, 5)
            yield Sample(image.transpose(2, 0, 1), boxes=boxes, instances=instances)

    return Source(NAMES, COUNTS, samples, annotations=("boxes", "instances"), segments=["background", *NAMES])


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs") / "shapes"
    write(source(), folder, {"source": {"name": "shapes"}})
    return open_pack(folder)


def row(**changes: Any) -> DownstreamRow:
    return check(DownstreamRow, {**DETECT, **changes}, "row")


def facts(size: tuple[int, int] = SIZE, annotations: tuple[str, ...] = ()) -> Facts:
    return Facts(size, 3, (0.5,) * 3, (0.25,) * 3, NAMES, [], annotations)


def task(
    encoder: str = "vit",
    size: tuple[int, int] = SIZE,
    compute: Compute = CPU,
    known: Facts | None = None,
    **params: Any,
) -> Detect:
    piece = row(task={"name": "detect", **params}).task
    torch.manual_seed(0)
    made = ENCODERS[encoder](size, 3, **SMALL_ENCODERS[encoder])
    found: Detect = build(TASKS, piece, made, known or facts(size), compute)
    return found


def batch(size: tuple[int, int], masks: bool) -> Boxed:
    """Two images with a rectangle each, and one without."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
    targets: list[dict[str, Tensor]] = []
    for index in range(3):
        box = torch.tensor([[3.0, 5.0, 17.0, 20.0]])[: int(index < 2)]
        target = {"boxes": box, "labels": torch.tensor([index + 1])[: len(box)]}
        if masks:
            drawn = torch.zeros((1, *size), dtype=torch.uint8)
            drawn[:, 5:20, 3:17] = 1
            target["masks"] = drawn[: len(box)]
        targets.append(target)
    return Boxed(images, targets)


def goes(detector: str, encoder: str, neck: str) -> bool:
    one_map = neck == "single" or not detector.startswith("fast_rcnn")
    return one_map and (neck != "fpn" or encoder != "vit")


@pytest.mark.parametrize(("detector", "encoder", "neck"), list(product(SMALL, SMALL_ENCODERS, SMALL_NECKS)))
def test_all_that_goes_together_trains_and_detects_and_the_rest_is_refused(
    detector: str, encoder: str, neck: str
) -> None:
    size = (67, 99) if encoder == "alexnet" else SIZE
    params = {"detector": SMALL[detector], "neck": SMALL_NECKS[neck]}
    if not goes(detector, encoder, neck):
        with pytest.raises(ValueError, match=r"neck: found .*; choose "):
            task(encoder, size, **params)
        return
    judge = task(encoder, size, **params)
    ((player, loss),) = judge.losses(batch(size, judge.masks), 0)
    assert player == "model"
    assert torch.isfinite(loss)
    loss.backward()
    learned = [one.grad for name, one in judge.model.encoder.named_parameters() if one.grad is not None]
    assert sum(float(one.abs().sum()) for one in learned) > 0
    for found in judge.find(batch(size, False).images):
        low, high = found["boxes"][:, :2], found["boxes"][:, 2:]
        assert len(low), "an untrained detector finds something everywhere"
        assert (low >= 0).all()
        assert (high <= torch.tensor([size[1], size[0]])).all()
        assert (low < high).all()
        assert set(found["labels"].tolist()) <= {1, 2}
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert not judge.masks or found["masks"].shape == (len(low), *size)


def test_tables_are_covered() -> None:
    assert {one["name"] for one in SMALL.values()} == set(DETECTORS)
    assert set(SMALL_NECKS) == set(NECKS)
    assert set(SMALL_ENCODERS) == set(ENCODERS)


def test_batches_without_any_object_are_background() -> None:
    judge = task(detector=SMALL["mask_rcnn"], neck=SMALL_NECKS["simple_pyramid"])
    some = batch(SIZE, True)
    empty = Boxed(some.images, [some.targets[2]] * 3)
    ((_, loss),) = judge.losses(empty, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert judge.model.heads.box_predictor.cls_score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("detector", SMALL)
def test_in_bf16_boxes_are_as_fine_as_in_fp32(detector: str) -> None:
    losses = []
    for bf16 in (False, True):
        neck = SMALL_NECKS["single" if detector.startswith("fast_rcnn") else "simple_pyramid"]
        judge = task(compute=Compute(torch.device("cpu"), bf16), detector=SMALL[detector], neck=neck)
        judge.model.train()
        torch.manual_seed(1)
        ((_, loss),) = judge.losses(batch(SIZE, judge.masks), 0)
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        boxes = judge.find(batch(SIZE, False).images)[0]["boxes"]
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_at_the_papers_size_the_anchors_and_counts_are_the_papers() -> None:
    size = (800, 608)
    params = {"detector": {**SMALL["faster_rcnn"], "sampled": None}, "neck": {"name": "simple_pyramid", "width": 8}}
    piece = row(task={"name": "detect", **params}).task
    encoder = ENCODERS["vit"](size, 3, patch_px=16, width=16, depth=1, heads=2)
    judge: Detect = build(TASKS, piece, encoder, facts(size), CPU)
    assert judge.model.neck.strides == [4, 8, 16, 32, 64]
    images = torch.zeros((1, 3, *size), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[100.0, 100.0, 300.0, 260.0]]), "labels": torch.tensor([1])}
    ((_, loss),) = judge.losses(Boxed(images, [target]), 0)
    assert torch.isfinite(loss)
    larger = ENCODERS["vit"]((800, 1280), 3, patch_px=16, width=16, depth=1, heads=2)
    rpn = build(TASKS, piece, larger, facts((800, 1280)), CPU).model.proposals
    assert rpn.anchor_generator.sizes == ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    assert rpn._pre_nms_top_n["training"] == 2000
    assert rpn._post_nms_top_n["testing"] == 1000
    assert rpn.fg_bg_sampler.batch_size_per_image == 256


def test_the_neck_goes_with_the_encoder_and_the_metric_with_the_score() -> None:
    wanted = {"vit": "simple_pyramid", "swin": "fpn", "conv": "fpn", "alexnet": "single"}
    for encoder in SMALL_ENCODERS:
        size = (67, 99) if encoder == "alexnet" else SIZE
        assert isinstance(task(encoder, size).model.neck, NECKS[wanted[encoder]])  # type: ignore[arg-type]
        assert isinstance(task(encoder, size, detector="fast_rcnn").model.neck, NECKS["single"])  # type: ignore[arg-type]
    assert task("alexnet", (67, 99)).model.neck.width == 16, "conv5, not pool5 alone"
    assert (task().score, task(metric="voc07").score) == ("ap", "voc07_ap")


def test_misfits_are_refused_before_work_starts() -> None:
    with pytest.raises(ValueError, match=r"^detector: found mask_rcnn .* \['boxes'\]; .* choose faster_rcnn"):
        task(detector="mask_rcnn", known=facts(annotations=("boxes",)))
    with pytest.raises(ValueError, match=r"^detector\.proposals\.anchors_px: found 2 sides; the neck has 5 maps"):
        task(detector={"name": "faster_rcnn", "proposals": {"name": "rpn", "anchors_px": [8, 16]}})
    with pytest.raises(ValueError, match=r"^neck\.scales: found 3; .* must be one of \[4, 2, 1, 0\.5\]"):
        task(neck={"name": "simple_pyramid", "scales": [3]})
    with pytest.raises(ValueError, match=r"^neck\.level: found 2; the encoder has 1 maps|^neck\.level: found 9"):
        task(neck={"name": "single", "level": 9})
    with pytest.raises(SpecError, match=r"row\.task\.detector\.proposals\.name: 'grid' is not one of \['rpn'\]"):
        row(task={"name": "detect", "detector": {"name": "faster_rcnn", "proposals": "grid"}})
    with pytest.raises(SpecError, match=r"row\.task\.detector\.name: 'fastest_rcnn' is not one of .*did you mean"):
        row(task={"name": "detect", "detector": "fastest_rcnn"})
    assert task(detector="mask_rcnn").needs == ("instances",)
    assert task().needs == ("boxes",)


def test_masks_need_instances_and_all_need_boxes(pack: Pack) -> None:
    split = pack.split("train")
    np.testing.assert_array_equal(task().labelled(split), np.arange(48))


# A batch's images with what is on them.


def found_in(image: Tensor, kind: int) -> list[float] | None:
    """Find a class's rectangle by its colour."""
    near = (image.float() - torch.from_numpy(COLOURS[kind].astype(np.float32))[:, None, None]).abs().amax(0) < 60
    rows, columns = near.any(1).nonzero().flatten(), near.any(0).nonzero().flatten()
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("masks", [False, True])
def test_objects_stay_where_they_are_seen(pack: Pack, masks: bool) -> None:
    split = pack.split("train")
    augment = Augment(scale=(0.3, 0.9), flip=0.5)
    fetch = pickle.loads(pickle.dumps(BoxedFetch(split, augment, 0, masks, 0.25)))
    plain = BoxedFetch(split, None, 0, masks, 0.25)([(0, index) for index in range(48)])
    cut = seen = 0
    for epoch in range(4):
        made = fetch([(epoch, index) for index in range(48)])
        assert made.images.shape == (48, 3, *SIZE)
        for image, target, whole in zip(made.images, made.targets, plain.targets, strict=True):
            cut += len(whole["boxes"]) - len(target["boxes"])
            for at, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
                if (whole["labels"] == label).sum() > 1:
                    continue  # two of a colour cannot be told apart
                seen += 1
                np.testing.assert_allclose(box, found_in(image, int(label) - 1), atol=1.6)
                if masks:
                    rows, columns = target["masks"][at].any(1).nonzero(), target["masks"][at].any(0).nonzero()
                    around = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
                    np.testing.assert_allclose(box, around, atol=1.6)
    assert cut > 10
    assert seen > 100


def test_a_crop_drops_what_it_hardly_leaves() -> None:
    class Half(Augment):
        """Keep the left half, twice as wide."""

        def jointly(self, rng: np.random.Generator, image: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
            from torchvision.transforms.v2 import functional as TF

            parts = (TF.resized_crop(one, 0, 0, 32, 24, [32, 48], antialias=True) for one in (image, *beside))
            return tuple(parts)

    lefts = [0, 20, 22, 26]  # of boxes 8 px wide, of which 24 px stay: all, a half, a quarter, none
    boxes = np.array([[left, 4, left + 8, 20, 0] for left in lefts], np.float32)
    for visible, kept in ((0.0, 3), (0.25, 3), (0.3, 2), (0.6, 1)):
        target = BoxedFetch(only(boxes), Half(), 0, False, visible)([(0, 0)]).targets[0]
        assert len(target["boxes"]) == kept, visible
        wanted = [[2 * left, 4, min(48, 2 * left + 16), 20] for left in lefts[:kept]]
        np.testing.assert_allclose(target["boxes"], wanted)


def only(boxes: np.ndarray, flags: np.ndarray | None = None) -> Any:
    """A split of one image."""

    class One:
        def tensor(self, index: int) -> Tensor:
            return torch.zeros((3, *SIZE), dtype=torch.uint8)

        def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return boxes, np.zeros(len(boxes), np.uint8) if flags is None else flags

    return One()


def test_difficult_objects_and_crowds_are_not_learned_from_but_known_when_judging() -> None:
    boxes = np.array([[2, 2, 12, 12, 0], [20, 2, 30, 12, 1], [30, 20, 40, 30, 1]], np.float32)
    split = only(boxes, np.array([DIFFICULT, 0, CROWD], np.uint8))
    target = BoxedFetch(split, None, 0, False, 0.25)([(0, 0)]).targets[0]
    np.testing.assert_array_equal(target["boxes"], boxes[1:2, :4])
    assert target["labels"].tolist() == [2]
    real = truth(split, 0, masks=False)
    np.testing.assert_array_equal(real.boxes, boxes[:, :4])
    assert real.difficult.tolist() == [True, False, False]
    assert real.crowd.tolist() == [False, False, True]


# A whole run.


def test_a_detector_learns_and_its_file_detects(tmp_path: Path, pack: Pack) -> None:
    masks = {**SMALL["mask_rcnn"], "width": 64, "cells": 5, "sampled": 32, "mask_convs": 2}
    neck = {"name": "simple_pyramid", "width": 32, "scales": [2, 1]}
    long = {**TUNE, "batch": 12, "epochs": 45, "layer_decay": 0.9}
    one = row(task={"name": "detect", "detector": masks, "neck": neck}, optim=long, augment={"scale": [0.8, 1.0]})
    found = downstream(one, pack, tmp_path, 0, 3e-3, None, test=True)
    assert found["metric"] == "ap"
    assert found["test_score"] == found["test_ap"]
    assert {f"test_{name}" for name in ("ap50", "ap75", "voc07_ap", "voc10_ap", "mask_ap", "mask_ap50")} <= set(found)
    assert found["test_ap50"] > 0.6
    assert found["test_mask_ap50"] > 0.5
    weights, about = checkpoint.read_weights(tmp_path / "model.safetensors")
    assert about["task"] == one.task.model_dump(mode="json")
    # The file rebuilds the task.
    encoder = build(ENCODERS, one.encoder, pack.size, 3)  # type: ignore[arg-type]
    again: Detect = build(
        TASKS, check(DownstreamRow, {**DETECT, "task": about["task"]}, "row").task, encoder, Facts.of(pack), CPU
    )
    again.model.load_state_dict(weights)
    test = pack.split("test")
    assert again.evaluate(test)["ap"] == pytest.approx(found["test_ap"])
    said = again.predict(torch.stack([test.tensor(index) for index in range(len(test))]))
    right = 0
    for index, one_image in enumerate(said):
        assert set(one_image) == {"objects"}
        for best in one_image["objects"][:1]:
            assert set(best) == {"class", "score", "left", "top", "right", "bottom"}
            real = truth(test, index, masks=False)
            right += best["class"] in [NAMES[kind] for kind in real.classes]
    assert right > len(test) / 2
    picture = Image.open(io.BytesIO((tmp_path / "predictions.png").read_bytes()))
    assert picture.width > 600


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("detector", "neck"), [("mask_rcnn", "simple_pyramid"), ("fast_rcnn_on_a_grid", "single")])
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch, detector: str, neck: str
) -> None:
    params = {"name": "detect", "detector": SMALL[detector], "neck": SMALL_NECKS[neck]}
    one = row(task=params, drop_path=0.2, checkpoint_minutes=1.0e-6)
    downstream(one, pack, tmp_path / "whole", 5, 2e-3, None, test=True)
    report = Run.report

    def dies(run: Run, step: int, scalars: Scalars) -> None:
        if step == 4:
            raise Killed
        report(run, step, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "report", dies)
        with pytest.raises(Killed):
            downstream(one, pack, tmp_path / "broken", 5, 2e-3, None, test=True)
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints") is not None
    downstream(one, pack, tmp_path / "broken", 5, 2e-3, None, test=True)
    for product_ in ("model.safetensors", "predictions.png"):
        assert (tmp_path / "whole" / product_).read_bytes() == (tmp_path / "broken" / product_).read_bytes()
    curves = [
        [line.get("loss") for line in read_curve(tmp_path / name / "curve.jsonl")] for name in ("whole", "broken")
    ]
    assert curves[0] == curves[1]
