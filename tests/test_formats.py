"""Datasets in published forms: every label, box and mask of a small one, worked out by hand.

Images of 40 x 80 px become 20 x 20: `cover` keeps columns 20 to 60 at half the size, `contain` has all at a quarter in
the upper half, `stretch` at a half down and a quarter across.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from format_trees import (
    EVEN,
    HEIGHT,
    WIDTH,
    ade_tree,
    cifar_images,
    cifar_tree,
    coco_content,
    coco_tree,
    csv_tree,
    inaturalist_tree,
    listed,
    packed,
    save_image,
    save_values,
    stl_tree,
    voc_tree,
)
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from mim_core.data.ade20k import ade20k
from mim_core.data.cifar import cifar10, cifar100, stl10
from mim_core.data.coco import coco
from mim_core.data.csv_table import csv_table
from mim_core.data.fit import place
from mim_core.data.images import decode
from mim_core.data.inaturalist import inaturalist
from mim_core.data.pack import CROWD, DIFFICULT, Pack, semantic_map
from mim_core.data.sources import SOURCES
from mim_core.data.voc import CLASSES, voc
from mim_core.params import DataRow
from mim_core.spec import SpecError, check

FITS = ("cover", "contain", "stretch")


def zeros(beyond: int = 0, fit: str = "") -> np.ndarray:
    """A map of 20 x 20 px, `beyond` in the lower half where an image is contained."""
    whole = np.zeros((20, 20), np.int64)
    whole[10:] = beyond if fit == "contain" else 0
    return whole


def check_images(pack: Pack, paths: list[Path], fit: str) -> None:
    """The training images are the files, fitted."""
    images = pack.split("train").images
    assert images.shape == (len(paths), 3, 20, 20)
    for image, path in zip(images, paths, strict=True):
        assert (image == place((HEIGHT, WIDTH), (20, 20), fit).image(decode(path))).all()  # type: ignore[arg-type]


# COCO: the objects' boxes and masks as `coco_content` has them; cup is class 0 (id 3), dog is class 1 (id 7).

COCO_BOXES = {
    "cover": [[[5, 5, 15, 15, 1]], [[5, 5, 7, 7, 0], [2, 4, 12, 14, 1]]],
    "contain": [
        [[7.5, 2.5, 12.5, 7.5, 1], [0, 0, 6, 2, 0], [15, 5, 20, 10, 0]],
        [[7.5, 2.5, 8.5, 3.5, 0], [6, 2, 11, 7, 1]],
    ],
    "stretch": [
        [[7.5, 5, 12.5, 15, 1], [0, 0, 6, 4, 0], [15, 10, 20, 20, 0]],
        [[7.5, 5, 8.5, 7, 0], [6, 4, 11, 14, 1]],
    ],
}
COCO_FLAGS = {"cover": [0], "contain": [0, 0, CROWD], "stretch": [0, 0, CROWD]}
COCO_MASKS: dict[str, list[list[tuple[slice, slice]]]] = {
    "cover": [[(slice(5, 15), slice(5, 15))], [(slice(5, 7), slice(5, 7)), (slice(4, 14), slice(2, 12))]],
    # Pixels' middles lie at 2, 6, 10, ...: a mask of columns 30 to 50 has the middles 30 to 46, which are 7 to 11.
    "contain": [
        [(slice(2, 7), slice(7, 12)), (slice(0, 2), slice(0, 6)), (slice(5, 10), slice(15, 20))],
        [(slice(2, 3), slice(7, 8)), (slice(2, 7), slice(6, 11))],
    ],
    "stretch": [
        [(slice(5, 15), slice(7, 12)), (slice(0, 4), slice(0, 6)), (slice(10, 20), slice(15, 20))],
        [(slice(5, 7), slice(7, 8)), (slice(4, 14), slice(6, 11))],
    ],
}


@pytest.mark.parametrize("fit", FITS)
def test_coco(tmp_path: Path, fit: str) -> None:
    root = coco_tree(tmp_path / "coco")
    source = coco(root, fit=fit, **EVEN)  # type: ignore[arg-type]
    assert not source.quarantined
    assert source.left_out == {"train": 2 if fit == "cover" else 0, "validation": 0, "test": 0}
    assert {path.relative_to(root).as_posix() for path in source.files} == {
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        *(f"train2017/{number:012}.png" for number in (11, 12, 13, 14)),
        "val2017/000000000021.png",
    }
    pack = packed(source, tmp_path / "pack")
    assert pack.classes == ["cup", "dog"]
    assert pack.segments == ["background", "cup", "dog"]
    assert pack.annotations == ["boxes", "instances"]
    assert pack.meta["counts"] == {"train": 4, "validation": 0, "test": 1}
    assert pack.meta["left_out"] == source.left_out
    check_images(pack, [root / "train2017" / f"{number:012}.png" for number in (11, 12, 13, 14)], fit)
    train = pack.split("train")
    assert train.array("origins").tolist() == [[11], [12], [13], [14]]
    assert (train.labels == -1).all()
    assert train.array("instances").dtype == np.uint8
    for index in range(4):
        boxes, flags = train.objects(index)
        wanted = COCO_BOXES[fit][index] if index < 2 else []
        assert boxes.tolist() == wanted
        assert flags.tolist() == (COCO_FLAGS[fit] if index == 0 else [0] * len(wanted))
        instances, semantic = zeros(), zeros()
        # In the second image the first object, a smaller one, lies over the second.
        for number in reversed(range(len(wanted))):
            instances[COCO_MASKS[fit][index][number]] = number + 1
            semantic[COCO_MASKS[fit][index][number]] = 255 if flags[number] else wanted[number][4] + 1
        assert (train.array("instances")[index] == instances).all()
        assert (semantic_map(train, index) == semantic).all()
    assert pack.split("test").objects(0)[0].shape == (0, 5)


def test_coco_compressed_run_lengths_equal_the_uncompressed(tmp_path: Path) -> None:
    """Text as pycocotools writes it, of masks with long, short and many runs."""
    from pycocotools import mask as rle

    from mim_core.data.coco import _decoded, _uncompressed, run_lengths

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < share, np.uint8)
        text = rle.encode(mask)["counts"].decode()
        packed_ = run_lengths({"size": [HEIGHT, WIDTH], "counts": text}, (HEIGHT, WIDTH))
        assert (_decoded(packed_) == mask).all()
        assert sum(_uncompressed(text)) == HEIGHT * WIDTH


def test_coco_without_masks_and_in_folders_of_their_own(tmp_path: Path) -> None:
    """The form that labelling tools export: one folder a set, annotations beside the images, boxes alone."""
    root = tmp_path / "exported"
    for name, images in {"train": (11, 12), "valid": (13,), "test": (14,)}.items():
        content = coco_content(images)
        content["annotations"] = [{**entry, "segmentation": []} for entry in content["annotations"]]
        for image in content["images"]:
            save_image(root / name / image["file_name"], image["id"])
        (root / name / "_annotations.coco.json").write_text(json.dumps(content))
    source = coco(root, **EVEN)
    assert source.counts == {"train": 2, "validation": 1, "test": 1}
    assert source.annotations == ("boxes",)
    assert source.segments == []
    with_masks = coco_tree(tmp_path / "coco")
    assert coco(with_masks, masks="none", **EVEN).annotations == ("boxes",)


@pytest.mark.parametrize(("count", "mapped"), [(254, True), (255, False)])
def test_coco_of_many_classes_has_no_semantic_maps(tmp_path: Path, count: int, mapped: bool) -> None:
    content = coco_content()
    content["categories"] = [{"id": number, "name": f"class {number}"} for number in range(count)]
    source = coco(coco_tree(tmp_path / "coco", {"train2017": content}), **EVEN)
    assert len(source.segments) == (count + 1 if mapped else 0)
    assert source.annotations == ("boxes", "instances")


def test_coco_shares_a_single_set_out(tmp_path: Path) -> None:
    content = coco_content(range(100, 120))
    root = coco_tree(tmp_path / "coco", {"default": content})
    source = coco(root, size_px=(20, 20), validation=0.2, test=0.1)
    assert source.counts == {"train": 14, "validation": 4, "test": 2}
    origins = [sample.origin[0] for split in source.counts for sample in source.samples(split)]
    assert sorted(origins) == list(range(100, 120))


def test_coco_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    content = coco_content((12,))
    content["annotations"][0]["bbox"] = [-4, 36, 12, 8]
    root = coco_tree(tmp_path / "coco", {"train2017": content})
    sample = next(coco(root, fit="stretch", **EVEN).samples("train"))
    assert sample.boxes is not None
    assert sample.boxes[0].tolist() == [0, 18, 2, 20, 0]


def test_more_than_255_objects_take_16_bits(tmp_path: Path) -> None:
    content = coco_content((11, 12))
    square = {"category_id": 3, "iscrowd": 0}
    content["annotations"] = [
        {
            "id": n,
            "image_id": 12,
            "bbox": [x, y, 2, 2],
            "segmentation": [[x, y, x + 2, y, x + 2, y + 2, x, y + 2]],
            **square,
        }
        for n in range(300)
        for x, y in [(2 * (n % 40), 2 * (n // 40))]
    ]
    root = coco_tree(tmp_path / "coco", {"train2017": content})
    pack = packed(coco(root, size_px=(HEIGHT, WIDTH), validation=0.0, test=0.0), tmp_path / "pack")
    instances = pack.split("train").array("instances")
    assert instances.dtype == np.uint16
    assert not instances[0].any()
    assert np.unique(instances[1]).tolist() == list(range(301))
    assert instances[1, 15, 39] == 7 * 40 + 19 + 1
    assert (semantic_map(pack.split("train"), 1)[:14] == 1).all()


@pytest.mark.parametrize("upright", [False, True])
def test_boxes_stay_with_an_image_that_exif_turns(tmp_path: Path, upright: bool) -> None:
    """Whether the annotations' width and height are those of the stored image or of the turned one."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[10:30, 30:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: (x, y) becomes (39 - y, x)
    content = coco_content((11,))
    content["annotations"] = content["annotations"][:1]
    if upright:
        content["images"][0].update(width=HEIGHT, height=WIDTH)
        content["annotations"][0].update(bbox=[10, 30, 20, 20], segmentation=[[10, 30, 30, 30, 30, 50, 10, 50]])
    root = coco_tree(tmp_path / "coco", {"train2017": content})
    Image.fromarray(pixels).save(root / "train2017" / "000000000011.png", exif=exif)
    size = (WIDTH, HEIGHT) if upright else (HEIGHT, WIDTH)
    sample = next(coco(root, size_px=size, validation=0.0, test=0.0).samples("train"))
    assert sample.boxes is not None
    assert sample.instances is not None
    left, top, right, bottom = sample.boxes[0, :4].astype(int)
    inside = np.zeros(size, bool)
    inside[top:bottom, left:right] = True
    assert ((sample.image == 255).all(0) == inside).all()
    assert ((sample.instances == 1) == inside).all()


# VOC: dog is class 11, cat 7; segments are one more.

DOG, CAT = CLASSES.index("dog"), CLASSES.index("cat")
VOC_BOXES = {
    "cover": [[5, 5, 15, 15, DOG]],
    "contain": [[7.5, 2.5, 12.5, 7.5, DOG], [0, 0, 6, 2, CAT], [15, 5, 20, 10, DOG]],
    "stretch": [[7.5, 5, 12.5, 15, DOG], [0, 0, 6, 4, CAT], [15, 10, 20, 20, DOG]],
}


@pytest.mark.parametrize("fit", FITS)
def test_voc_main(tmp_path: Path, fit: str) -> None:
    root = voc_tree(tmp_path / "VOC2012")
    pack = packed(voc(root, fit=fit, **EVEN), tmp_path / "pack")  # type: ignore[arg-type]
    assert (DOG, CAT) == (11, 7)
    assert pack.classes == list(CLASSES)
    assert pack.annotations == ["boxes", "presence"]
    assert pack.meta["counts"] == {"train": 4, "validation": 0, "test": 1}
    check_images(pack, sorted((root / "JPEGImages").iterdir())[:4], fit)
    train = pack.split("train")
    boxes, flags = train.objects(0)
    assert boxes.tolist() == VOC_BOXES[fit]
    assert flags.tolist() == ([0] if fit == "cover" else [0, DIFFICULT, 0])
    assert train.objects(3)[0].tolist() == [[0, 0, 20, 10 if fit == "contain" else 20, CLASSES.index("tvmonitor")]]
    presence = np.zeros((4, 20), int)
    presence[0, [DOG, CAT]] = presence[1, CAT] = -1
    presence[0, DOG] = presence[3, CLASSES.index("tvmonitor")] = 1
    assert train.array("presence").tolist() == presence.tolist()
    assert train.array("origins").tolist() == [[0], [1], [2], [3]]
    assert pack.split("test").array("origins").tolist() == [[4]]


@pytest.mark.parametrize("fit", FITS)
def test_voc_segmentation(tmp_path: Path, fit: str) -> None:
    """Objects are numbered as the annotation has them, whatever the order in the mask."""
    root = voc_tree(tmp_path / "VOC2012")
    pack = packed(voc(root, lists="segmentation", fit=fit, **EVEN), tmp_path / "pack")  # type: ignore[arg-type]
    assert pack.annotations == ["boxes", "instances", "presence", "semantic"]
    assert pack.segments == ["background", *CLASSES]
    train = pack.split("train")
    instances, semantic = zeros(), zeros(255, fit)
    rows, columns = {"cover": ((5, 15), (5, 15)), "contain": ((2, 7), (7, 12)), "stretch": ((5, 15), (7, 12))}[fit]
    first = (slice(*rows), slice(*columns))
    instances[first], semantic[first] = 1, DOG + 1
    if fit == "contain":
        instances[0:2, 0:6], semantic[0:2, 0:6] = 2, CAT + 1
        instances[5:10, 15:20], semantic[5:10, 15:20] = 3, DOG + 1
        # The border, row 10, is the middle of row 2.
        instances[2, 7:12], semantic[2, 7:12] = 0, 255
    elif fit == "stretch":
        instances[0:4, 0:6], semantic[0:4, 0:6] = 2, CAT + 1
        instances[10:20, 15:20], semantic[10:20, 15:20] = 3, DOG + 1
    else:
        # Of the cat's mask columns 20 to 24 remain, though its box is left out.
        semantic[0:4, 0:2] = CAT + 1
    assert (train.array("instances")[0] == instances).all()
    assert (semantic_map(train, 0) == semantic).all()
    assert (semantic_map(train, 1) == zeros(255, fit)).all()


def test_voc_files_serve_both_lists(tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "VOC2012")
    save_image(root / "JPEGImages" / "in_no_list.jpg", 99)
    files = {path.relative_to(root).as_posix() for path in voc(root, **EVEN).files}
    names = [f"2007_00000{number}" for number in range(1, 6)]
    parts = {"JPEGImages": "jpg", "Annotations": "xml", "SegmentationClass": "png", "SegmentationObject": "png"}
    expected = {f"{folder}/{name}.{ending}" for folder, ending in parts.items() for name in names}
    lists = {
        f"ImageSets/{part}/{kind}.txt" for part in ("Main", "Segmentation") for kind in ("train", "val", "trainval")
    }
    assert files == expected | lists


def test_voc_test_set_with_and_without_annotations(tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "VOC2007")
    save_image(root / "JPEGImages" / "2007_000006.jpg", 6)
    (root / "ImageSets" / "Main" / "test.txt").write_text("2007_000006\n")
    source = voc(root, **EVEN)
    assert source.counts == {"train": 4, "validation": 0, "test": 1}
    assert "none of its 1 images has an annotation" in listed(source)["ImageSets/Main/test.txt"]
    annotation = ElementTree.parse(root / "Annotations" / "2007_000005.xml")
    annotation.write(root / "Annotations" / "2007_000006.xml")
    source = voc(root, **EVEN)
    assert source.counts == {"train": 4, "validation": 1, "test": 1}
    assert [sample.origin for sample in source.samples("test")] == [(5,)]


def test_voc_with_classes_of_ones_own(tmp_path: Path) -> None:
    root = voc_tree(tmp_path / "own")
    source = voc(root, classes=("cat", "dog", "tvmonitor"), **EVEN)
    assert source.classes == ["cat", "dog", "tvmonitor"]
    presence = [sample.presence for sample in source.samples("train")]
    assert presence[0] is not None
    assert presence[0].tolist() == [-1, 1, 0]


# ADE20K


@pytest.mark.parametrize("fit", FITS)
def test_ade20k(tmp_path: Path, fit: str) -> None:
    root = ade_tree(tmp_path / "ade")
    source = ade20k(root, fit=fit, **EVEN)  # type: ignore[arg-type]
    assert not source.quarantined
    assert len(source.files) == 4 + 4 + 2
    pack = packed(source, tmp_path / "pack")
    assert pack.annotations == ["labels", "semantic"]
    assert (len(pack.segments), pack.segments[0], pack.segments[-1]) == (150, "s1, thing 1", "s150, thing 150")
    assert pack.classes == ["airport", "attic"]
    check_images(pack, sorted((root / "images" / "training").iterdir()), fit)
    train = pack.split("train")
    assert train.labels.tolist() == [0, 1, 0]
    assert pack.split("test").labels.tolist() == [1]
    semantic = np.full((20, 20), 255)
    if fit == "contain":
        semantic[:5], semantic[5:10, 10:] = 0, 149
    else:
        semantic[:10], semantic[10:, 10:] = 0, 149
    for index in range(3):
        assert (semantic_map(train, index) == semantic).all()
    assert train.array("semantic").dtype == np.uint8


def test_ade20k_without_scenes(tmp_path: Path) -> None:
    source = ade20k(ade_tree(tmp_path / "ade", scenes=False), **EVEN)
    assert source.annotations == ("semantic",)
    assert source.classes == []


def test_ade20k_mask_decides_whether_exif_turns(tmp_path: Path) -> None:
    root = ade_tree(tmp_path / "ade")
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(root / "images" / "training" / "ADE_train_00000001.jpg", 0, exif=exif)
    save_image(root / "images" / "training" / "ADE_train_00000002.jpg", 1, exif=exif)
    values = np.zeros((WIDTH, HEIGHT), np.uint8)
    values[:40] = 5
    save_values(root / "annotations" / "training" / "ADE_train_00000002.png", values)
    source = ade20k(root, fit="stretch", **EVEN)
    assert not source.quarantined
    samples = list(source.samples("train"))
    assert samples[1].semantic is not None
    assert (samples[1].semantic[:10] == 4).all()
    assert (samples[1].semantic[10:] == 255).all()
    upright = decode(root / "images" / "training" / "ADE_train_00000002.jpg")
    assert (samples[1].image == place((WIDTH, HEIGHT), (20, 20), "stretch").image(upright)).all()
    stored = decode(root / "images" / "training" / "ADE_train_00000001.jpg", frame=(HEIGHT, WIDTH))
    assert (samples[0].image == place((HEIGHT, WIDTH), (20, 20), "stretch").image(stored)).all()


# iNaturalist, CSV


@pytest.mark.parametrize("fit", FITS)
def test_inaturalist(tmp_path: Path, fit: str) -> None:
    root = inaturalist_tree(tmp_path / "inat")
    source = inaturalist(root, fit=fit, **EVEN)  # type: ignore[arg-type]
    assert not source.quarantined
    assert len(source.files) == 2 + 6
    pack = packed(source, tmp_path / "pack")
    assert pack.classes == ["Pica pica", "Turdus merula"]
    assert pack.annotations == ["labels"]
    assert pack.split("train").labels.tolist() == [0, 1, 0, 1]
    assert pack.split("train").array("origins").tolist() == [[1], [2], [3], [4]]
    assert pack.split("test").labels.tolist() == [0, 1]
    check_images(pack, [root / f"train_val2018/Aves/{number}/train{number}.png" for number in (1, 2, 3, 4)], fit)


@pytest.mark.parametrize("fit", FITS)
def test_csv(tmp_path: Path, fit: str) -> None:
    root = csv_tree(tmp_path / "table")
    source = csv_table(root, fit=fit, **EVEN)  # type: ignore[arg-type]
    assert not source.quarantined
    pack = packed(source, tmp_path / "pack")
    assert pack.classes == ["cat", "dog", "indoor", "outdoor"]
    assert pack.annotations == ["labels", "presence"]
    train = pack.split("train")
    assert train.labels.tolist() == [0, 1, -1]
    assert train.array("presence").tolist() == [[1, 0, 1, 0], [-1, -1, -1, -1], [0, 1, 1, 0]]
    assert train.array("origins").tolist() == [[2], [3], [4]]
    assert pack.split("validation").array("presence").tolist() == [[0, 0, 0, 1]]
    assert pack.split("test").labels.tolist() == [1]
    check_images(pack, [root / name for name in ("a/1.png", "a/2.png", "b/3.png")], fit)


def test_csv_without_splits_and_with_one_column_of_labels(tmp_path: Path) -> None:
    rows = ["\ufefffile,label", *(f"{number}.png,{'cat' if number < 8 else 'dog'}" for number in range(10))]
    root = tmp_path / "table"
    root.mkdir()
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    for number in range(10):
        save_image(root / f"{number}.png", number, 8, 8)
    source = csv_table(root, size_px=(8, 8), validation=0.2, test=0.2)
    assert source.counts == {"train": 6, "validation": 2, "test": 2}
    assert source.annotations == ["labels"]
    again = csv_table(root, size_px=(8, 8), table="list.csv", validation=0.2, test=0.2)
    for split in source.counts:
        assert [s.origin for s in source.samples(split)] == [s.origin for s in again.samples(split)]


# Rows


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"scenes"}))
def test_rows_of_each_source(name: str) -> None:
    """A row says how images are fitted and which channels they have; anything else is refused by name."""
    row = {"name": name, "size_px": [20, 30], "fit": "contain", "channels": "grey", "validation": 0.2}
    source = check(DataRow, {"source": row}, "data.mine").source
    assert row.items() <= {**source.params(), "name": name, "size_px": list(source.params()["size_px"])}.items()
    for key, value, said in [
        ("fit", "fill", r"data.mine.source.fit: found 'fill'; must be 'cover', 'contain' or 'stretch'"),
        ("channels", 3, r"data.mine.source.channels: found 3; must be 'rgb', 'grey' or 'all'"),
        ("validation", 1.0, r"data.mine.source.validation: found 1.0; must be less than 1"),
        ("sise_px", 32, r"data.mine.source.sise_px: unknown key; .*; did you mean 'size_px'\?"),
    ]:
        with pytest.raises(SpecError, match=said):
            check(DataRow, {"source": {**row, key: value}}, "data.mine")


def test_a_row_of_voc_names_its_classes() -> None:
    row = {"name": "voc", "classes": ["cat", "dog"], "lists": "segmentation"}
    assert check(DataRow, {"source": row}, "data.mine").source.params()["classes"] == ("cat", "dog")
    with pytest.raises(SpecError, match=r"data.mine.source.classes.1: found 2; must be a valid string"):
        check(DataRow, {"source": {**row, "classes": ["cat", 2]}}, "data.mine")


# CIFAR and STL-10, whose MD5s torchvision knows: here its tables have those of the small batches.


def patched(monkeypatch: pytest.MonkeyPatch, kind: Any, tables: dict[str, Any]) -> None:
    for name, table in tables.items():
        monkeypatch.setattr(kind, name, table)


@pytest.mark.parametrize("fit", FITS)
def test_cifar10(tmp_path: Path, fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, CIFAR10, cifar_tree(tmp_path, CIFAR10, "labels", "label_names", 5))
    source = cifar10(tmp_path, fit=fit, validation=0.0)  # type: ignore[arg-type]
    assert source.counts == {"train": 50, "validation": 0, "test": 10}
    assert source.classes == [f"class {place}" for place in range(5)]
    samples = list(source.samples("train"))
    assert [sample.label for sample in samples] == [place % 5 for place in range(10)] * 5
    images = np.concatenate([cifar_images(10, number) for number in range(5)])
    assert (np.stack([sample.image for sample in samples]) == images).all()
    assert (np.stack([sample.image for sample in source.samples("test")]) == cifar_images(10, 90)).all()
    theirs = CIFAR10(str(tmp_path), train=True, download=False)
    assert (np.asarray(theirs[17][0]).transpose(2, 0, 1) == samples[17].image).all()
    assert theirs[17][1] == samples[17].label
    small = next(cifar10(tmp_path, size_px=(16, 8), fit=fit, channels="grey", validation=0.0).samples("test"))  # type: ignore[arg-type]
    assert small.image.shape == (1, 16, 8)


def test_cifar100_shares_each_class_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, CIFAR100, cifar_tree(tmp_path, CIFAR100, "fine_labels", "fine_label_names", 2))
    source = cifar100(tmp_path, validation=0.2)
    assert source.counts == {"train": 8, "validation": 2, "test": 10}
    assert sorted(sample.label for sample in source.samples("validation")) == [0, 1]
    assert len({sample.origin for split in ("train", "validation") for sample in source.samples(split)}) == 10
    assert {path.name for path in source.files} == {"train", "test", "meta"}


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, STL10, stl_tree(tmp_path, STL10))
    source = stl10(tmp_path, size_px=(96, 96), validation=0.0)
    assert source.counts == {"train": 7, "validation": 0, "test": 2}
    pack = packed(source, tmp_path / "pack")
    train = pack.split("train")
    assert train.labels.tolist() == [0, 1, 9, 0, -1, -1, -1]
    assert pack.split("test").labels.tolist() == [2, 9]
    # The file has each channel column by column.
    first = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), np.uint8)
    assert (train.images[:4] == first.transpose(0, 1, 3, 2)).all()
    unlabelled = np.random.default_rng(2).integers(0, 256, (3, 3, 96, 96), np.uint8)
    assert (train.images[4:] == unlabelled.transpose(0, 1, 3, 2)).all()
