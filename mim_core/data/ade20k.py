"""The form of ADE20K's scene parsing benchmark (Zhou et al. 2017, ADEChallengeData2016)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from mim_core.data.annotations import read_lines
from mim_core.data.fit import Fit
from mim_core.data.images import Channels, RefusedError, read_values
from mim_core.data.pack import Source
from mim_core.data.records import Found, Record
from mim_core.data.splits import Share
from mim_core.spec import Pair

SETS = {"training": "train", "validation": "val"}
NAMES, SCENES = "objectInfo150.txt", "sceneCategories.txt"


def ade20k(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read images/{training,validation} with annotations/{training,validation}/<name>.png, one value a pixel.

    0 is not labelled (255, not judged, here), and 1 to 150 are the segments 0 to 149, named by the column `Name` of
    objectInfo150.txt. sceneCategories.txt, where it is there, gives each image its scene as label. Papers report on
    the validation set, so it is the test split, and `validation` is a share of the training set by a hash of the
    images' bytes, within each scene; `test` is one only where there is no validation set.

    An image is read as it is stored where its mask has that size, and turned as its EXIF says only where the mask has
    the turned size. Its origin is its place among the files of its set. Not used are objectInfo150.txt's columns
    `Ratio`, `Train`, `Val` and `Stuff`, and release_test/. The full ADE20K with its parts is another form.
    Raises ValueError where names are missing or nothing is good.
    """
    found = Found(root, channels)
    segments = _segments(root, found)
    scenes = _scenes(root, found)
    names = sorted(set(scenes.values()))
    missing = dict(scenes)
    for folder, kind in SETS.items():
        at = root / "images" / folder
        if not at.is_dir():
            continue
        records: list[Record] = []
        found.records[kind] = records
        files = sorted(path for path in at.iterdir() if not path.name.startswith("."))
        for place, image in enumerate(files):
            missing.pop(image.stem, None)
            mask = root / "annotations" / folder / f"{image.stem}.png"
            try:
                values = read_values(found.use(mask))
                worst = int(values.max())
                if worst > len(segments):
                    raise RefusedError(f"its mask has the value {worst}; values are 0 to {len(segments)}")
                frame = (values.shape[0], values.shape[1])
                shape = found.shape(image, frame)
            except RefusedError as reason:
                found.refuse(image, reason)
                continue
            label = names.index(scenes[image.stem]) if image.stem in scenes else -1
            semantic = functools.partial(_shifted, mask)
            record = Record(image, shape, frame, label=label, semantic=semantic, origin=(place,))
            records.append(record)
        stems = {path.stem for path in files}
        for mask in sorted((root / "annotations" / folder).glob("*.png")):
            if mask.stem not in stems and not mask.name.startswith("."):
                found.refuse(mask, "there is no image of this name")
    for stem in missing:
        found.refuse(f"{SCENES}: {stem}", "there is no image of this name")
    return found.source(
        names,
        ("labels", "semantic") if names else ("semantic",),
        size=size_px,
        fit=fit,
        validation=validation,
        test=test,
        segments=segments,
    )


def _segments(root: Path, found: Found) -> list[str]:
    """Names of the values 1, 2, ... of the masks."""
    lines = read_lines(found.use(root / NAMES), root)
    columns = [column.strip().lower() for column in lines[0][1].split("\t")] if lines else []
    if not {"idx", "name"} <= set(columns):
        raise ValueError(f"{NAMES} line 1: found {columns}; the columns Idx and Name must be there, with tabs between")
    index, name = columns.index("idx"), columns.index("name")
    segments: list[str] = []
    for number, line in lines[1:]:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(columns) or cells[index] != str(len(segments) + 1) or not cells[name]:
            raise ValueError(
                f"{NAMES} line {number}: found {line!r}; it must have {len(columns)} cells, and Idx {len(segments) + 1}"
            )
        segments.append(cells[name])
    if not 0 < len(segments) < 255:
        raise ValueError(f"{NAMES}: found {len(segments)} names; masks of 8 bits take 1 to 254")
    return segments


def _scenes(root: Path, found: Found) -> dict[str, str]:
    """Scenes by the images' names; empty where the file is not there."""
    path = root / SCENES
    if not path.exists():
        return {}
    scenes: dict[str, str] = {}
    for number, line in read_lines(found.use(path), root):
        cells = line.split()
        if len(cells) != 2:
            found.refuse(f"{SCENES} line {number}", f"found {line!r}; a line is a name and a scene")
        elif scenes.setdefault(*cells) != cells[1]:
            found.refuse(f"{SCENES} line {number}", f"'{cells[0]}' is a {scenes[cells[0]]} on a line above")
    return scenes


def _shifted(path: Path) -> np.ndarray:
    return read_values(path) - np.uint8(1)  # 0 becomes 255
