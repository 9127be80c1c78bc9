"""Changes to plain rows, and how they are written in tables.

A change is a path with points, as rows in `params/` are addressed (`mask.ratio`), to a value: a number or a
whole piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Changes = Mapping[str, Any]


def changed(row: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Give a copy of a plain row with the values at some paths replaced; whole pieces before what lies inside them.

    Raises ValueError where a path leads through something that holds no keys.
    """
    copy = dict(row)
    for path, value in sorted(changes.items(), key=lambda item: item[0].count(".")):
        at = copy
        *way, last = path.split(".")
        for index, key in enumerate(way):
            inner = at.get(key)
            inner = {"name": inner} if isinstance(inner, str) else inner
            if not isinstance(inner, Mapping):
                raise ValueError(
                    f"{path}: found {inner!r} at '{'.'.join(way[: index + 1])}', which holds no '{last}'; change the "
                    f"whole of '{way[0]}', or another path"
                )
            at[key] = dict(inner)
            at = at[key]
        at[last] = value
    return copy


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path; None where there is none."""
    at: Any = row
    for key in path.split("."):
        at = at.get(key) if isinstance(at, Mapping) else None
    return at


def words(value: Any) -> str:
    """Say a value in short words: `0.6`, `linear`, `block_wise (ratio 0.4, least 4)`."""
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        try:
            return f"{value:g}"
        except OverflowError:
            return "a number beyond all floats"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} {words(one)}" for key, one in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name} ({inner})" if name and inner else name or inner
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " to ".join(map(words, value))
    return str(value)


def label(changes: Changes) -> str:
    """Name a point by what it sets; where that are several values, each with the end of its path."""
    if len(changes) == 1:
        return words(next(iter(changes.values())))
    return ", ".join(f"{path.rpartition('.')[2]} {words(value)}" for path, value in changes.items())
