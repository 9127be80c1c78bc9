"""Specs: a signature is a schema, and every fault has one message that says what to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mim_core.spec import OneOf, Pair, Piece, Range, SpecError, Strict, bind, build, check, nearest


def wash(water: str, *, degrees: Annotated[int, Field(gt=0, le=95)], spin: float = 0.5) -> tuple[Any, ...]:
    return water, degrees, spin


class Dry:
    def __init__(self, air: str, *, mode: Literal["hot", "cold"] = "hot", box: Pair = (2, 3)) -> None:
        self.found = (air, mode, box)


TABLE = {"wash": wash, "dry": Dry}


class Inner(Strict):
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    between: Range = (0.0, 1.0)


class Row(Strict):
    first: Annotated[Piece, OneOf(TABLE, scope=(Literal["all", "some"], "some"))]
    second: Annotated[Piece, OneOf(TABLE)] | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    counts: list[int] = Field(default_factory=list)


def test_a_signature_is_the_schema_and_holds_the_defaults() -> None:
    row = check(Row, {"first": {"name": "wash", "degrees": 40}, "second": "dry"}, "row")
    assert row.model_dump() == {
        "first": {"name": "wash", "degrees": 40, "spin": 0.5, "scope": "some"},
        "second": {"name": "dry", "mode": "hot", "box": (2, 3)},
        "inner": {"share": 0.0, "between": (0.0, 1.0)},
        "maybe": None,
        "counts": [],
    }


def test_build_and_bind_give_wiring_and_params_but_not_what_the_row_keeps() -> None:
    row = check(Row, {"first": {"name": "wash", "degrees": 40, "scope": "all"}, "second": "dry"}, "row")
    assert row.first.params() == {"degrees": 40, "spin": 0.5}
    assert row.first.scope == "all"  # type: ignore[attr-defined]
    assert build(TABLE, row.first, "rain") == bind(TABLE, row.first)("rain") == ("rain", 40, 0.5)
    assert row.second is not None
    assert build(TABLE, row.second, air="wind").found == ("wind", "hot", (2, 3))


def test_a_row_that_was_written_out_reads_back_the_same() -> None:
    row = check(Row, {"first": {"name": "wash", "degrees": 40}, "second": {"name": "dry", "box": 7}}, "row")
    assert check(Row, row.model_dump(mode="json"), "row") == row


@pytest.mark.parametrize(("value", "read"), [(4, (4, 4)), ([3, 5], (3, 5)), ((3, 5), (3, 5))])
def test_a_pair_may_be_one_number(value: Any, read: tuple[int, int]) -> None:
    row = check(Row, {"first": {"name": "dry", "box": value}}, "row")
    assert row.first.params()["box"] == read


@pytest.mark.parametrize(("value", "read"), [(0.5, (0.5, 0.5)), (1, (1.0, 1.0)), ([0, 0.5], (0.0, 0.5))])
def test_a_range_may_be_one_number(value: Any, read: tuple[float, float]) -> None:
    assert check(Inner, {"between": value}, "row").between == read


OF_ROW = "['counts', 'first', 'inner', 'maybe', 'second']"
OF_WASH = "['degrees', 'name', 'scope', 'spin']"
PLAIN = "write it as a plain number with a point, such as 1.0e-04 (YAML reads 1e-4 as text)"
WASH = {"name": "wash", "degrees": 40}
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"fist": "dry"}, f"fist: unknown key; known keys are {OF_ROW}; did you mean 'first'?"),
    ({"first": {**WASH, "sipn": 4}}, f"first.sipn: unknown key; known keys are {OF_WASH}; did you mean 'spin'?"),
    (
        {"second": {"name": "dry", "mod": "hot"}},
        "second.mod: unknown key; known keys are ['box', 'mode', 'name']; did you mean 'mode'?",
    ),
    ({"maybe": {"shore": 0}}, "maybe.shore: unknown key; known keys are ['between', 'share']; did you mean 'share'?"),
    ({"inner": {"zzz": 0.5}}, "inner.zzz: unknown key; known keys are ['between', 'share']"),
    ({"first": {"name": "wash"}}, "first.degrees: missing; this key is required"),
    ({"first": "wahs"}, "first.name: 'wahs' is not one of ['wash', 'dry']; did you mean 'wash'?"),
    ({"first": {"name": "zzz"}}, "first.name: 'zzz' is not one of ['wash', 'dry']"),
    ({"first": {"degrees": 4}}, "first: found {'degrees': 4}; it must be a name, or a mapping with the key 'name'"),
    ({"first": 4}, "first: found 4; it must be a name, or a mapping with the key 'name'"),
    ({"inner": 4}, "inner: found 4; it must map keys to values"),
    ({"inner": {"share": 1.4}}, "inner.share: found 1.4; must be less than 1"),
    ({"inner": {"share": float("inf")}}, "inner.share: found inf; must be a finite number"),
    ({"inner": {"share": "1e-4"}}, f"inner.share: found '1e-4'; must be a valid number; {PLAIN}"),
    ({"counts": [1, "2"]}, "counts.1: found '2'; must be a valid integer; write it without quotes"),
    ({"counts": [1, True]}, "counts.1: found True; must be a valid integer"),
    ({"counts": [1.5]}, "counts.0: found 1.5; must be a valid integer"),
    (
        {"inner": {"between": [0.5, 0.1]}},
        "inner.between: found [0.5, 0.1]; the first number may not exceed the second; swap them",
    ),
    ({"first": {"name": "dry", "mode": "warm"}}, "first.mode: found 'warm'; must be 'hot' or 'cold'"),
    ({"first": {"name": "dry", "box": [2, 0]}}, "first.box.1: found 0; must be greater than 0"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_a_fault_has_exactly_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        check(Row, {"first": WASH, **changes}, "row")
    assert str(error.value) == f"row.{message}"


def test_all_faults_come_at_once() -> None:
    row = {"first": {"name": "wash", "degrees": 99, "spni": 1}, "inner": {"share": "no"}, "thrid": 1}
    with pytest.raises(SpecError) as error:
        check(Row, row, "row")
    wheres = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert sorted(wheres) == ["row.first.degrees", "row.first.spni", "row.inner.share", "row.thrid"]


def test_a_row_does_not_change() -> None:
    row = check(Row, {"first": "dry"}, "row")
    with pytest.raises(ValueError, match="frozen"):
        row.counts = [2]


def test_the_nearest_name_is_told_only_where_one_is_near() -> None:
    assert nearest("ratoi", ["ratio", "unit_px"]) == "; did you mean 'ratio'?"
    assert nearest("zzz", ["ratio", "unit_px"]) == ""
