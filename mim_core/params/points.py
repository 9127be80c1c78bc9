"""Points of an ablation and choices of a search: rows made from a base row by changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mim_core.changes import Changes, changed, label, value_at, words
from mim_core.params.rows import AblationRow, PretrainRow, Scale, SearchRow
from mim_core.spec import SpecError, check, shown_key

MOST = 1000
"""Points of a grid."""
BASE = "as it stands"
"""What a baseline is called where the points of its ablation have names of their own."""


@dataclass(frozen=True)
class Point:
    """A point of an ablation: what it sets, and the whole row that comes of it. `baseline`: that of the base row."""

    label: str
    values: Changes
    row: PretrainRow
    baseline: bool


def settings(ablation: AblationRow) -> dict[str, Changes]:
    """The changes of each point, by label, as the row gives them."""
    if ablation.points is not None:
        return dict(ablation.points)
    axes = ablation.grid if ablation.grid is not None else ablation.zip
    assert axes is not None, "held by the validator"
    if ablation.grid is not None and math.prod(map(len, axes.values())) > MOST:
        raise ValueError(
            f"grid: found {math.prod(map(len, axes.values())):,} points; {MOST:,} at most; give fewer values"
        )
    values = itertools.product(*axes.values()) if ablation.grid is not None else zip(*axes.values(), strict=True)
    each = [dict(zip(axes, one, strict=True)) for one in values]
    found: dict[str, Changes] = {label(one): one for one in each}
    if len(found) < len(each):
        raise ValueError(f"found values written alike: {', '.join(map(label, each))}; delete what stands twice")
    return found


def points(ablation: AblationRow, base: PretrainRow, where: str) -> list[Point]:
    """Give the points of an ablation, the baseline among them: first where the axes do not hold it.

    Raises SpecError with the faults of all of them; `where` is the path that the messages begin with.
    """
    faults: list[str] = []
    base = base.model_copy(update={"data": ablation.data})
    start = _row(base, ablation.change, f"{where}.change", faults)
    found: list[Point] = []
    try:
        given = settings(ablation)
    except ValueError as error:
        raise SpecError(f"{where}: {error}") from None
    for name, changes in given.items():
        row = _row(base, {**ablation.change, **changes}, f"{where}: {shown_key(name)}", faults)
        if row and start:
            found.append(Point(name, changes, row, row == start))
    if faults:
        raise SpecError("\n".join(faults))
    assert start, "it has no fault"
    same = [point for point in found if point.baseline]
    if len(same) > 1:
        raise SpecError(
            f"{where}: {' and '.join(repr(point.label) for point in same)} both come to the base row itself; delete one"
        )
    if same:
        return found
    plain = start.model_dump(mode="json")
    own = {} if ablation.points is not None else {path: value_at(plain, path) for path in axes(ablation)}
    return [Point(label(own) if own else BASE, own, start, True), *found]


def axes(ablation: AblationRow) -> list[str]:
    """The paths that vary over an ablation's points."""
    return list(dict.fromkeys(path for changes in settings(ablation).values() for path in changes))


def choices(search: SearchRow) -> dict[str, dict[str, Changes]]:
    """What a search may choose for each entry of its space: the changes by label; of a number, its two ends."""
    found: dict[str, dict[str, Changes]] = {}
    for path, entry in search.space.items():
        if isinstance(entry, Scale):
            found[path] = {words(value): {path: value} for value in (entry.low, entry.high)}
        elif isinstance(entry, Mapping):
            found[path] = dict(entry)
        else:
            found[path] = {words(value): {path: value} for value in entry}
    return found


def candidates(search: SearchRow, base: PretrainRow, where: str) -> Iterator[tuple[str, PretrainRow]]:
    """Give the base row and rows that each choose one thing, with where they come from, to be checked; raises
    SpecError."""
    faults: list[str] = []
    base = base.model_copy(update={"data": search.data})
    rows = [(f"{where}.change", _row(base, search.change, f"{where}.change", faults))]
    for path, entries in choices(search).items():
        for name, changes in entries.items():
            place = f"{where}.space.{shown_key(path)}: {shown_key(name)}"
            rows.append((place, _row(base, {**search.change, **changes}, place, faults)))
    if faults:
        raise SpecError("\n".join(faults))
    yield from ((place, row) for place, row in rows if row)


def _row(base: PretrainRow, changes: Changes, where: str, faults: list[str]) -> PretrainRow | None:
    fixed = [path for path in changes if path.split(".")[0] in ("data", "seed")]
    if fixed:
        faults.append(f"{where}: found '{fixed[0]}'; all points share them; say it by the keys data and seeds")
        return None
    try:
        return check(PretrainRow, changed(base.model_dump(mode="json"), changes), where)
    except SpecError as error:
        faults.append(str(error))
    except ValueError as error:
        faults.append(f"{where}.{error}")
    return None
