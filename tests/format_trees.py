"""Small datasets written to disk in the form of each published one, with standard libraries, Pillow and numpy."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from mim_core.data.pack import Pack, Source, open_pack, write

HEIGHT, WIDTH = 40, 80
SIZE = (20, 20)
EVEN = {"size_px": SIZE, "validation": 0.0, "test": 0.0}


def save_image(path: Path, seed: int, height: int = HEIGHT, width: int = WIDTH, **options: Any) -> None:
    """Noise, whose bytes no other seed has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def save_values(path: Path, values: np.ndarray, *, palette: bool = False) -> None:
    """One value a pixel, as grey or as places in a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image = Image.frombytes("P", image.size, values.astype(np.uint8).tobytes())
        image.putpalette([(31 * place) % 256 for place in range(768)])
    image.save(path)


def packed(source: Source, folder: Path) -> Pack:
    write(source, folder, {})
    return open_pack(folder)


def listed(source: Source) -> dict[str, str]:
    return {entry["file"]: entry["reason"] for entry in source.quarantined}


# COCO


def coco_object(number: int, image: int, category: int, bbox: Sequence[float], **fields: Any) -> dict[str, Any]:
    left, top, width, height = bbox
    right, bottom = left + width, top + height
    rectangle = [left, top, right, top, right, bottom, left, bottom]
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0}
    return {**entry, "area": width * height, "segmentation": [rectangle], **fields}


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, uncompressed: down the columns, zeros first."""
    flat = mask.astype(int).T.ravel()
    ends = [*(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    runs = np.diff([0, *ends]).tolist()
    return [0, *runs] if flat[0] else runs


def coco_content(images: Sequence[int] = (11, 12, 13, 14)) -> dict[str, Any]:
    """Image 11 has three objects, one of them a crowd; 12 two, one over the other; 13 and 14 none."""
    corner = np.zeros((HEIGHT, WIDTH), bool)
    corner[20:, 60:] = True
    crowd = {"counts": run_lengths(corner), "size": [HEIGHT, WIDTH]}
    objects = [
        coco_object(1, 11, 7, [30, 10, 20, 20]),
        coco_object(2, 11, 3, [0, 0, 24, 8]),
        coco_object(3, 11, 3, [60, 20, 20, 20], segmentation=crowd, iscrowd=1),
        coco_object(4, 12, 3, [30, 10, 4, 4]),
        coco_object(5, 12, 7, [24, 8, 20, 20]),
    ]
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": number, "file_name": f"{number:012}.png", "width": WIDTH, "height": HEIGHT, "license": 1}
            for number in images
        ],
        "annotations": [entry for entry in objects if entry["image_id"] in images],
        "categories": [
            {"id": 7, "name": "dog", "supercategory": "animal"},
            {"id": 3, "name": "cup", "supercategory": "kitchen"},
        ],
    }


def coco_tree(root: Path, sets: Mapping[str, Any] | None = None) -> Path:
    """`annotations/instances_<set>.json` and the images of each set."""
    sets = {"train2017": coco_content(), "val2017": coco_content((21,))} if sets is None else sets
    for name, content in sets.items():
        path = root / "annotations" / f"instances_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        for image in content["images"]:
            save_image(root / name / image["file_name"], image["id"])
    return root


# VOC


def voc_annotation(objects: Sequence[tuple[str, Sequence[float], int]]) -> ElementTree.Element:
    annotation = ElementTree.Element("annotation")
    for key, text in {"folder": "VOC2012", "filename": "x.jpg", "segmented": "1"}.items():
        ElementTree.SubElement(annotation, key).text = text
    size = ElementTree.SubElement(annotation, "size")
    for key, number in {"width": WIDTH, "height": HEIGHT, "depth": 3}.items():
        ElementTree.SubElement(size, key).text = str(number)
    for name, corners, difficult in objects:
        thing = ElementTree.SubElement(annotation, "object")
        for key, text in {"name": name, "pose": "Left", "truncated": "0", "difficult": str(difficult)}.items():
            ElementTree.SubElement(thing, key).text = text
        box = ElementTree.SubElement(thing, "bndbox")
        for key, number in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, key).text = f"{number:g}"
    return annotation


VOC_OBJECTS: dict[str, list[tuple[str, Sequence[float], int]]] = {
    "2007_000001": [("dog", (31, 11, 50, 30), 0), ("cat", (1, 1, 24, 8), 1), ("dog", (61, 21, 80, 40), 0)],
    "2007_000002": [("cat", (31, 11, 50, 30), 1)],
    "2007_000003": [],
    "2007_000004": [("tvmonitor", (1, 1, 80, 40), 0)],
    "2007_000005": [("dog", (31, 11, 50, 30), 0)],
}


def voc_tree(root: Path) -> Path:
    """Four training images and one of val in both lists; the first has masks of its objects in another order."""
    for seed, (name, objects) in enumerate(VOC_OBJECTS.items()):
        save_image(root / "JPEGImages" / f"{name}.jpg", seed, quality=90)
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(voc_annotation(objects)).write(root / "Annotations" / f"{name}.xml")
        classes, instances = np.zeros((2, HEIGHT, WIDTH), np.uint8)
        if name == "2007_000001":
            # dog 12, cat 8; the border of the first dog is not judged.
            instances[10:30, 30:50], classes[10:30, 30:50] = 2, 12
            instances[10, 30:50] = classes[10, 30:50] = 255
            instances[0:8, 0:24], classes[0:8, 0:24] = 3, 8
            instances[20:40, 60:80], classes[20:40, 60:80] = 1, 12
        save_values(root / "SegmentationClass" / f"{name}.png", classes, palette=True)
        save_values(root / "SegmentationObject" / f"{name}.png", instances, palette=True)
    names = list(VOC_OBJECTS)
    for lists in ("Main", "Segmentation"):
        (root / "ImageSets" / lists).mkdir(parents=True)
        (root / "ImageSets" / lists / "train.txt").write_text("\n".join(names[:4]) + "\n")
        (root / "ImageSets" / lists / "val.txt").write_text(names[4] + "\n")
        (root / "ImageSets" / lists / "trainval.txt").write_text("\n".join(names) + "\n")
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("2007_000001  1\n2007_000002 -1\n")
    return root


# ADE20K


def ade_tree(root: Path, scenes: bool = True) -> Path:
    """Three training images and one of validation; 150 segments named s1 to s150."""
    lines = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{n}\t0.1\t2\t1\t{n % 2}\ts{n}, thing {n}" for n in range(1, 151)),
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:20], values[20:, 40:] = 1, 150
    labels = {}
    for seed, (folder, name, scene) in enumerate(
        [
            ("training", "ADE_train_00000001", "airport"),
            ("training", "ADE_train_00000002", "attic"),
            ("training", "ADE_train_00000003", "airport"),
            ("validation", "ADE_val_00000001", "attic"),
        ]
    ):
        save_image(root / "images" / folder / f"{name}.jpg", seed, quality=90)
        save_values(root / "annotations" / folder / f"{name}.png", values)
        labels[name] = scene
    if scenes:
        (root / "sceneCategories.txt").write_text("".join(f"{name} {scene}\n" for name, scene in labels.items()))
    return root


# iNaturalist


def inaturalist_content(kind: str, numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": [
            {
                "id": number,
                "file_name": f"train_val2018/Aves/{number}/{kind}{number}.png",
                "width": WIDTH,
                "height": HEIGHT,
                "license": 3,
                "rights_holder": "somebody",
            }
            for number in numbers
        ],
        "annotations": [{"id": number, "image_id": number, "category_id": (40, 2)[number % 2]} for number in numbers],
        "categories": [
            {"id": 40, "name": "Turdus merula", "supercategory": "Aves"},
            {"id": 2, "name": "Pica pica", "supercategory": "Aves"},
        ],
    }


def inaturalist_tree(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for kind, numbers in {"train": (1, 2, 3, 4), "val": (5, 6)}.items():
        content = inaturalist_content(kind, numbers)
        (root / f"{kind}2018.json").write_text(json.dumps(content))
        for image in content["images"]:
            save_image(root / image["file_name"], image["id"])
    return root


# CSV


CSV = """file,label,labels,split,camera
a/1.png,cat,cat;indoor,train,x
a/2.png,dog,,train,x
b/3.png,,dog; indoor,train,y
b/4.png,cat,outdoor,val,y
b/5.png,dog,dog,test,y
"""


def csv_tree(root: Path, text: str = CSV) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text(text)
    for seed, name in enumerate(["a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]):
        save_image(root / name, seed)
    return root


# CIFAR and STL-10


def cifar_images(count: int, seed: int) -> np.ndarray:
    """[count, 3, 32, 32]"""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), np.uint8)


def _write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def cifar_tree(root: Path, kind: Any, labels: str, names: str, classes: int) -> dict[str, Any]:
    """Batches of ten images; gives the tables of MD5s that torchvision's class then needs."""
    tables: dict[str, Any] = {}
    for table, seed in {"train_list": 0, "test_list": 90}.items():
        tables[table] = []
        for number, (name, _) in enumerate(getattr(kind, table)):
            images = cifar_images(10, seed + number)
            batch = {"data": images.reshape(10, -1), labels: [place % classes for place in range(10)], "filenames": []}
            tables[table].append([name, _write(root / kind.base_folder / name, pickle.dumps(batch))])
    meta = pickle.dumps({names: [f"class {place}" for place in range(classes)]})
    md5 = _write(root / kind.base_folder / kind.meta["filename"], meta)
    return {**tables, "meta": {**kind.meta, "md5": md5}}


def stl_tree(root: Path, kind: Any) -> dict[str, Any]:
    """Four training images, two for the test and three without a label."""
    parts = {"train": ("train_X.bin", 4), "test": ("test_X.bin", 2), "unlabeled": ("unlabeled_X.bin", 3)}
    md5s: dict[str, str] = {}
    for seed, (name, count) in enumerate(parts.values()):
        images = np.random.default_rng(seed).integers(0, 256, (count, 3, 96, 96), np.uint8)
        md5s[name] = _write(root / kind.base_folder / name, images.tobytes())
    md5s["train_y.bin"] = _write(root / kind.base_folder / "train_y.bin", bytes([1, 2, 10, 1]))
    md5s["test_y.bin"] = _write(root / kind.base_folder / "test_y.bin", bytes([3, 10]))
    _write(root / kind.base_folder / "class_names.txt", "\n".join(f"class {place}" for place in range(10)).encode())
    return {table: [[name, md5s[name]] for name, _ in getattr(kind, table)] for table in ("train_list", "test_list")}
