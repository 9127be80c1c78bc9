"""Broken datasets: what is broken is listed with a reason, the rest goes on, and the counts add up.

The law of every case: the images that are kept and the images that are listed are the images that were given.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from format_trees import (
    CSV,
    EVEN,
    HEIGHT,
    WIDTH,
    ade_tree,
    cifar_tree,
    coco_content,
    coco_tree,
    csv_tree,
    inaturalist_content,
    inaturalist_tree,
    listed,
    run_lengths,
    save_image,
    save_values,
    stl_tree,
    voc_tree,
)
from PIL import Image
from test_data_images import bomb
from torchvision.datasets import CIFAR10, STL10

from mim_core.data.ade20k import ade20k
from mim_core.data.cifar import cifar10, stl10
from mim_core.data.coco import coco
from mim_core.data.csv_table import csv_table
from mim_core.data.inaturalist import inaturalist
from mim_core.data.pack import Source
from mim_core.data.voc import voc

Reasons = dict[str, str]
Change = Callable[[Any], object]


def check(source: Source, given: int, images: Reasons, others: Reasons | None = None) -> None:
    """`images` are the lost images with what their reason holds, `others` the entries that are no image."""
    found, expected = listed(source), {**images, **(others or {})}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], found[name]
    assert len(source.quarantined) == len(found)
    assert sum(source.counts.values()) + len(images) == given
    for split, count in source.counts.items():
        samples = list(source.samples(split))
        assert len(samples) == count
        assert all(sample.image.shape == (3, 20, 20) for sample in samples)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# Files of images, whatever the format: each damage is done to one image of each format.

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot be reached (No such file"),
    "cut short": (cut, "cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("no image"), "no image of a known format"),
    "link to itself": (loop, "cannot be reached (Too many levels"),
    "200 megapixels": (lambda path: path.write_bytes(bomb(15_000)), "over Pillow's limit"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe, socket"),
}
FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[..., Source], int, str]] = {
    "coco": (coco_tree, coco, 5, "train2017/000000000011.png"),
    "voc": (voc_tree, voc, 5, "JPEGImages/2007_000001.jpg"),
    "ade20k": (ade_tree, ade20k, 4, "images/training/ADE_train_00000001.jpg"),
    "inaturalist": (inaturalist_tree, inaturalist, 6, "train_val2018/Aves/1/train1.png"),
    "csv": (csv_tree, csv_table, 5, "a/1.png"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_broken_image_is_listed_and_the_rest_goes_on(tmp_path: Path, format_name: str, damage: str) -> None:
    tree, read, given, name = FORMATS[format_name]
    root = tree(tmp_path / "data")
    act, reason = DAMAGES[damage]
    act(root / name)
    if format_name == "ade20k" and damage == "missing":
        # Its folder is the list of its images, so the mask and the scene are left over.
        left = {
            "annotations/training/ADE_train_00000001.png": "no image",
            "sceneCategories.txt: ADE_train_00000001": "",
        }
        check(read(root, **EVEN), given - 1, {}, left)
    else:
        check(read(root, **EVEN), given, {name: reason})


def test_links_are_followed_but_lead_nowhere_else(tmp_path: Path) -> None:
    """Large sets are often linked to; a link to a folder above gives no second name to what lies there."""
    root = coco_tree(tmp_path / "data")
    (root / "train2017").rename(tmp_path / "elsewhere")
    (root / "train2017").symlink_to(tmp_path / "elsewhere")
    check(coco(root, **EVEN), 5, {})
    (root / "train2017").unlink()
    (root / "train2017").symlink_to(".")
    names = [f"train2017/{number:012}.png" for number in (11, 12, 13, 14)]
    check(coco(root, **EVEN), 5, dict.fromkeys(names, "cannot be reached (No such file"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_good_is_no_dataset(tmp_path: Path, format_name: str) -> None:
    tree, read, given, _ = FORMATS[format_name]
    root = tree(tmp_path / "data")
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"found no readable image \({given} refused\); add images"):
        read(root, **EVEN)


# COCO

FIRST, SECOND = "train2017/000000000011.png", "train2017/000000000012.png"
WHERE = "annotations/instances_train2017.json"


def image(number: int, **fields: Any) -> Change:
    return lambda content: content["images"][number].update(fields)


def thing(number: int, **fields: Any) -> Change:
    return lambda content: content["annotations"][number].update(fields)


def mask(segmentation: Any) -> Change:
    return thing(0, segmentation=segmentation)


def counts(runs: Any, size: Any = (HEIGHT, WIDTH)) -> Change:
    return mask({"counts": runs, "size": list(size)})


WHOLE = HEIGHT * WIDTH
COCO: dict[str, tuple[Change, Reasons, Reasons]] = {
    "category that is not listed": (thing(0, category_id=99), {FIRST: "category_id: found 99"}, {}),
    "annotation of no image": (thing(0, image_id=99), {}, {f"{WHERE}: annotations[0]": "of the image 99"}),
    "annotation of text": (
        lambda content: content["annotations"].append("x"),
        {},
        {f"{WHERE}: annotations[5]": "of the image None"},
    ),
    "box outside": (thing(1, bbox=[90, 0, 9, 9]), {FIRST: "annotations[1]: the box [90, 0, 99, 9] lies outside"}, {}),
    "box of no height": (thing(1, bbox=[9, 9, 5, 0]), {FIRST: "the box [9, 9, 14, 9] has no area"}, {}),
    "box of negative width": (thing(1, bbox=[9, 9, -5, 4]), {FIRST: "has no area"}, {}),
    "box of NaN": (thing(1, bbox=[9, float("nan"), 5, 4]), {FIRST: "bbox.1: found nan; must be a finite number"}, {}),
    "box without end": (thing(1, bbox=[9, 9, float("inf"), 4]), {FIRST: "bbox.2: found inf; must be a finite"}, {}),
    "box of three": (thing(1, bbox=[9, 9, 5]), {FIRST: "bbox: found [9, 9, 5]; List should have at least 4"}, {}),
    "box of text": (thing(1, bbox=["9", 9, 5, 4]), {FIRST: "bbox.0: found '9'; must be a valid number"}, {}),
    "crowd of 2": (thing(1, iscrowd=2), {FIRST: "iscrowd: found 2"}, {}),
    "no category": (
        lambda content: content["annotations"][1].pop("category_id"),
        {FIRST: "'category_id' is missing"},
        {},
    ),
    "id twice": (thing(3, id=1), {SECOND: "annotations[3]: the id 1 is that of annotations[0] too"}, {}),
    "polygon of an odd number": (mask([[1, 1, 9, 1, 9, 9, 5]]), {FIRST: "segmentation[0]: found 7 numbers"}, {}),
    "polygon of two points": (mask([[1, 1, 9, 9]]), {FIRST: "found 4 numbers; a polygon has pairs"}, {}),
    "polygon of text": (mask([[1, 1, 9, 1, 9, "9"]]), {FIRST: "a coordinate is no number"}, {}),
    "polygon far away": (mask([[1, 1, 1e9, 1, 9, 9]]), {FIRST: "reach far beyond the image"}, {}),
    "polygon of NaN": (mask([[1, 1, float("nan"), 1, 9, 9]]), {FIRST: "or are no finite numbers"}, {}),
    "mask of another size": (counts([100], (10, 10)), {FIRST: "size: found [10, 10]; the image is [40, 80]"}, {}),
    "run lengths too short": (counts([5, 7]), {FIRST: "add up to 12 px; the image has 3200"}, {}),
    "run lengths too long": (counts([WHOLE, 1]), {FIRST: "add up to 3201 px"}, {}),
    "negative run length": (counts([-5, WHOLE + 5]), {FIRST: "are numbers from 0 on"}, {}),
    "run lengths as text too short": (counts("52203"), {FIRST: "the image has 3200"}, {}),
    "run lengths as text cut short": (counts("52P"), {FIRST: "ends within a number"}, {}),
    "run lengths as other text": (counts("5 2"), {FIRST: "found ' ' in COCO's text"}, {}),
    "run lengths of an endless number": (counts("P" * 40), {FIRST: "in COCO's text"}, {}),
    "no run lengths": (mask({"size": [HEIGHT, WIDTH]}), {FIRST: "are numbers from 0 on"}, {}),
    "object without a mask": (mask([]), {FIRST: "it must be polygons or run lengths"}, {}),
    "other size than the file": (image(0, width=81), {FIRST: "its annotations are for 40 x 81"}, {}),
    "image without a width": (
        lambda content: content["images"][2].pop("width"),
        {f"{WHERE}: images[2]": "'width' is missing"},
        {},
    ),
    "image of text": (
        lambda content: content["images"].append("x"),
        {f"{WHERE}: images[4]": "the entry: found 'x'"},
        {},
    ),
    "file that climbs": (image(2, file_name="../x.png"), {f"{WHERE}: images[2]": "'../x.png' leads out"}, {}),
    "absolute file": (image(2, file_name="/etc/x.png"), {f"{WHERE}: images[2]": "leads out"}, {}),
    "file of Windows": (image(2, file_name="a\\x.png"), {f"{WHERE}: images[2]": "write the path with '/'"}, {}),
    "file on a drive": (image(2, file_name="c:x.png"), {f"{WHERE}: images[2]": "write the path with '/'"}, {}),
    "file of Latin-1": (image(2, file_name="caf\udce9.png"), {f"{WHERE}: images[2]": "that can be shown"}, {}),
    "file of NUL": (image(2, file_name="a\0.png"), {f"{WHERE}: images[2]": "that can be shown"}, {}),
    "file without a name": (image(2, file_name=" "), {f"{WHERE}: images[2]": "a file must be named"}, {}),
    "file with an endless name": (image(2, file_name="x" * 300), {f"train2017/{'x' * 300}": "File name too long"}, {}),
    "file twice": (
        image(2, file_name="000000000012.png"),
        {f"{WHERE}: images[{number}]": "listed 2 times" for number in (1, 2)},
        {},
    ),
    "image id twice": (
        image(1, id=11),
        {f"{WHERE}: images[{number}]": "the id 11 is that of 2 images" for number in (0, 1)},
        {f"{WHERE}: annotations[{number}]": "of the image 12" for number in (3, 4)},
    ),
}


@pytest.mark.parametrize("case", COCO)
def test_coco_entries(tmp_path: Path, case: str) -> None:
    change, images, others = COCO[case]
    content = coco_content()
    root = coco_tree(tmp_path / "data", {"train2017": content})
    change(content)
    (root / WHERE).write_text(json.dumps(content))
    check(coco(root, **EVEN), len(content["images"]), images, others)


def test_coco_files_of_latin_1(tmp_path: Path) -> None:
    """A file whose name is no UTF-8 cannot be named in JSON, so the image is missing."""
    content = coco_content()
    root = coco_tree(tmp_path / "data", {"train2017": content})
    content["images"][0]["file_name"] = "caf\u00e9.png"
    (root / WHERE).write_text(json.dumps(content))
    try:
        os.rename(root / FIRST, os.fsencode(root / "train2017") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    check(coco(root, **EVEN), 4, {"train2017/caf\u00e9.png": "cannot be reached"})


def twice(content: Any) -> Any:
    return {**content, "categories": content["categories"] * 2}


COCO_UNUSABLE: dict[str, tuple[str, str]] = {
    "nothing": ("", r"line 1 column 1: Expecting value; it must be JSON"),
    "cut short": (json.dumps(coco_content())[:500], r"line 1 column \d+: .*; it must be JSON; write the file again"),
    "a list": ("[1, 2]", r"found \[1, 2\]; it must be an object with \['images', 'annotations', 'categories'\]"),
    "no categories": ('{"images": [], "annotations": []}', r"must have a list under 'categories'"),
    "images by name": ('{"images": {}, "annotations": [], "categories": []}', r"found {}; .* a list under 'images'"),
    "deep": ("[" * 100_000, r"must be JSON of lists and objects"),
    "a long number": ("[" + "9" * 5000 + "]", r"must be JSON of lists and objects"),
    "category twice": (json.dumps(twice(coco_content())), r"categories\[2\]: found the id 7; another category has it"),
    "category without name": (
        json.dumps({**coco_content(), "categories": [{"id": 3}]}),
        r"categories\[0\]: 'name' is missing",
    ),
}


@pytest.mark.parametrize("case", COCO_UNUSABLE)
def test_unusable_json(tmp_path: Path, case: str) -> None:
    """The same for both formats that are JSON."""
    text, said = COCO_UNUSABLE[case]
    root = coco_tree(tmp_path / "data")
    (root / WHERE).write_text(text)
    with pytest.raises(ValueError, match=rf"^{WHERE}\b.*{said}"):
        coco(root, **EVEN)
    (root / "train2018.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^train2018.json\b.*{said}"):
        inaturalist(root, **EVEN)


def test_categories_of_one_name_keep_apart(tmp_path: Path) -> None:
    content = {**coco_content(), "categories": [{"id": number, "name": "dog"} for number in (7, 3)]}
    source = coco(coco_tree(tmp_path / "data", {"train2017": content}), **EVEN)
    assert source.classes == ["dog (3)", "dog (7)"]


def test_unusable_coco(tmp_path: Path) -> None:
    root = coco_tree(tmp_path / "data")
    (root / WHERE).write_bytes(
        json.dumps(coco_content(), ensure_ascii=False).replace("dog", "ch\u00ecen").encode("latin-1")
    )
    with pytest.raises(ValueError, match=r"byte \d+ is 0xec; the text must be UTF-8"):
        coco(root, **EVEN)
    (root / WHERE).write_text(json.dumps({**coco_content(), "categories": [{"id": 3, "name": "bird"}]}))
    with pytest.raises(ValueError, match=r"instances_val2017.json: categories differ from those of the other sets"):
        coco(root, **EVEN)
    (root / WHERE).rename(root / "annotations" / "instances_minitrain.json")
    with pytest.raises(ValueError, match=r"found the sets \['minitrain', 'val2017'\]; one each of train, val and test"):
        coco(root, **EVEN)
    for path in (root / "annotations").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"found neither annotations/instances_\*.json nor"):
        coco(root, **EVEN)


# VOC

VOC_FIRST = "JPEGImages/2007_000001.jpg"
LIST = "ImageSets/Segmentation/train.txt"
BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;">]>
<annotation><size><width>&c;</width></size></annotation>
"""


def element(path: str, text: str) -> Callable[[Path], None]:
    """Set a text in the first image's annotation."""

    def change(root: Path) -> None:
        tree = ElementTree.parse(root / "Annotations" / "2007_000001.xml")
        found = tree.find(path)
        assert found is not None
        found.text = text
        tree.write(root / "Annotations" / "2007_000001.xml")

    return change


def without(path: str, child: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        tree = ElementTree.parse(root / "Annotations" / "2007_000001.xml")
        parent = tree.find(path)
        assert parent is not None
        found = parent.find(child)
        assert found is not None
        parent.remove(found)
        tree.write(root / "Annotations" / "2007_000001.xml")

    return change


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def appended(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text((root / name).read_text() + text)


def values(name: str, number: int, height: int = HEIGHT) -> Callable[[Path], None]:
    return lambda root: save_values(root / name, np.full((height, WIDTH), number), palette=True)


ANNOTATION, CLASS_MASK, OBJECT_MASK = (
    f"{folder}/2007_000001.{ending}"
    for folder, ending in {"Annotations": "xml", "SegmentationClass": "png", "SegmentationObject": "png"}.items()
)
VOC: dict[str, tuple[Callable[[Path], object], str]] = {
    "entity bomb": (written(ANNOTATION, BOMB), "2007_000001.xml: the file declares a document type"),
    "outside entity": (
        written(ANNOTATION, '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'),
        "declares a document type",
    ),
    "no annotation": (lambda root: (root / ANNOTATION).unlink(), "annotation 2007_000001.xml is missing"),
    "annotation cut short": (lambda root: cut(root / ANNOTATION), "2007_000001.xml line 1: "),
    "annotation of text": (written(ANNOTATION, "no XML"), "it must be XML"),
    "annotation of nothing": (written(ANNOTATION, ""), "it must be XML"),
    "annotation in no known encoding": (written(ANNOTATION, '<?xml version="1.0" encoding="x-y"?><a/>'), "must be XML"),
    "class that is not listed": (
        element("object/name", "unicorn"),
        "object 1: its class 'unicorn' is not among the 20",
    ),
    "box outside": (element("object/bndbox/xmin", "99"), "has no area"),
    "box below": (
        lambda root: [element(f"object/bndbox/y{e}", n)(root) for e, n in (("min", "90"), ("max", "99"))],
        "object 1: the box [30, 89, 50, 99] lies outside the image of 40 x 80 px",
    ),
    "box of NaN": (element("object/bndbox/ymax", "nan"), "bndbox/ymax: found 'nan'; it must be a finite number"),
    "box without end": (element("object/bndbox/ymax", "inf"), "bndbox/ymax: found 'inf'"),
    "box of text": (element("object/bndbox/ymax", "ten"), "bndbox/ymax: found 'ten'"),
    "box without a side": (without("object/bndbox", "ymax"), "'bndbox/ymax' is missing"),
    "half difficult": (element("object/difficult", "0.5"), "difficult: found '0.5'; it must be 0 or 1"),
    "no size": (without(".", "size"), "'size/height' is missing"),
    "other size than the file": (element("size/width", "81"), "its annotations are for 40 x 81"),
    "value beyond the palette's classes": (values(CLASS_MASK, 21), "SegmentationClass: found the value 21"),
    "class mask of another size": (
        values(CLASS_MASK, 0, 39),
        "SegmentationClass: the mask is 39 x 80 px, the image 40",
    ),
    "object mask of another size": (values(OBJECT_MASK, 0, 41), "SegmentationObject: the mask is 41 x 80"),
    "object of no class": (
        lambda root: save_values(root / OBJECT_MASK, np.pad([[7]], ((39, 0), (0, 79))), palette=True),
        "object 7 overlaps no box of its class",
    ),
    "no class mask": (
        lambda root: (root / CLASS_MASK).unlink(),
        "mask SegmentationClass/2007_000001.png: the file cannot",
    ),
    "empty object mask": (written(OBJECT_MASK, ""), "mask SegmentationObject/2007_000001.png: the file is empty"),
    "object mask cut short": (lambda root: cut(root / OBJECT_MASK), "it cannot be decoded"),
    "mask in colours": (lambda root: Image.new("RGB", (WIDTH, HEIGHT)).save(root / CLASS_MASK), "its mode is RGB"),
}
VOC_LISTS: dict[str, tuple[str, int, Reasons, Reasons]] = {
    "more lines than images": ("2007_000009\n", 1, {"JPEGImages/2007_000009.jpg": "2007_000009.xml is missing"}, {}),
    "name twice": ("2007_000001\n", 0, {}, {f"{LIST} line 5": f"'2007_000001' is listed in {LIST} line 1"}),
    "name that climbs": ("../x\n", 0, {}, {f"{LIST} line 5": "found '../x'; a line is the name of one image"}),
    "two words": ("2007_000003 1\n", 0, {}, {f"{LIST} line 5": "a line is the name of one image"}),
    "name of val": (
        "2007_000005\n",
        0,
        {},
        {"ImageSets/Segmentation/val.txt line 1": f"'2007_000005' is listed in {LIST} line 5 already"},
    ),
}


@pytest.mark.parametrize("case", VOC)
def test_voc_annotations(tmp_path: Path, case: str) -> None:
    change, reason = VOC[case]
    root = voc_tree(tmp_path / "data")
    change(root)
    check(voc(root, lists="segmentation", **EVEN), 5, {VOC_FIRST: reason})


@pytest.mark.parametrize("case", VOC_LISTS)
def test_voc_lists(tmp_path: Path, case: str) -> None:
    text, more, images, others = VOC_LISTS[case]
    root = voc_tree(tmp_path / "data")
    appended(LIST, text)(root)
    check(voc(root, lists="segmentation", **EVEN), 5 + more, images, others)


def test_unusable_voc(tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "VOCdevkit" / "VOC2012")
    with pytest.raises(ValueError, match=r"it has \['VOC2012'\]; give one of them"):
        voc(root.parent, **EVEN)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"^ImageSets/Main/train.txt: byte 3 is 0xe9; the text must be UTF-8"):
        voc(root, **EVEN)
    for path in (root / "ImageSets" / "Main").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"^ImageSets/Main/trainval.txt: the file is missing"):
        voc(root, **EVEN)


# ADE20K

ADE_FIRST, ADE_MASK = "images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"
SCENES = "sceneCategories.txt"
ADE: dict[str, tuple[Callable[[Path], object], Reasons, Reasons]] = {
    "value beyond the list": (
        values(ADE_MASK, 200),
        {ADE_FIRST: "its mask has the value 200; values are 0 to 150"},
        {},
    ),
    "mask of another size": (values(ADE_MASK, 3, 39), {ADE_FIRST: "its annotations are for 39 x 80"}, {}),
    "no mask": (
        lambda root: (root / ADE_MASK).unlink(),
        {ADE_FIRST: "mask training/ADE_train_00000001.png: the file"},
        {},
    ),
    "empty mask": (written(ADE_MASK, ""), {ADE_FIRST: "mask training/ADE_train_00000001.png: the file is empty"}, {}),
    "mask cut short": (lambda root: cut(root / ADE_MASK), {ADE_FIRST: "it cannot be decoded"}, {}),
    "mask without an image": (
        values("annotations/training/more.png", 3),
        {},
        {"annotations/training/more.png": "there is no image of this name"},
    ),
    "more lines than images": (appended(SCENES, "more attic\n"), {}, {f"{SCENES}: more": "no image of this name"}),
    "line of one word": (appended(SCENES, "more\n"), {}, {f"{SCENES} line 5": "found 'more'; a line is a name and"}),
    "two scenes": (
        appended(SCENES, "ADE_train_00000001 attic\n"),
        {},
        {f"{SCENES} line 5": "'ADE_train_00000001' is a airport on a line above"},
    ),
}


@pytest.mark.parametrize("case", ADE)
def test_ade20k_entries(tmp_path: Path, case: str) -> None:
    change, images, others = ADE[case]
    root = ade_tree(tmp_path / "data")
    change(root)
    check(ade20k(root, **EVEN), 4, images, others)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"line 1: found \[\]; the columns Idx and Name must be there"),
        ("Idx\tStuff\n1\t0\n", r"line 1: found \['idx', 'stuff'\]"),
        ("Idx\tName\n1\twall\n3\tsky\n", r"line 3: found '3\\tsky'; it must have 2 cells, and Idx 2"),
        ("Idx\tName\n1\twall\tgrey\n", r"line 2: found .* it must have 2 cells"),
        ("Idx\tName\n", r"found 0 names; masks of 8 bits take 1 to 254"),
    ],
)
def test_unusable_ade20k(tmp_path: Path, text: str, said: str) -> None:
    root = ade_tree(tmp_path / "data")
    (root / "objectInfo150.txt").write_text(text)
    with pytest.raises(ValueError, match=f"^objectInfo150.txt.*{said}"):
        ade20k(root, **EVEN)
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(ValueError, match=r"^objectInfo150.txt: the file is missing"):
        ade20k(root, **EVEN)


# iNaturalist

INAT_FIRST, INAT = "train_val2018/Aves/1/train1.png", "train2018.json"
INATURALIST: dict[str, tuple[Change, Reasons, Reasons]] = {
    "category that is not listed": (thing(0, category_id=9), {INAT_FIRST: "category_id: found 9"}, {}),
    "annotation of no image": (
        thing(0, image_id=99),
        {INAT_FIRST: "it has 0 annotations; an image has one"},
        {f"{INAT}: annotations[0]": "of the image 99"},
    ),
    "two annotations": (
        lambda content: content["annotations"].append({"id": 9, "image_id": 1, "category_id": 2}),
        {INAT_FIRST: "it has 2 annotations; an image has one"},
        {},
    ),
    "id twice": (
        thing(1, id=1),
        {"train_val2018/Aves/2/train2.png": "annotations[1]: the id 1 is that of another"},
        {},
    ),
    "category of text": (
        thing(0, category_id="2"),
        {INAT_FIRST: "category_id: found '2'; must be a valid integer"},
        {},
    ),
    "image id twice": (
        image(1, id=1),
        {f"{INAT}: images[{number}]": "the id 1 is that of 2 images" for number in (0, 1)},
        {f"{INAT}: annotations[1]": "of the image 2"},
    ),
    "image id of a list": (
        image(1, id=[1]),
        {f"{INAT}: images[1]": "id: found [1]; must be a valid integer"},
        {f"{INAT}: annotations[1]": "of the image 2"},
    ),
    "file twice": (image(1, file_name=INAT_FIRST), {f"{INAT}: images[1]": "is listed as images[0] too"}, {}),
    "file that climbs": (image(0, file_name="a/../../x.png"), {f"{INAT}: images[0]": "leads out"}, {}),
    "file with an endless name": (image(0, file_name="x" * 300), {"x" * 300: "File name too long"}, {}),
}


@pytest.mark.parametrize("case", INATURALIST)
def test_inaturalist_entries(tmp_path: Path, case: str) -> None:
    change, images, others = INATURALIST[case]
    root = inaturalist_tree(tmp_path / "data")
    content = inaturalist_content("train", (1, 2, 3, 4))
    change(content)
    (root / INAT).write_text(json.dumps(content))
    check(inaturalist(root, **EVEN), 6, images, others)


def test_unusable_inaturalist(tmp_path: Path) -> None:
    root = inaturalist_tree(tmp_path / "data")
    (root / "train2019.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found \['train2018.json', 'train2019.json'\]; a dataset has one of them"):
        inaturalist(root, **EVEN)
    (root / "train2019.json").unlink()
    content = inaturalist_content("val", (5, 6))
    content["categories"][0]["name"] = "Corvus corax"
    (root / "val2018.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"val2018.json: categories differ from train's"):
        inaturalist(root, **EVEN)
    for kind in ("train", "val"):
        (root / f"{kind}2018.json").unlink()
    with pytest.raises(ValueError, match=r"found no train<year>.json; the labels are there"):
        inaturalist(root, **EVEN)


# CSV

ROWS: dict[str, tuple[str, Reasons, Reasons]] = {
    "more lines than images": ("b/6.png,cat,,train,y", {"b/6.png": "cannot be reached"}, {}),
    "file that climbs": (
        "../x.png,cat,,train,y",
        {"labels.csv line 7": "'../x.png' leads out of the dataset's folder"},
        {},
    ),
    "absolute file": ("/etc/x.png,cat,,train,y", {"labels.csv line 7": "leads out"}, {}),
    "file of Windows": ("b\\5.png,cat,,train,y", {"labels.csv line 7": "write the path with '/'"}, {}),
    "no file": (",cat,,train,y", {"labels.csv line 7": "a file must be named"}, {}),
    "file twice": ("b/./5.png,cat,,train,y", {"labels.csv line 7": "lists it on line 6 and again on line 7"}, {}),
    "too few values": ("b/5.png,cat", {"labels.csv line 7": "the line has 2 values, and there are 5 columns"}, {}),
    "too many values": ("b/5.png,a,b,train,x,y", {"labels.csv line 7": "the line has 6 values"}, {}),
    "other split": ("b/6.png,cat,,tain,y", {"b/6.png": "its split is 'tain'"}, {}),
    "no split": ("b/6.png,cat,,,y", {"b/6.png": "its split is ''"}, {}),
    "labels in one column": (
        "b/6.png,cat;dog,,train,y",
        {"b/6.png": "several labels belong into a column `labels`"},
        {},
    ),
    "text": ("labels.csv,cat,,train,y", {"labels.csv": "'.csv' is not one of the image extensions"}, {}),
    "folder": ("b,cat,,train,y", {"b": "or folder"}, {}),
}


@pytest.mark.parametrize("case", ROWS)
def test_csv_rows(tmp_path: Path, case: str) -> None:
    row, images, others = ROWS[case]
    check(csv_table(csv_tree(tmp_path / "data", f"{CSV}{row}\n"), **EVEN), 6, images, others)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"line 1: found \[\]; a column `file` must be there"),
        (b"flie,label\na,b\n", r"found \['flie', 'label'\]; a column `file` must be there; did you mean 'flie'\?"),
        (b"file,lable\na,b\n", r"a column `label` or `labels` must be there; did you mean 'lable'\?"),
        (b"file,label,label\na,b,c\n", r"found the column label twice"),
        (b"file,label\na,caf\xe9\n", r"byte 16 is 0xe9; the text must be UTF-8; save it so"),
        (b'file,label\na,"b\n', r"line 2: unexpected end of data; it must be a table of commas"),
        (b"file,label\n", r"found no readable image \(0 refused\)"),
    ],
)
def test_unusable_csv(tmp_path: Path, content: bytes, said: str) -> None:
    root = csv_tree(tmp_path / "data")
    (root / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        csv_table(root, **EVEN)


def test_csv_needs_one_table(tmp_path: Path) -> None:
    root = csv_tree(tmp_path / "data")
    for table, said in {
        "gone.csv": r"gone.csv: the file is missing",
        "../x.csv": r"table: '../x.csv' leads out",
    }.items():
        with pytest.raises(ValueError, match=said):
            csv_table(root, table=table, **EVEN)
    (root / "more.csv").write_text(CSV)
    with pytest.raises(ValueError, match=r"found the tables \['labels.csv', 'more.csv'\]; one must be there"):
        csv_table(root, **EVEN)
    assert csv_table(root, table="more.csv", **EVEN).counts["train"] == 3


# CIFAR and STL-10: files are the published ones or nothing.


class Runs:
    """A pickle that leaves a file behind when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("opened",)


def test_cifar_files_that_are_not_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, table in cifar_tree(tmp_path, CIFAR10, "labels", "label_names", 5).items():
        monkeypatch.setattr(CIFAR10, name, table)
    for name in ("data_batch_3", "test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        whole = path.read_bytes()
        cut(path)
        with pytest.raises(ValueError, match=rf"{name}: found {len(whole) // 2} bytes whose MD5 is not [0-9a-f]{{32}}"):
            cifar10(tmp_path)
        path.write_bytes(pickle.dumps(Runs()))
        with pytest.raises(ValueError, match=r"it is cut short or another; fetch it again"):
            cifar10(tmp_path)
        assert not (tmp_path / "opened").exists()
        path.unlink()
        with pytest.raises(ValueError, match=rf"{name}: the file is missing; it is part of CIFAR10"):
            cifar10(tmp_path)
        path.write_bytes(whole)
    assert cifar10(tmp_path).counts["test"] == 10


def test_stl10_files_that_are_not_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, table in stl_tree(tmp_path, STL10).items():
        monkeypatch.setattr(STL10, name, table)
    cut(tmp_path / "stl10_binary" / "unlabeled_X.bin")
    with pytest.raises(ValueError, match=r"stl10_binary/unlabeled_X.bin: found \d+ bytes whose MD5 is not"):
        stl10(tmp_path)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    stl_tree(tmp_path, STL10)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    with pytest.raises(ValueError, match=r"class_names.txt: the file is missing"):
        stl10(tmp_path)


def test_other_channels_are_listed(tmp_path: Path) -> None:
    root = csv_tree(tmp_path / "data")
    Image.new("L", (WIDTH, HEIGHT)).save(root / "b" / "4.png")
    source = csv_table(root, channels="all", **EVEN)
    assert listed(source) == {"b/4.png": "has 1 channels, and most images here have 3"}
    assert sum(source.counts.values()) == 4
    save_image(root / "b" / "4.png", 3)
    assert not csv_table(root, channels="all", **EVEN).quarantined


def test_run_lengths_of_the_tests_are_pycocotools() -> None:
    from pycocotools import mask as rle

    region = np.zeros((HEIGHT, WIDTH), np.uint8)
    region[3:9, 4:20] = 1
    ours = rle.frPyObjects({"counts": run_lengths(region), "size": [HEIGHT, WIDTH]}, HEIGHT, WIDTH)
    assert ours["counts"] == rle.encode(np.asfortranarray(region))["counts"]
