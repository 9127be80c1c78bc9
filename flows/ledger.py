"""The ledger of cost: what every published run took, summed by stage, with an estimate of its energy.

Energy is not measured. It is device-hours x an assumed power: of a GPU its board's, by name; of a CPU a round figure a
core, by family, times the cores. `UNMASK_WATTS` (watts of one device, all its cores) takes the place of both.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows import workspace

OVERRIDE = "UNMASK_WATTS"
BOARDS = {
    "b200": 1000, "b100": 700, "h200": 700, "h100 pcie": 350, "h100": 700, "a100": 400, "a10g": 150, "a10": 150,
    "a40": 300, "a6000": 300, "l40": 300, "l4": 72, "t4": 70, "v100": 300, "p100": 250, "5090": 575, "4090": 450,
    "3090": 350, "mi300": 750,
}  # fmt: skip
"""Board power of GPUs in watts, as their makers state it, by a part of the name; the first that fits is taken."""
BOARD = 300
"""Watts of a GPU whose name says nothing."""
CORES = {"epyc": 4.0, "xeon": 6.0, "ryzen": 9.0, "core": 9.0, "apple": 4.0, "neoverse": 3.0, "graviton": 3.0}
"""Watts a core of CPUs: package power over cores, rounded, by a part of the name."""
CORE = 6.0
"""Watts a core of a CPU whose name says nothing."""
NOTE = (
    "Energy is an estimate, not a measurement: device-hours x an assumed power, {assumed}. Hosts, cooling and memory "
    "are not in it; UNMASK_WATTS sets the watts of a device. A point that several ablations share counts in each."
)


@dataclass(frozen=True)
class Line:
    """A run's cost. `watts` are of its device, assumed; `kwh` is the estimate that follows from them."""

    stage: str
    row: str
    device: str
    wall_seconds: float
    device_hours: float
    images_seen: int
    watts: float

    @property
    def kwh(self) -> float:
        return self.device_hours * self.watts / 1000


@dataclass(frozen=True)
class Sum:
    """What the runs of a stage, or all of them, took together."""

    stage: str
    runs: int
    wall_seconds: float
    device_hours: float
    images_seen: int
    kwh: float


@dataclass(frozen=True)
class Ledger:
    """All lines in the order of the stages, a sum for each of those, the sum of all, and what energy rests on."""

    lines: Sequence[Line]
    sums: Sequence[Sum]
    total: Sum
    note: str


def ledger(manifests: Iterable[Mapping[str, Any]]) -> Ledger:
    """Put the costs of runs together; raises UserError where UNMASK_WATTS is no number."""
    given = list(manifests)
    threads: dict[str, int] = {}
    for manifest in given:
        compute = manifest.get("compute", {})
        name = str(compute.get("device"))
        # Small runs share a machine with a thread each, so threads say its cores only where nothing else does.
        threads[name] = max(threads.get(name, 1), int(compute.get("cores") or compute.get("threads") or 1))
    lines: list[Line] = []
    assumed: dict[str, None] = {}
    for manifest in given:
        name = str(manifest.get("compute", {}).get("device"))
        watts, why = _watts(manifest.get("compute", {}), threads[name])
        assumed[why] = None
        lines.append(
            Line(
                str(manifest["stage"]), str(manifest["row"]), name, float(manifest["wall_seconds"]),
                float(manifest["device_hours"]), int(manifest.get("images_seen") or 0), watts,
            )
        )  # fmt: skip
    stages = dict.fromkeys(line.stage for line in lines)
    sums = [_sum(stage, [line for line in lines if line.stage == stage]) for stage in stages]
    return Ledger(lines, sums, _sum("all", lines), NOTE.format(assumed="; ".join(assumed) or "of which there is none"))


def _sum(stage: str, lines: Sequence[Line]) -> Sum:
    return Sum(
        stage,
        len(lines),
        sum(line.wall_seconds for line in lines),
        sum(line.device_hours for line in lines),
        sum(line.images_seen for line in lines),
        sum(line.kwh for line in lines),
    )


def _watts(compute: Mapping[str, Any], cores: int) -> tuple[float, str]:
    """The watts of a device, and how they are assumed."""
    name = str(compute.get("device"))
    if OVERRIDE in os.environ:
        said = os.environ[OVERRIDE]
        try:
            watts = float(said)
        except ValueError:
            watts = math.nan
        if not 0 < watts < math.inf:
            raise workspace.UserError(f"{OVERRIDE}: found '{said}'; it must be the watts of a device, such as 350")
        return watts, f"{watts:g} W a device ({OVERRIDE})"
    if compute.get("type") == "cpu":
        each = _named(name, CORES, CORE)
        return each * cores, f"{each:g} W a core x {cores} for {name}"
    watts = _named(name, BOARDS, BOARD)
    return watts, f"{watts:g} W a board for {name}"


def _named(name: str, table: Mapping[str, float], default: float) -> float:
    """The value of the first key that a word of the name begins with."""
    plain = re.sub(r"\W+", " ", re.sub(r"\((r|tm)\)", "", name.lower()))
    for key, value in table.items():
        if f" {key}" in f" {plain}":
            return value
    return default


def as_csv(given: Ledger) -> str:
    """Give the lines as CSV; sums are for the reader to take."""
    text = io.StringIO()
    numbers = ["wall_seconds", "device_hours", "images_seen", "assumed_watts", "estimated_kwh"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stage", "row", "device", *numbers])
    for line in given.lines:
        spent = [round(line.wall_seconds, 1), round(line.device_hours, 6), line.images_seen]
        writer.writerow([line.stage, line.row, line.device, *spent, line.watts, round(line.kwh, 6)])
    return text.getvalue()
