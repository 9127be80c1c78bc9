"""What ties ablations and searches to the rows that they begin from and are judged by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mim_core.changes import changed
from mim_core.params.points import candidates, points
from mim_core.params.relations import fits, judges, needs, size_of, sizes, trained
from mim_core.params.rows import AblationRow, DownstreamRow, PretrainRow, SearchRow
from mim_core.spec import SpecError, check, nearest, shown, shown_key

if TYPE_CHECKING:
    from mim_core.params.load import Params

FIXED = ("data", "init", "seeds", "encoder")
"""What a judge may not be changed in: its point or its ablation says it."""


def laboratory(params: Params, places: Mapping[str, str]) -> list[str]:
    """Check all ablations and searches, whose rows' own faults are told before; `places` says where each section
    stands."""
    faults: list[str] = []
    taken: dict[str, str] = {}
    for section in ("ablations_fitted", "ablations", "search_fitted", "search"):
        for name, row in getattr(params, section, {}).items():
            where = f"{places[section]}.{name}"
            faults += _faults(section, row, params, where)
            kind = section.partition("_")[0]
            if taken.setdefault(f"{kind} {name}", section) != section:
                faults.append(f"{where}: '{taken[f'{kind} {name}']}' has a row of this name too; rename one")
    return faults


def _faults(section: str, row: AblationRow | SearchRow, params: Params, where: str) -> Iterator[str]:
    base = params.pretrained().get(row.base)
    if row.data not in params.data:
        yield f"{where}.data: {shown(row.data)} is not one of {sorted(params.data)}{nearest(row.data, params.data)}"
        return
    if base is None:
        known = params.pretrained()
        yield f"{where}.base: {shown(row.base)} is not one of {sorted(known)}{nearest(row.base, known)}"
        return
    try:
        if isinstance(row, AblationRow):
            rows = [(f"{where}: {shown_key(point.label)}", point.row) for point in points(row, base, where)]
        else:
            rows = list(candidates(row, base, where))
    except SpecError as error:
        yield str(error)
        return
    fitted, kind = any(one.fitted for _, one in rows), section.partition("_")[0]
    if fitted != section.endswith("_fitted"):
        said = "a target that is fitted first" if fitted else "no target that is fitted first"
        yield f"{where}: it has {said}; move it to '{kind}{'_fitted' if fitted else ''}'"
    if isinstance(row, SearchRow):
        for name in row.warm_start:
            if name not in params.ablated():
                ablated = sorted(params.ablated())
                yield f"{where}.warm_start: {shown(name)} is not one of {ablated}{nearest(name, ablated)}"
    size = size_of(params, row.data)
    seen: list[PretrainRow] = []
    for place, one in rows:
        if one in seen:
            continue
        seen.append(one)
        if one.fitted and one.fitted not in params.targets:
            targets = sorted(params.targets)
            yield f"{place}: target.fitted: {shown(one.fitted)} is not one of {targets}{nearest(one.fitted, targets)}"
            continue
        yield from (f"{place}: {fault}" for fault in fits(one, size, params))
    key, given = ("judges", row.judges) if isinstance(row, AblationRow) else ("judge", row.judge)
    for name, changes in given.items():
        yield from _judged(name, changes, seen, params, f"{where}.{key}.{name}", row.data)


def judge(params: Params, name: str, changes: Mapping[str, Any], where: str, data: str) -> DownstreamRow:
    """Give a downstream row on a dataset, with what is changed in it; raises SpecError."""
    row = params.judged()[name]
    fixed = [path for path in changes if path.split(".")[0] in FIXED]
    if fixed:
        raise SpecError(f"{where}.{fixed[0]}: it is given by the points that are judged; delete this key")
    try:
        return check(DownstreamRow, changed(row.model_dump(mode="json"), {**changes, "data": data}), where)
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"{where}.{error}") from None


def derived(params: Params) -> dict[str, Any]:
    """Give what follows from checked rows, as plain values: which annotations each downstream row `needs` one of, the
    `sizes` of each row's files, the `points` of each ablation, and the whole `judges` of each ablation and search.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in params.ablated().items():
        each = points(row, params.pretrained()[row.base], name)
        found[name] = [
            {"label": one.label, "values": dict(one.values), "row": one.row.model_dump(mode="json")}
            | {"baseline": one.baseline}
            for one in each
        ]
    given = {f"ablate {name}": (row.judges, row.data) for name, row in params.ablated().items()}
    given |= {f"search {name}": (row.judge, row.data) for name, row in params.searched().items()}
    whole = {
        key: {name: judge(params, name, one, name, data).model_dump(mode="json") for name, one in judges_of.items()}
        for key, (judges_of, data) in given.items()
    }
    return {"needs": needs(params), "sizes": sizes(params), "points": found, "judges": whole}


def _judged(
    name: str, changes: Mapping[str, Any], rows: list[PretrainRow], params: Params, where: str, data: str
) -> Iterator[str]:
    if name not in params.downstream:
        known = sorted(params.downstream)
        yield f"{where}: {shown(name)} is not one of the rows of 'downstream', {known}{nearest(name, known)}"
        return
    try:
        one = judge(params, name, changes, where, data)
    except SpecError as error:
        yield str(error)
        return
    yield from (f"{where}.{fault}" for fault in trained(one))
    for row in {str(row.encoder): row for row in rows}.values():
        of_point = params.model_copy(update={"pretrain": {**params.pretrain, "point": row}})
        begun = one.model_copy(update={"init": "point"})
        yield from (f"{where}.{fault}" for fault in judges(begun, of_point, size_of(params, data)))
