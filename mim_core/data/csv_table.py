"""A table of images and their labels, as comma-separated values."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from mim_core.data.annotations import read_text
from mim_core.data.fit import Fit
from mim_core.data.images import Channels, RefusedError
from mim_core.data.pack import Source
from mim_core.data.records import Found, Record, named
from mim_core.data.splits import Share
from mim_core.spec import Pair, nearest

SETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Row = tuple[int, dict[str, str]]


def csv_table(
    root: Path,
    *,
    size_px: Pair = (224, 224),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    table: str | None = None,
    validation: Share = 0.1,
    test: Share = 0.1,
) -> Source:
    """Read the images that a CSV lists: `table` in `root`, or its only one. UTF-8, with a line of columns.

    `file` is a path from `root`. `label` is one class, empty where there is none; `labels` are several, separated by
    `;`, empty where they are not judged; one of the two columns is needed, and both may be there. `split`, if there,
    is train, val (also valid, validation) or test. Other columns are not used, nor are images that no row names.
    Splits that the table lacks are shares of its training images by a hash of their bytes; where it has `val` and no
    `test`, `val` is the test split. EXIF rotation is applied. An image's origin is its line in the file.
    Raises ValueError where the table or a column is missing, or nothing in it is good.
    """
    path = _table(root, table)
    found = Found(root, channels)
    good: list[tuple[Row, str, Record]] = []
    listed: dict[Path, int] = {}
    rows = _rows(found.use(path), found)
    found.look(dict.fromkeys((file, None) for file in (_named(root, row) for row in rows) if file))
    for row in rows:
        try:
            image = named(root, row[1]["file"])
        except RefusedError as reason:
            found.refuse(f"{path.name} line {row[0]}", reason)
            continue
        try:
            if image in listed:
                raise RefusedError(f"{path.name} lists it on line {listed[image]} and again on line {row[0]}")
            listed[image] = row[0]
            if ";" in row[1].get("label", ""):
                raise RefusedError(f"its label is '{row[1]['label']}'; several labels belong into a column `labels`")
            kind = SETS.get(row[1]["split"].lower(), "") if "split" in row[1] else "train"
            if not kind:
                raise RefusedError(f"its split is '{row[1]['split']}', which is not one of {list(SETS)}")
            good.append((row, kind, Record(image, found.shape(image), origin=(row[0],))))
        except RefusedError as reason:
            where = f"{path.name} line {row[0]}" if listed[image] != row[0] else image
            found.refuse(where, reason)
    columns = set(good[0][0][1]) if good else set()
    names = {label for row, *_ in good for label in (*_several(row), row[1].get("label"))}
    classes = sorted(name for name in names if name)
    records: dict[str, list[Record]] = {}
    for row, kind, record in good:
        presence = None
        if "labels" in columns:
            several = _several(row)
            presence = np.array([name in several if several else -1 for name in classes], np.int8)
        label = classes.index(row[1]["label"]) if row[1].get("label") else -1
        labelled = Record(record.path, record.shape, label=label, presence=presence, origin=record.origin)
        records.setdefault(kind, []).append(labelled)
    found.records.update(records)
    annotations = [word for column, word in (("label", "labels"), ("labels", "presence")) if column in columns]
    return found.source(classes, annotations, size=size_px, fit=fit, validation=validation, test=test)


def header(path: Path) -> list[str]:
    """The names in a table's first line; empty where that cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [column.strip() for column in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _named(root: Path, row: Row) -> Path | None:
    try:
        return named(root, row[1]["file"])
    except RefusedError:
        return None


def _several(row: Row) -> list[str]:
    return [name.strip() for name in row[1].get("labels", "").split(";") if name.strip()]


def _table(root: Path, table: str | None) -> Path:
    if table is not None:
        try:
            return named(root, table)
        except RefusedError as reason:
            raise ValueError(f"table: {reason}") from None
    tables = sorted(path for path in root.glob("*.csv") if not path.name.startswith("."))
    if len(tables) != 1:
        found = [path.name for path in tables]
        raise ValueError(f"{root}: found the tables {found}; one must be there; name the one to read as `table`")
    return tables[0]


def _rows(path: Path, found: Found) -> list[Row]:
    """The table's rows by column, each with its line; rows of another length are refused."""
    reader = csv.reader(io.StringIO(read_text(path, found.root), newline=""), strict=True)
    rows: list[Row] = []
    try:
        columns = [column.strip() for column in next(reader, [])]
        _check_columns(path.name, columns)
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(columns):
                reason = f"the line has {len(values)} values, and there are {len(columns)} columns"
                found.refuse(f"{path.name} line {reader.line_num}", reason)
                continue
            rows.append((reader.line_num, {name: value.strip() for name, value in zip(columns, values, strict=True)}))
    except csv.Error as error:
        raise ValueError(
            f"{path.name} line {reader.line_num}: {error}; it must be a table of commas; mend it"
        ) from None
    return rows


def _check_columns(name: str, columns: list[str]) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"{name} line 1: found the column {twice[0]} twice; each column has its own name; rename one")
    if "file" not in columns:
        raise ValueError(f"{name} line 1: found {columns}; a column `file` must be there{nearest('file', columns)}")
    if not {"label", "labels"} & set(columns):
        hint = nearest("label", columns)
        raise ValueError(f"{name} line 1: found {columns}; a column `label` or `labels` must be there{hint}")
