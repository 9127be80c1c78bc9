"""The form of iNaturalist 2018 and its successors (Van Horn et al. 2018): species of photographs, as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mim_core.data.annotations import Entry, by_number, entry, read_json
from mim_core.data.coco import Category, Id
from mim_core.data.fit import Fit
from mim_core.data.images import Channels, RefusedError
from mim_core.data.pack import Source
from mim_core.data.records import Found, Record, named
from mim_core.data.splits import Share
from mim_core.spec import Pair


class Image(Entry):
    id: Id
    file_name: Annotated[str, Field(min_length=1)]


class Label(Entry):
    id: Id
    image_id: Id
    category_id: Id


def inaturalist(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read `train<year>.json` and `val<year>.json` in `root`, and the images where they say, from `root` on.

    Papers report on val, so it is the test split, and `validation` is a share of the training set by a hash of the
    images' bytes, within each class; `test` is one only where there is no val file. An image has one label.
    EXIF rotation is applied. An image's origin is its id. Not used are `info`, `licenses`, an image's `width`,
    `height`, `license`, `rights_holder`, `date`, `latitude`, `longitude` and `location_uncertainty`, a category's
    `supercategory`, `common_name`, `image_dir_name` and ranks such as `kingdom`; and the test files, without labels.
    Raises ValueError where a file is missing or no such JSON, or categories are broken or differ between the sets.
    """
    found = Found(root, channels)
    known: dict[int, str] = {}
    for kind in ("train", "val"):
        path = annotation_file(root, kind)
        if path is None:
            continue
        content = read_json(found.use(path), root, "images", "annotations", "categories")
        names = by_number(content["categories"], Category, path.name)
        if known and names != known:
            raise ValueError(f"{path.name}: categories differ from train's; both need the same ids and names")
        known = names
        numbers = {number: place for place, number in enumerate(sorted(known))}
        found.records[kind] = _records(content, numbers, path.name, found)
    if not known:
        raise ValueError(f"{root}: found no train<year>.json; the labels are there; check the path")
    return found.source(
        [known[number] for number in sorted(known)],
        ("labels",),
        size=size_px,
        fit=fit,
        validation=validation,
        test=test,
    )


def annotation_file(root: Path, kind: str) -> Path | None:
    """The one file of a set, such as train2018.json; ValueError where there are several."""
    files = [
        path for path in sorted(root.glob(f"{kind}*.json")) if not path.stem.removeprefix(kind).strip("0123456789")
    ]
    if len(files) > 1:
        raise ValueError(f"{root}: found {[path.name for path in files]}; a dataset has one of them; take others out")
    return files[0] if files else None


def _records(content: dict[str, list[Any]], numbers: dict[int, int], where: str, found: Found) -> list[Record]:
    labels: dict[int, list[Label | RefusedError]] = {}
    numbers_given = [image.get("id") for image in content["images"] if isinstance(image, dict)]
    ids = Counter(number for number in numbers_given if type(number) is int)
    seen: set[int] = set()
    for index, value in enumerate(content["annotations"]):
        owner = value.get("image_id") if isinstance(value, dict) else None
        if type(owner) is not int or owner not in ids:
            found.refuse(
                f"{where}: annotations[{index}]", f"it is of the image {owner!r}, which the file does not list"
            )
            continue
        try:
            label: Label | RefusedError = entry(Label, value)
            if isinstance(label, Label) and label.category_id not in numbers:
                raise RefusedError(f"category_id: found {label.category_id}, which is not among the categories")
            if isinstance(label, Label) and label.id in seen:
                raise RefusedError(f"the id {label.id} is that of another annotation too")
        except RefusedError as reason:
            label = RefusedError(f"{where}: annotations[{index}]: {reason}")
        else:
            seen.add(value["id"])
        labels.setdefault(owner, []).append(label)
    records: list[Record] = []
    files: dict[Path, int] = {}
    found.look(dict.fromkeys((file, None) for value in content["images"] if (file := _file(found.root, value))))
    for index, value in enumerate(content["images"]):
        place: Path | str = f"{where}: images[{index}]"
        try:
            image = entry(Image, value)
            if ids[image.id] > 1:
                raise RefusedError(f"the id {image.id} is that of {ids[image.id]} images; each needs its own")
            file = named(found.root, image.file_name)
            if files.setdefault(file, index) != index:
                raise RefusedError(f"'{image.file_name}' is listed as images[{files[file]}] too")
            place = file
            mine = labels.get(image.id, [])
            for label in mine:
                if isinstance(label, RefusedError):
                    raise label
            if len(mine) != 1:
                raise RefusedError(f"it has {len(mine)} annotations; an image has one")
            shape = found.shape(file)
        except RefusedError as reason:
            found.refuse(place, reason)
            continue
        only = mine[0]
        assert isinstance(only, Label)
        records.append(Record(file, shape, label=numbers[only.category_id], origin=(image.id,)))
    return records


def _file(root: Path, value: Any) -> Path | None:
    try:
        return named(root, entry(Image, value).file_name)
    except RefusedError:
        return None
