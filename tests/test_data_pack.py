"""What packs hold of annotations, and how they are opened."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim_core.data import pack
from mim_core.data.pack import CROWD, DIFFICULT, SPLITS, Pack, Sample, Source, semantic_map

IMAGE = np.zeros((1, 4, 6), np.uint8)
BOXES = np.array([[0, 0, 2, 2, 1], [3, 0, 6, 4, 0]], np.float32)
NOTHING = np.zeros((0, 5), np.float32)


def instances(*numbers: int) -> np.ndarray:
    """Numbers in the first row, one a pixel."""
    whole = np.zeros((4, 6), np.int64)
    whole[0, : len(numbers)] = numbers
    return whole


def source(samples: list[Sample], **said: Any) -> Source:
    counts = {"train": len(samples), "validation": 0, "test": 0}

    def draw(split: str) -> Iterator[Sample]:
        yield from samples if split == "train" else []

    return Source(["cat", "dog"], counts, draw, **said)


def packed(folder: Path, samples: list[Sample], **said: Any) -> Pack:
    pack.write(source(samples, **said), folder / "pack", {"name": "small"})
    return pack.open_pack(folder / "pack")


def test_instances_give_a_semantic_map(tmp_path: Path) -> None:
    samples = [
        Sample(IMAGE, boxes=BOXES, box_flags=np.array([0, CROWD], np.uint8), instances=instances(1, 2, 0, 1)),
        Sample(IMAGE, boxes=NOTHING, instances=instances()),
        Sample(IMAGE, boxes=BOXES[1:], instances=instances(1)),
    ]
    opened = packed(tmp_path, samples, annotations=("boxes", "instances"), segments=["background", "cat", "dog"])
    train = opened.split("train")
    assert [semantic_map(train, index)[0, :4].tolist() for index in range(3)] == [[2, 255, 0, 2], [0] * 4, [1, 0, 0, 0]]
    assert semantic_map(train, 0).dtype == np.int64
    assert train.objects(0)[1].tolist() == [0, CROWD]
    assert train.objects(1)[0].shape == (0, 5)
    assert train.objects(2)[1].tolist() == [0]
    assert opened.annotations == ["boxes", "instances"]


def test_presence_difficult_boxes_and_semantic_maps(tmp_path: Path) -> None:
    semantic = np.full((4, 6), 255, np.uint8)
    semantic[0] = 2
    sample = Sample(
        IMAGE,
        label=1,
        boxes=BOXES,
        box_flags=np.array([DIFFICULT, 0], np.uint8),
        semantic=semantic,
        presence=np.array([1, -1], np.int8),
        origin=(7, 9),
    )
    words = ("semantic", "presence", "boxes", "labels")
    opened = packed(tmp_path, [sample], annotations=words, segments=["a", "b", "c"], left_out={"train": 3})
    train = opened.split("train")
    assert opened.annotations == sorted(words)
    assert opened.segments == ["a", "b", "c"]
    assert opened.meta["left_out"] == {"train": 3}
    assert opened.meta["labelled"] == {"train": 1}
    assert (semantic_map(train, 0) == semantic).all()
    assert train.array("presence").tolist() == [[1, -1]]
    assert train.array("presence").dtype == np.int8
    assert train.array("box_flags").dtype == np.uint8
    assert train.array("boxes").dtype == np.float32
    assert train.array("origins").tolist() == [[7, 9]]
    names = {"images", "labels", "origins", "boxes", "box_starts", "box_flags", "semantic", "presence"}
    assert train.names == names


@pytest.mark.parametrize("count", [255, 256, 700])
def test_instances_widen_when_they_must(tmp_path: Path, count: int) -> None:
    few = Sample(IMAGE, boxes=BOXES, instances=instances(2, 1))
    many = Sample(IMAGE, boxes=np.repeat(BOXES, count, 0)[:count], instances=instances(count, 1, count - 1))
    train = packed(tmp_path, [few, many, few], annotations=("boxes", "instances")).split("train")
    held = train.array("instances")
    assert held.dtype == (np.uint8 if count == 255 else np.uint16)
    assert held[:, 0, :3].tolist() == [[2, 1, 0], [count, 1, count - 1], [2, 1, 0]]
    assert train.names == {"images", "labels", "origins", "boxes", "box_starts", "box_flags", "instances"}


def test_a_source_must_give_what_it_says(tmp_path: Path) -> None:
    for sample, words in [
        (Sample(IMAGE, label=1), ()),
        (Sample(IMAGE, boxes=BOXES), ("labels",)),
        (Sample(IMAGE), ("boxes",)),
        (Sample(IMAGE, boxes=BOXES, instances=instances(1)), ("boxes",)),
    ]:
        with pytest.raises(AssertionError, match="a source says"):
            packed(tmp_path, [sample], annotations=words)
    with pytest.raises(AssertionError, match="annotations are words of"):
        packed(tmp_path, [Sample(IMAGE)], annotations=("captions",))


def test_arrays_are_opened_once_and_never_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(IMAGE, boxes=BOXES, instances=instances(1, 2))
    train = packed(tmp_path, [sample] * 50, annotations=("boxes", "instances")).split("train")
    before = semantic_map(train, 0)
    content = pickle.dumps(train)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert (semantic_map(again, 0) == before).all()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file is opened in the hot path")

    monkeypatch.setattr(np, "load", refuse)
    for index in range(50):
        assert (semantic_map(train, index) == before).all()
    assert isinstance(train.array("instances"), np.memmap)
    assert isinstance(train.images, np.memmap)


def test_packs_of_a_former_version_are_made_again(tmp_path: Path) -> None:
    opened = packed(tmp_path, [Sample(IMAGE)])
    assert opened.meta["counts"] == dict.fromkeys(SPLITS, 0) | {"train": 1}
    meta = {key: value for key, value in opened.meta.items() if key != "annotations"}
    (opened.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"a pack of a former version; run `dvc repro --force prepare@pack`"):
        pack.open_pack(opened.folder)
