"""Tables of answers on disk, written batch by batch and there whole or not at all.

Parquet and JSON lines have a row an image, nested as the model answers; CSV has one for each object or segment instead,
and of classes the likeliest side by side. A map is a PNG file of one value a pixel: bytes in Parquet, base64 in the
others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from flows import workspace

Row = Mapping[str, Any]
_BOX = [pa.field(side, pa.float32()) for side in ("left", "top", "right", "bottom")]
FIELDS = {
    "file": pa.string(),
    "class": pa.string(),
    "probability": pa.float32(),
    "top": pa.list_(pa.struct([("class", pa.string()), ("probability", pa.float32())])),
    "present": pa.list_(pa.string()),
    "map": pa.binary(),
    "shares": pa.list_(pa.struct([("segment", pa.string()), ("share", pa.float32())])),
    "objects": pa.list_(pa.struct([("class", pa.string()), ("score", pa.float32()), *_BOX])),
}
"""Columns of answers. A column that is not here is a feature vector."""


class Table(Protocol):
    """A table that is being written."""

    def add(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class ParquetTable:
    """Parquet; the columns are the first rows', which are a row group as every call's are."""

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.path, self.about = path, about
        self.writer: Any = None

    def add(self, rows: Sequence[Row]) -> None:
        from mim_core.inference import as_file

        rows = [{**row, "map": as_file(row["map"][None])} if "map" in row else row for row in rows]
        if self.writer is None:
            fields = [pa.field(name, FIELDS.get(name) or _vector(value)) for name, value in rows[0].items()]
            schema = pa.schema(fields, {"unmask": json.dumps(dict(self.about), sort_keys=True)})
            self.writer = pq.ParquetWriter(self.path, schema)
        self.writer.write_table(pa.Table.from_pylist(rows, self.writer.schema))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class CsvTable:
    """CSV of flat rows."""

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer: csv.DictWriter[str] | None = None

    def add(self, rows: Sequence[Row]) -> None:
        flat_rows = [flat for row in rows for flat in flatten(row)]
        if self.writer is None:
            columns = max(map(list, flat_rows), key=len)
            if "objects" in rows[0]:
                columns = ["file", "class", "score", "left", "top", "right", "bottom"]
            self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
            self.writer.writeheader()
        self.writer.writerows(flat_rows)

    def close(self) -> None:
        self.file.close()


class JsonTable:
    """JSON lines, as the served model answers, with the file's name."""

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.file = path.open("w", encoding="utf-8")

    def add(self, rows: Sequence[Row]) -> None:
        from mim_core.inference import plain

        self.file.writelines(json.dumps(plain(dict(row)), ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self.file.close()


def flatten(row: Row) -> Iterator[dict[str, Any]]:
    """Give the rows of a CSV table for an image's answer; one without objects has a row of its file alone."""
    file = {"file": row["file"]}
    if "objects" in row:
        yield from [{**file, **one} for one in row["objects"]] or [file]
    elif "shares" in row:
        yield from ({**file, **one} for one in row["shares"])
    else:
        found = dict(file)
        for rank, one in enumerate(row["top"], 1):
            found |= {f"{key}_{rank}" if rank > 1 else key: value for key, value in one.items()}
        yield found


TABLES: dict[str, Callable[[Path, Mapping[str, str]], Table]] = {
    ".parquet": ParquetTable,
    ".csv": CsvTable,
    ".jsonl": JsonTable,
}


def check_target(path: Path, kinds: Sequence[str], replace: bool) -> None:
    """Raise UserError where a table cannot be written, before there is work done for it."""
    if path.suffix not in kinds:
        raise workspace.UserError(f"{path}: found the ending '{path.suffix}'; it must be one of {list(kinds)}")
    if path.is_dir():
        raise workspace.UserError(f"{path}: this is a folder; give a file to write")
    if path.exists() and not replace:
        raise workspace.UserError(f"{path}: it is there already; give another name, or --replace")


@contextmanager
def writing(path: Path, about: Mapping[str, str]) -> Iterator[Table]:
    """Write a table by the ending of its name; it appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        table = TABLES[path.suffix](part, about)
        try:
            yield table
        finally:
            table.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _vector(value: Any) -> Any:
    return pa.list_(pa.float32(), len(value))
