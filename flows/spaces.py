"""The space of a search: what each trial chooses, and how its choices and whole rows turn into one another.

An axis is a range of numbers at one path, or a choice between labels, each with its changes (one path or several).
Settings map an axis's name to a number or to a label: what the sampler sees, what tables print. Nothing here knows who
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mim_core.changes import Changes, changed, label, value_at

Settings = dict[str, float | int | str]
Row = dict[str, Any]
UNCOMPARED = ("seed", "checkpoint_minutes", "devices")
"""Keys of a pretrain row that say nothing about the method."""


@dataclass(frozen=True)
class Scale:
    """A range of numbers at the path `name`, both ends within; whole numbers where `whole`."""

    name: str
    low: float
    high: float
    step: float | None
    log: bool

    @property
    def whole(self) -> bool:
        return all(isinstance(one, int) for one in (self.low, self.high, self.step) if one is not None)

    def changes(self, value: Any) -> Changes:
        return {self.name: int(value) if self.whole else float(f"{value:.10g}")}

    def find(self, row: Row) -> list[Any]:
        """The values that could have made a row."""
        value = value_at(row, self.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return []
        steps = (value - self.low) / (self.step or (1 if self.whole else 0) or 1)
        if (self.step or self.whole) and abs(steps - round(steps)) > 1e-6:
            return []
        return [int(value) if self.whole else float(value)]


@dataclass(frozen=True)
class Choice:
    """A choice between labels, each with its changes."""

    name: str
    labels: Mapping[str, Changes]

    def changes(self, value: Any) -> Changes:
        return self.labels[value]

    def find(self, row: Row) -> list[Any]:
        """The labels that could have made a row: those that say most of it first."""
        return sorted(self.labels, key=lambda label: -len(self.labels[label]))


Axis = Scale | Choice


class Space:
    """The axes of a search and the row that they begin from (the base row with the search's `change` in it)."""

    def __init__(self, search: Mapping[str, Any], base: Row) -> None:
        """Read a row of params/search.yaml, checked; `base` is the whole base row."""
        self.axes: list[Axis] = []
        for name, entry in search["space"].items():
            if isinstance(entry, list):
                self.axes.append(Choice(name, {label({name: one}): {name: one} for one in entry}))
            elif {"low", "high"} <= entry.keys():
                self.axes.append(Scale(name, entry["low"], entry["high"], entry.get("step"), bool(entry.get("log"))))
            else:
                self.axes.append(Choice(name, dict(entry)))
        self.base = base
        self.change: Changes = search["change"]
        self.default = self._row({})

    def row(self, settings: Mapping[str, Any]) -> Row:
        """Give the whole row of some settings; raises ValueError where it is none."""
        changes: dict[str, Any] = {}
        for axis in self.axes:
            changes |= axis.changes(settings[axis.name])
        return self._row(changes)

    def tidy(self, settings: Mapping[str, Any]) -> Settings:
        """Give settings as they stand in rows: what a sampler makes of steps is 0.6000000000000001 at times."""
        return {
            axis.name: axis.changes(settings[axis.name])[axis.name] if isinstance(axis, Scale) else settings[axis.name]
            for axis in self.axes
            if axis.name in settings
        }

    def settings(self, row: Row) -> Settings | None:
        """Give the settings that make a row; None where none do."""
        for found in self._candidates(row, self.axes):
            try:
                if same(self.row(found), row):
                    return found
            except ValueError:
                continue
        return None

    def _candidates(self, row: Row, axes: list[Axis]) -> Iterator[Settings]:
        if not axes:
            yield {}
            return
        for value in axes[0].find(row):
            # Whether a label's changes are in the row is told by making the row and comparing.
            for rest in self._candidates(row, axes[1:]):
                yield {axes[0].name: value, **rest}

    def _row(self, changes: Changes) -> Row:
        from mim_core.params import PretrainRow  # imports torch
        from mim_core.spec import check

        row = changed(self.base, {**self.change, **changes})
        return dict(check(PretrainRow, row, "row").model_dump(mode="json"))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two whole rows are one method."""
    return _method(one) == _method(other)


def _method(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in UNCOMPARED}


def words(value: Any) -> str:
    """Say a setting: a number short, a label as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tokenizers(search: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """The rows of targets.yaml that some choice of a search's space needs fitted, or its base row does."""
    found = {value_at(changed(base, search["change"]), "target.fitted")}
    for entry in search["space"].values():
        for changes in entry.values() if isinstance(entry, Mapping) and "low" not in entry else ():
            found.add(value_at(changed(base, {**search["change"], **changes}), "target.fitted"))
    for value in search["space"].get("target", ()):
        found.add(value.get("fitted") if isinstance(value, Mapping) else None)
    return sorted(name for name in found if name)
