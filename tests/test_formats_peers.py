"""The same datasets read by pycocotools and torchvision, at the size that they have."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from format_trees import HEIGHT, WIDTH, coco_content, coco_object, coco_tree, packed, run_lengths, save_image, voc_tree
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, VOCDetection, VOCSegmentation

from mim_core.data.coco import coco
from mim_core.data.pack import CROWD, Pack, semantic_map
from mim_core.data.voc import CLASSES, voc

OWN = {"size_px": (HEIGHT, WIDTH), "validation": 0.0, "test": 0.0}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pack]:
    """Ten images with random polygons, of one or two parts, and crowds in both forms of run lengths."""
    rng = np.random.default_rng(0)
    content = coco_content(range(1, 11))
    content["annotations"] = []
    for number in range(60):
        image = int(rng.integers(1, 11))
        corner, span = rng.uniform(0, 30, 2) * (2, 1), rng.uniform(3, 10, 2) * (2, 1)
        parts = [corner + span * rng.random((int(rng.integers(3, 9)), 2)) for _ in range(int(rng.integers(1, 3)))]
        entry = coco_object(number, image, (3, 7)[number % 2], [*corner.tolist(), *span.tolist()])
        entry["segmentation"] = [part.ravel().tolist() for part in parts]
        if number % 5 == 0:
            crowd = rng.random((HEIGHT, WIDTH)) < 0.3
            counts = run_lengths(crowd)
            if number % 2:
                counts = rle.encode(np.asfortranarray(crowd, np.uint8))["counts"].decode()
            entry.update(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}, iscrowd=1)
        content["annotations"].append(entry)
    root = tmp_path_factory.mktemp("peers") / "coco"
    coco_tree(root, {"train2017": content})
    return root, packed(coco(root, **OWN), root.parent / "pack")


def test_coco_is_pycocotools(annotated: tuple[Path, Pack], capsys: pytest.CaptureFixture[str]) -> None:
    root, pack = annotated
    theirs = COCO(str(root / "annotations" / "instances_train2017.json"))
    capsys.readouterr()
    train = pack.split("train")
    assert train.array("origins").ravel().tolist() == sorted(theirs.getImgIds())
    classes = sorted(theirs.getCatIds())
    overlapping = 0
    for index, number in enumerate(train.array("origins").ravel().tolist()):
        boxes, flags = train.objects(index)
        instances = np.asarray(train.array("instances")[index])
        covered = np.zeros((HEIGHT, WIDTH), bool)
        entries = theirs.loadAnns(theirs.getAnnIds(imgIds=number))
        assert len(entries) == len(boxes)
        for place, (entry, box, flag) in enumerate(zip(entries, boxes, flags, strict=True), 1):
            left, top, width, height = entry["bbox"]
            assert box[:4] == pytest.approx([left, top, min(left + width, WIDTH), min(top + height, HEIGHT)])
            assert box[4] == classes.index(entry["category_id"])
            assert flag == CROWD * entry["iscrowd"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                mask = theirs.annToMask(entry).astype(bool)
            assert not ((instances == place) & ~mask).any()  # what lies on top is its own, and no more
            overlapping += ((instances != place) & mask).sum()
            covered |= mask
        assert ((instances > 0) == covered).all()
    assert overlapping > 100


def test_coco_images_are_torchvisions(annotated: tuple[Path, Pack], capsys: pytest.CaptureFixture[str]) -> None:
    root, pack = annotated
    theirs = CocoDetection(str(root / "train2017"), str(root / "annotations" / "instances_train2017.json"))
    capsys.readouterr()
    for index in range(10):
        image, entries = theirs[index]
        assert (np.asarray(image).transpose(2, 0, 1) == pack.split("train").images[index]).all()
        assert len(entries) == len(pack.split("train").objects(index)[0])


def test_voc_is_torchvisions(tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "VOCdevkit" / "VOC2012")
    pack = packed(voc(root, lists="segmentation", **OWN), tmp_path / "pack")
    for split, kind in {"train": "train", "test": "val"}.items():
        ours = pack.split(split)
        masks = VOCSegmentation(str(tmp_path), "2012", kind, download=False)
        things = VOCDetection(str(tmp_path), "2012", kind, download=False)
        assert len(ours) == len(masks) == len(things)
        for index in range(len(ours)):
            image, mask = masks[index]
            assert (np.asarray(image).transpose(2, 0, 1) == ours.images[index]).all()
            assert (np.asarray(mask) == semantic_map(ours, index)).all()
            entries = things[index][1]["annotation"].get("object", [])
            boxes, flags = ours.objects(index)
            assert [entry["name"] for entry in entries] == [CLASSES[int(box[4])] for box in boxes]
            assert [int(entry["difficult"]) for entry in entries] == flags.tolist()
            for entry, box in zip(entries, boxes.tolist(), strict=True):
                corners = [int(entry["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")]
                assert [box[0] + 1, box[1] + 1, box[2], box[3]] == corners


def test_semantic_maps_follow_from_instances(tmp_path: Path) -> None:
    """Where both are there they say the same of every pixel that an object has."""
    root = voc_tree(tmp_path / "VOC2012")
    train = packed(voc(root, lists="segmentation", **OWN), tmp_path / "pack").split("train")
    instances, semantic = np.asarray(train.array("instances")[0]), semantic_map(train, 0)
    classes = np.concatenate([[0], train.objects(0)[0][:, 4] + 1])[instances]
    assert (classes[instances > 0] == semantic[instances > 0]).all()
    assert set(semantic[instances == 0].tolist()) == {0, 255}


def test_a_pack_says_what_it_lacks(annotated: tuple[Path, Pack], tmp_path: Path) -> None:
    root, pack = annotated
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert pack.meta["annotations"] == ["boxes", "instances"]
    for name in ("presence", "semantic"):
        with pytest.raises(ValueError, match=f"the pack has no {name}; choose a dataset that has them"):
            pack.split("train").array(name)
    del content["images"][1:]
    content["annotations"] = []
    bare = tmp_path / "bare"
    coco_tree(bare, {"train2017": content})
    save_image(bare / "train2017" / content["images"][0]["file_name"], 1)
    empty = packed(coco(bare, **OWN), tmp_path / "pack").split("train")
    assert empty.objects(0)[0].shape == (0, 5)
    assert empty.objects(0)[1].shape == (0,)
