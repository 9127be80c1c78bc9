"""Annotations damaged at random: a message comes, or a dataset whose counts add up, and never another error."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from format_trees import (
    CSV,
    EVEN,
    VOC_OBJECTS,
    ade_tree,
    coco_content,
    coco_tree,
    csv_tree,
    inaturalist_content,
    inaturalist_tree,
    voc_annotation,
    voc_tree,
)

from mim_core.data.ade20k import ade20k
from mim_core.data.coco import coco
from mim_core.data.csv_table import csv_table
from mim_core.data.inaturalist import inaturalist
from mim_core.data.pack import Source
from mim_core.data.voc import voc

ROUNDS = 120
JUNK: list[Any] = [None, True, -1, 0, 7, 2**70, 1e400, float("nan"), 0.5, "", "x", "../x", "\0", "\udce9", [], [[]], {}]
TEXTS = ["", " ", "nan", "-1", "1e999", "x" * 300, "../x", "\0", "\t", ";", ",", '"', "\u2028", "<", "&x;", "\ufeff"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged(content: Any, rng: random.Random) -> Any:
    """One to three values replaced, taken out or doubled."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        spots = list(places(content))
        if not spots:
            break
        container, key = rng.choice(spots)
        act = rng.randrange(4)
        if act == 0:
            del container[key]
        elif act == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
    return content


def spoiled(text: str, rng: random.Random) -> bytes:
    """A few places of a text replaced, taken out or doubled; sometimes a byte that is no UTF-8, or the end missing."""
    content = bytearray(text.encode())
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 1, 5, 40)))
        new = rng.choice(
            [*(text.encode(errors="surrogatepass") for text in TEXTS), b"\xe9", bytes(content[start:end]) * 2]
        )
        content[start:end] = new
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def read(source: Callable[..., Source], root: Path, given: int | None = None, **options: Any) -> bool:
    """Whether there is a dataset, whose samples can all be drawn; only a ValueError may say that there is none."""
    try:
        found = source(root, **EVEN, **options)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert len(said.split()) > 4, f"no message that helps: {said}"
        return False
    for split, count in found.counts.items():
        assert sum(1 for _ in found.samples(split)) == count
    assert all(entry["file"] and entry["reason"] for entry in found.quarantined)
    json.dumps(found.quarantined).encode()
    "".join(entry["file"] + entry["reason"] for entry in found.quarantined).encode()  # as a table is written
    if given is not None:
        assert sum(found.counts.values()) <= given <= sum(found.counts.values()) + len(found.quarantined)
    return True


def test_coco(tmp_path: Path) -> None:
    root, content, rng = coco_tree(tmp_path / "data"), coco_content(), random.Random(0)
    good = 0
    for _ in range(ROUNDS):
        new = damaged(content, rng)
        (root / "annotations" / "instances_train2017.json").write_text(json.dumps(new))
        images = new.get("images") if isinstance(new, dict) else None
        good += read(coco, root, len(images) + 1 if isinstance(images, list) else None)
    assert ROUNDS / 2 < good < ROUNDS


def test_inaturalist(tmp_path: Path) -> None:
    root, content, rng = (
        inaturalist_tree(tmp_path / "data"),
        inaturalist_content("train", (1, 2, 3, 4)),
        random.Random(1),
    )
    good = 0
    for _ in range(ROUNDS):
        new = damaged(content, rng)
        (root / "train2018.json").write_text(json.dumps(new))
        images = new.get("images") if isinstance(new, dict) else None
        good += read(inaturalist, root, len(images) + 2 if isinstance(images, list) else None)
    assert ROUNDS / 2 < good < ROUNDS


@pytest.mark.parametrize("name", ["annotation", "list"])
def test_voc(tmp_path: Path, name: str) -> None:
    root, rng = voc_tree(tmp_path / "data"), random.Random(2)
    annotation = ElementTree.tostring(voc_annotation(VOC_OBJECTS["2007_000001"]), encoding="unicode")
    path, text = {
        "annotation": (root / "Annotations" / "2007_000001.xml", annotation),
        "list": (root / "ImageSets" / "Segmentation" / "train.txt", "\n".join(list(VOC_OBJECTS)[:4])),
    }[name]
    good = 0
    for _ in range(ROUNDS):
        path.write_bytes(spoiled(text, rng))
        good += read(voc, root, 5 if name == "annotation" else None, lists="segmentation")
    assert good == ROUNDS if name == "annotation" else ROUNDS / 3 < good < ROUNDS


def test_csv(tmp_path: Path) -> None:
    root, rng = csv_tree(tmp_path / "data"), random.Random(3)
    good = 0
    for _ in range(ROUNDS):
        (root / "labels.csv").write_bytes(spoiled(CSV, rng))
        good += read(csv_table, root)
    assert ROUNDS / 3 < good < ROUNDS


@pytest.mark.parametrize("name", ["objectInfo150.txt", "sceneCategories.txt"])
def test_ade20k(tmp_path: Path, name: str) -> None:
    root, rng = ade_tree(tmp_path / "data"), random.Random(4)
    text = (root / name).read_text()
    good = 0
    for _ in range(ROUNDS // 2):
        (root / name).write_bytes(spoiled(text, rng))
        good += read(ade20k, root, 4)
    assert 0 < good < ROUNDS // 2


@pytest.mark.parametrize("name", ["SegmentationClass", "SegmentationObject", "JPEGImages"])
def test_files_of_pixels(tmp_path: Path, name: str) -> None:
    root, rng = voc_tree(tmp_path / "data"), random.Random(5)
    path = root / name / f"2007_000001.{'jpg' if name == 'JPEGImages' else 'png'}"
    whole = path.read_bytes()
    for _ in range(ROUNDS // 2):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        assert read(voc, root, 5, lists="segmentation")
