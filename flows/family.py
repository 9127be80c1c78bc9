"""The family table: every published method beside the others, with its pieces, accuracy and cost, and scratch below."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows import results, rows
from flows.results import SCRATCH, Arm, Pretrained, Published, budget, comparisons, duration, hours, measure, percent

PIECES = ("mask", "fill", "encoder", "head", "target", "loss")
SHORT: dict[str, tuple[str, ...]] = {
    "mask": ("ratio", "count", "area"),
    "encoder": ("width", "depth", "depths", "base"),
    "target": ("normalise", "fitted"),
    "loss": ("scope",),
}
"""Params that a piece's short words show; the rest is in the table of methods."""
UNSAID = (None, "none", "hidden")
UNIT = "simmim_vit"
"""The row whose pretraining is the unit of cost, where it is published."""
NOTE = (
    "Hidden: the mean share of patches under the row's masks. AvgDist: the mean distance of a hidden pixel to the "
    "nearest visible one (SimMIM, section 4.1.2). Parameters: the encoder's, and those of all that pretraining trains "
    "but a critic. Device-hours and relative cost are of pretraining, tokenizer included; wall time is without it. "
    "PSNR: over hidden pixels of validation images; targets of other kinds do not compare, and targets that are no "
    "pictures have none. Accuracies: mean over seeds with Student's t interval, then the difference to the same "
    "encoder from scratch, paired by seed."
)


@dataclass(frozen=True)
class Line:
    """A line of the table: a pretraining run, or an encoder from scratch (`run` is None).

    `pieces` holds short words; `arms` those that judge it, a list for each of the table's comparisons; `cost` its
    device-hours of pretraining in units of the reference's.
    """

    row: str
    run: Pretrained | None
    pieces: Mapping[str, str]
    arms: Sequence[Sequence[Arm]]
    cost: float | None


@dataclass(frozen=True)
class Family:
    """The table: its lines, the head of each column of accuracies, and the row that is the unit of cost."""

    lines: Sequence[Line]
    comparisons: Sequence[str]
    unit: str | None


def family(published: Published) -> Family:
    """Put the published runs side by side."""
    groups = comparisons(published.arms)
    plain = len({arm.comparison[:2] for arm in published.arms}) == 1
    heads = [
        f"test {measure(group)}, % [95 %], {'' if plain else f'{group[0].task} {group[0].data}, '}"
        f"{budget(group[0].labels)}"
        for group in groups
    ]
    costs = {row: run.device_hours for row, run in published.pretrained.items() if run.device_hours}
    unit = UNIT if UNIT in costs else min(costs, key=lambda row: costs[row], default=None)
    lines = []
    for row, run in published.pretrained.items():
        arms = [[arm for arm in group if arm.init == row] for group in groups]
        cost = costs[row] / costs[unit] if unit and row in costs else None
        lines.append(Line(row, run, short(method(row, published)), arms, cost))
    return Family([*lines, *_scratch(published, groups)], heads, unit)


def _scratch(published: Published, groups: Sequence[Sequence[Arm]]) -> list[Line]:
    """A line an encoder that was trained from scratch, whatever the number of rows that did it."""
    encoders: list[tuple[Mapping[str, Any], list[Arm]]] = []
    for arm in published.arms:
        if arm.init == SCRATCH:
            piece = arm.encoder
            same = next((arms for known, arms in encoders if known == piece), None)
            if same is None:
                encoders.append((piece, same := []))
            same.append(arm)
    return [
        Line(", ".join(arm.row for arm in own), None, short({"encoder": piece}), _by(groups, own), None)
        for piece, own in encoders
    ]


def _by(groups: Sequence[Sequence[Arm]], own: Sequence[Arm]) -> list[list[Arm]]:
    names = {arm.row for arm in own}
    return [[arm for arm in group if arm.row in names] for group in groups]


def method(row: str, published: Published) -> Mapping[str, Any]:
    """A pretrain row's params as it ran, or as it would run where it is not published."""
    run = published.pretrained.get(row)
    if run and all(piece in run.manifest["params"] for piece in PIECES):
        params: Mapping[str, Any] = run.manifest["params"]
        return params
    return dict(rows.pretraining(published.rows)[row])


def short(params: Mapping[str, Any]) -> dict[str, str]:
    """Say each of the six pieces that is there in short words: `random (0.6)`."""
    said = {}
    for piece in PIECES:
        found = params.get(piece)
        if found is None:
            continue
        given = found if isinstance(found, Mapping) else {"name": found}
        shown = [_word(given[key]) for key in SHORT.get(piece, ()) if given.get(key) not in UNSAID]
        said[piece] = f"{given['name']} ({', '.join(shown)})" if shown else str(given["name"])
    if params.get("adversarial"):
        said["loss"] += " + adversarial"
    return said


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def tell(arms: Sequence[Arm]) -> list[str]:
    """Say what each arm of a cell reached, with its difference; named where there are several."""
    said = []
    for arm in arms:
        name = f"{arm.row}: " if len(arms) > 1 else ""
        said.append(f"{name}{percent(arm.score)}{'' if arm.init == SCRATCH else f'; {arm.verdict}'}")
    return said


def metric(line: Line, key: str) -> float | None:
    """A metric of the line's pretraining run; None where there is none."""
    found = line.run.manifest["metrics"].get(key) if line.run else None
    return found if isinstance(found, (int, float)) else None


def millions(parameters: float | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.3g} M"


def cells(table: Family, line: Line) -> dict[str, str]:
    """The table's columns for a line, as text."""
    run = line.run

    def told(key: str, form: str, scale: float = 1.0) -> str:
        value = metric(line, key)
        return "-" if value is None else format(scale * value, form)

    words = " x ".join(line.pieces.values()) if run else f"from scratch: {line.pieces['encoder']}"
    return {
        "row": line.row + (" (made by other code)" if run and results.stale(run.manifest) else ""),
        "mask x fill x encoder x head x target x loss": words,
        "hidden, %": told("hidden_share", ".0f", 100),
        "AvgDist, px": told("avg_distance_px", ".2f"),
        "parameters, encoder / all": f"{millions(metric(line, 'encoder_parameters'))} / "
        f"{millions(metric(line, 'parameters'))}"
        if run
        else "-",
        "wall time": duration(run.manifest["wall_seconds"]) if run else "-",
        "device-hours": spent(run) if run else "-",
        "PSNR, dB": told("hole_psnr", ".1f"),
        f"cost relative to {table.unit or 'the cheapest'}": "-" if line.cost is None else f"{line.cost:.2f}",
    } | {head: "<br>".join(tell(arms)) or "-" for head, arms in zip(table.comparisons, line.arms, strict=True)}


def spent(run: Pretrained) -> str:
    """Say a run's device-hours, and what of them its tokenizer took."""
    if not run.fitted:
        return hours(run.device_hours)
    return f"{hours(run.device_hours)}, of which the tokenizer {run.fitted} {hours(run.tokenizer_device_hours)}"


def markdown(table: Family) -> str:
    """Give the table as Markdown, to be pasted into a paper's or a project's page."""
    if not table.lines:
        return "Nothing is published.\n"
    told = [cells(table, line) for line in table.lines]
    lines = [list(told[0]), ["---"] * len(told[0]), *(list(one.values()) for one in told)]
    return (
        "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines) + f"\n{NOTE}\n"
    )


def as_csv(table: Family) -> str:
    """Give the numbers, a line an arm (and a line for a run that nothing has judged yet); shares are in 0 to 1."""
    keys = ("hidden_share", "avg_distance_px", "encoder_parameters", "parameters", "hole_psnr")
    lines: list[dict[str, Any]] = []
    for line in table.lines:
        head: dict[str, Any] = {"row": line.row, **{piece: line.pieces.get(piece) for piece in PIECES}}
        head |= {key: metric(line, key) for key in keys}
        if line.run:
            head |= {
                "wall_seconds": line.run.manifest["wall_seconds"],
                "device_hours": line.run.device_hours,
                "tokenizer_device_hours": line.run.tokenizer_device_hours,
                "relative_cost": line.cost,
            }
        for arm in [arm for arms in line.arms for arm in arms]:
            gain = arm.difference
            lines.append(
                head
                | {"arm": arm.row, "task": arm.task, "data": arm.data, "labels": arm.labels}
                | {
                    "seeds": arm.score.count,
                    "metric": arm.metric,
                    "test_score": arm.score.mean,
                    "half_width": _known(arm.score.half),
                }
                | {"baseline": arm.baseline, "difference": gain and gain.mean}
                | {"difference_half_width": gain and _known(gain.half)}
            )
        if not any(line.arms):
            lines.append(head)
    columns = dict.fromkeys(key for one in lines for key in one)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _known(value: float) -> float | None:
    return value if value == value else None  # no interval from one seed


def words(value: Any) -> str:
    """A param in words: `name (key value, ...)` for a piece, plain text for the rest."""
    if isinstance(value, Mapping):
        kept = {key: one for key, one in sorted(value.items()) if key != "name" and one is not None}
        inner = ", ".join(f"{key} {words(one)}" for key, one in kept.items())
        return f"{value['name']} ({inner})" if "name" in value and inner else str(value.get("name", inner))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(words, value))}]"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
