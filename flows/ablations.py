"""Ablations as the papers show them: what was measured, what may be claimed of it, and the table.

Everything is read from `results.json` of the flow that measured the points; no server is asked and nothing is trained.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows import rows, workspace
from flows.results import METRICS, budget, duration, percent, task_words
from mim_core.changes import words

if TYPE_CHECKING:
    from mim_core.statistics import Comparison, Interval

WIDTH = 120
"""Columns of a terminal."""
WHY = 60
"""Characters of an error in a table; below it stands more."""
OF_RUNS = ("parameters", "hidden_share", "avg_distance_px", "hole_psnr")
"""What the CSV has of pretraining, as a mean over seeds."""


@dataclass(frozen=True)
class Line:
    """A point under one judge. Scores are shares on validation images, by seed; `runs` are those of the results file.

    `score` is None where no seed has run. `difference` is to the baseline, paired by seed (None for the baseline, and
    without a seed in common); `compared` is what the table may say of it, None for what it does not compare: the
    baseline, and the encoder from scratch. `cost` is the time of pretraining over the baseline's, `pretrain_seconds`
    its mean over seeds; None from scratch and where nothing has run.
    """

    label: str
    values: Mapping[str, Any]
    baseline: bool
    scratch: bool
    best: bool
    runs: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]
    seeds: Mapping[int, float]
    score: Interval | None
    difference: Interval | None
    compared: Comparison | None
    cost: float | None
    pretrain_seconds: float | None

    @property
    def name(self) -> str:
        return f"{self.label} (baseline)" if self.baseline else self.label


@dataclass(frozen=True)
class Judged:
    """The points of an ablation under one judge: one table. `tested` points are what Holm's procedure counts.

    `detectable` is the smallest true difference, a share, that a point with all `count` seeds would show in four of
    five repetitions; nan where it cannot be said.
    """

    judge: str
    metric: str
    task: Mapping[str, Any]
    labels: int | None
    lines: Sequence[Line]
    tested: int
    count: int
    detectable: float

    @property
    def title(self) -> str:
        return f"{task_words(self.task)}, {budget(self.labels)}: {METRICS.get(self.metric, self.metric)}"

    @property
    def base(self) -> Line:
        return next(line for line in self.lines if line.baseline)


@dataclass(frozen=True)
class Elsewhere:
    """Numbers that others published for the same ablation, in per cent by label, at the scale that is stated."""

    source: str
    scale: str
    numbers: Mapping[str, float]
    remark: str


@dataclass(frozen=True)
class Ablation:
    """An ablation with a table a judge; `change` is what every point differs in from the base row."""

    name: str
    base: str
    change: Mapping[str, Any]
    form: str
    axes: Sequence[str]
    data: Mapping[str, Any]
    seeds: Sequence[int]
    tables: Sequence[Judged]
    published: Sequence[Elsewhere]
    device_hours: float
    wall_seconds: float
    manifest: Mapping[str, Any]
    folder: Path | None


def read() -> list[Ablation]:
    """Read the ablations that are published, in the order of the rows; raises UserError for a broken file."""
    given = rows.load()
    found = []
    for name in (name for section in rows.LABORATORY["ablate"] for name in given[section]):
        folder = workspace.run_folder("ablate", name)
        # The manifest comes last: without it the rest is not whole.
        if (folder / "manifest.json").exists():
            results = _load(folder / "results.json", name)
            found.append(of(results, _load(folder / "manifest.json", name), folder))
    return found


def of(results: Mapping[str, Any], manifest: Mapping[str, Any] | None = None, folder: Path | None = None) -> Ablation:
    """Compare the points of a results file; raises UserError where it is not whole."""
    try:
        if not [point for point in results["points"] if point["baseline"] and point["runs"]]:
            raise ValueError("no baseline with a run")
        name, base, change, form = (results[key] for key in ("name", "base", "change", "form"))
        return Ablation(
            name, base, change, form, results["axes"], results["data"], results["seeds"],
            [_judged(judge, about, results["points"]) for judge, about in results["judges"].items()],
            published().get(name, []),
            float(results["device_hours"]), float(results["wall_seconds"]), manifest or {}, folder,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = results.get("name", "NAME") if isinstance(results, Mapping) else "NAME"
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        where = folder / "results.json" if folder else "results.json"
        said = f"{where}: not a whole ablation ({what}); run `unmask ablate {name}` again"
        raise workspace.UserError(said) from error


@cache
def published() -> dict[str, list[Elsewhere]]:
    """Give others' numbers by ablation; a numeric label is written as ours are."""
    given = yaml.safe_load(resources.files("flows").joinpath("published.yaml").read_text())
    return {
        name: [
            Elsewhere(
                one["source"],
                one["scale"],
                {words(label): float(number) for label, number in one["numbers"].items()},
                one.get("remark", ""),
            )
            for one in entries
        ]
        for name, entries in given.items()
    }


def axis(found: Ablation) -> str | None:
    """Name the only axis, where every point sets it to a number; None for all other ablations."""
    values = [line.values for line in found.tables[0].lines if not line.scratch]
    numeric = all(len(one) == 1 and _number(next(iter(one.values()))) for one in values)
    paths = {path for one in values for path in one}
    return paths.pop() if numeric and len(paths) == 1 else None


def cells(found: Ablation, table: Judged, line: Line) -> dict[str, str]:
    """The columns of a point as text, for Markdown, LaTeX and HTML alike; nothing in it is marked up."""
    compared, gain = line.compared, line.difference
    adjusted = compared.adjusted if compared else math.nan
    failed = f"failed: {_why(line)}" if line.score is None else ""
    lost = f" ({_lost(line)})" if line.failed and line.score else ""
    return {
        _setting(found): line.name,
        f"{_measure(table)}, % [95 %]": (percent(line.score) if line.score else failed) + lost,
        "per seed, %": ", ".join(f"{100 * value:.1f}" for value in line.seeds.values()) or "-",
        "difference, points [95 %]": "baseline" if line.baseline else _gain(gain),
        "Holm p": "-" if math.isnan(adjusted) else _p(adjusted),
        "cost": "-" if line.cost is None else f"{line.cost:.2f}x",
        "pretraining": "-" if line.pretrain_seconds is None else duration(line.pretrain_seconds),
    }


def markdown(found: Ablation) -> str:
    """Give a table a judge, with what it means below, and others' numbers beside ours."""
    parts = []
    for table in found.tables:
        heading = f"**{found.name}, {table.title}** ({found.data['name']}, judged by {table.judge})\n\n"
        lines = [cells(found, table, line) for line in table.lines]
        told = [list(one.values()) for one in lines]
        for line, row in zip(table.lines, told, strict=True):
            if line.best:
                row[:2] = [f"**{cell}**" for cell in row[:2]]
        notes = "".join(f"- {note}\n" for note in meaning(found, table))
        parts.append(f"{heading}{_table(list(lines[0]), told)}\n{notes}")
    return "\n".join(parts) + _beside(found)


def meaning(found: Ablation, table: Judged) -> list[str]:
    """Say what a table's columns are and what it may have missed, a sentence or two an entry."""
    several = f"{table.tested} comparison{'s' * (table.tested != 1)}"
    scratch = any(line.scratch for line in table.lines)
    told = [
        f"Scores are on validation images. Intervals: Student's t over seeds, 95 %; differences to the baseline "
        f"({table.base.label}) are paired by seed, their scatter pooled over the table but where a point scatters more."
    ]
    if table.tested:
        told.append(
            f"Holm p: two-sided t test of the difference, adjusted for the {several} of the table; below 0.05 it is "
            f"claimed as a difference. {_marked(table)}"
        )
    told += [missed(table)]
    told += ["From scratch is a reference: its difference is not among the comparisons."] if scratch else []
    told.append("Cost: device-hours of pretraining over the baseline's, as measured; the judge's are the same for all.")
    told += [f"{line.name}: {_lost(line, 300)}." for line in table.lines if line.failed or line.score is None]
    return told


def missed(table: Judged) -> str:
    """Say which differences the table would miss, so that one without claims can be read."""
    if math.isnan(table.detectable):
        return "With fewer than two seeds in common with the baseline nothing is tested: there is no claim."
    seeds = f"With {table.count} seeds"
    if table.detectable < 1e-9:
        return f"{seeds} whose differences do not vary it cannot be said what would be missed."
    if table.detectable > 1:
        return f"{seeds} that vary so much, any true difference would be missed more than one time in five."
    points = f"{100 * table.detectable:.1f} points"
    return f"{seeds}, true differences below {points} would be missed more than one time in five."


def table_csv(found: Ablation) -> str:
    """Give a line a point and judge in plain numbers (scores are shares, seconds, 0 or 1), `nan` where there is none.

    `error` is the half width of the interval. pandas and pgfplots read it as it is.
    """
    seeds = [int(seed) for seed in found.seeds]
    lines = []
    for table in found.tables:
        for line in table.lines:
            lines.append({
                "ablation": found.name, "judge": table.judge, "metric": table.metric, "setting": line.label,
                **{path: _plain(line.values.get(path)) for path in found.axes},
                "baseline": int(line.baseline), "scratch": int(line.scratch), "best": int(line.best),
                **_bounds("", line.score), **_bounds("difference_", line.difference),
                "p": line.compared.p if line.compared else math.nan,
                "holm_p": line.compared.adjusted if line.compared else math.nan,
                "claimed": int(line.compared.claimed) if line.compared else 0,
                "detectable": line.compared.detectable if line.compared else math.nan,
                "cost": math.nan if line.cost is None else line.cost,
                "pretrain_seconds": math.nan if line.pretrain_seconds is None else line.pretrain_seconds,
                "device_hours": sum(float(run["device_hours"]) for run in line.runs),
                **{key: _mean(line.runs, key) for key in OF_RUNS},
                **{f"seed_{seed}": line.seeds.get(seed, math.nan) for seed in seeds},
                "failed": len(line.failed),
            })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    return text.getvalue()


def terminal(found: Ablation) -> tuple[list[str], list[list[str]]]:
    """Give header and rows that fit a terminal of 120 columns, with two columns between; the best is marked `best`."""
    several = len(found.tables) > 1
    measures = {_measure(table) for table in found.tables}
    measure = measures.pop() if len(measures) == 1 else "validation score"
    head = [_setting(found), f"{measure}, % [95 %]", "difference [95 %]", "Holm p", "cost", "pretraining"]
    lines = []
    for table in found.tables:
        for line in table.lines:
            row = list(cells(found, table, line).values())
            name = row[0] + (", best" if line.best else "")
            score = percent(line.score) if line.score else "failed"
            lost = f" {len(line.failed)} failed" if line.failed and line.score else ""
            lines.append([*([table.judge] if several else []), name, score + lost, *row[3:]])
    head = ["judge", *head] if several else head
    # What is too wide is cut in the names of judges, and then of points.
    for column in range(1 + several):
        widths = [max(map(len, cell)) for cell in zip(head, *lines, strict=True)]
        width = max(widths[column] - max(sum(widths) + 2 * (len(widths) - 1) - WIDTH, 0), 14)
        for row in lines:
            row[column] = _short(row[column], width)
    return head, lines


def latex(found: Ablation) -> str:
    """Give a booktabs table a judge, with the best in bold."""
    parts = []
    for table in found.tables:
        heads = list(cells(found, table, table.lines[0]))
        kept = [column for column, head in enumerate(heads) if head != "per seed, %"]
        body = ""
        for line in table.lines:
            row = [_tex(cell) for cell in cells(found, table, line).values()]
            row[:2] = [f"\\textbf{{{cell}}}" if line.best else cell for cell in row[:2]]
            rule = "\\midrule\n" if line.scratch else ""
            body += rule + " & ".join(row[column] for column in kept) + " \\\\\n"
        head = " & ".join(_tex(heads[column]) for column in kept)
        notes = "".join(f"% {note}\n" for note in meaning(found, table))
        columns = "l" + "r" * (len(kept) - 1)
        parts.append(
            f"{notes}\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n"
            "\\end{tabular}\n"
        )
    return "\n".join(parts)


def headline(found: Ablation) -> str:
    """Say what was found, by the first judge, in a sentence that claims no more than its table does."""
    table = found.tables[0]
    base = f"{table.base.label} ({percent(table.base.score)} %)" if table.base.score else table.base.label
    where = f"{found.name}, {len(found.seeds)} seed{'s' * (len(found.seeds) != 1)} on {found.data['name']}"
    claimed = [line for line in table.lines if line.compared and line.compared.claimed]
    top = next((line for line in table.lines if line.best), None)
    if not table.tested:
        return f"{where}: nothing was compared with {base}. {missed(table)}"
    if top:
        return f"{where}: {top.label} is better than {base} by {_gain(top.difference)} points. {_others(table, top)}"
    if claimed:
        better = [line.label for line in claimed if line.difference and line.difference.mean > 0]
        worse = [line.label for line in claimed if line.label not in better]
        told = [f"{', '.join(names)} {word}" for names, word in ((better, "better"), (worse, "worse")) if names]
        rest = "no other difference can be claimed" if len(claimed) < table.tested else "that is all"
        rest = "none is better" if not better and len(claimed) == table.tested else rest
        return f"{where}: beside {base}, {' and '.join(told)}; {rest}. {missed(table)}"
    return f"{where}: no difference to {base} can be claimed in {table.tested} comparisons. {missed(table)}"


def summary(found: Ablation) -> dict[str, float]:
    """Give the numbers by which ablations are compared with each other (by DVC, by MLflow's parent runs)."""
    numbers = {"device_hours": found.device_hours}
    for table in found.tables:
        for line in table.lines:
            if line.score:
                numbers[f"{table.judge}.{_key(line.label)}.mean"] = line.score.mean
            if line.compared and line.compared.difference.count:
                numbers[f"{table.judge}.{_key(line.label)}.difference"] = line.compared.difference.mean
        claims = sum(bool(line.compared and line.compared.claimed) for line in table.lines)
        numbers[f"{table.judge}.claims"] = float(claims)
        if not math.isnan(table.detectable):
            numbers[f"{table.judge}.detectable"] = table.detectable
    return numbers


def _judged(judge: str, about: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Judged:
    from mim_core.statistics import best, difference, interval, versus  # imports scipy

    scores = [
        {int(run["seed"]): float(run["scores"][judge]) for run in sorted(point["runs"], key=lambda run: run["seed"])}
        for point in points
    ]
    labels = [point["label"] for point in points]
    if len(set(labels)) < len(labels):
        raise ValueError("two points have the same label")
    base = next(index for index, point in enumerate(points) if point["baseline"])
    others = {
        point["label"]: seeds
        for point, seeds in zip(points, scores, strict=True)
        if not point["baseline"] and not point["scratch"]
    }
    compared = versus(scores[base], others)
    means = {
        point["label"]: interval(list(seeds.values())).mean
        for point, seeds in zip(points, scores, strict=True)
        if seeds and not point["scratch"]
    }
    top, spent = best(means, compared), _mean(points[base]["runs"], "pretrain_seconds")
    lines = []
    for point, seeds in zip(points, scores, strict=True):
        shared = [seed for seed in seeds if seed in scores[base]]
        gain = difference([seeds[s] for s in shared], [scores[base][s] for s in shared]) if shared else None
        said = compared.get(point["label"])
        gain = said.difference if said and gain else gain
        seconds = _mean(point["runs"], "pretrain_seconds") if point["runs"] and not point["scratch"] else None
        lines.append(
            Line(
                point["label"], point["values"], bool(point["baseline"]), bool(point["scratch"]),
                point["label"] == top, point["runs"], point["failed"], seeds,
                interval(list(seeds.values())) if seeds else None, None if point["baseline"] else gain,
                said, seconds / spent if seconds is not None and spent > 0 else None, seconds,
            )
        )  # fmt: skip
    # From scratch is last, wherever the file has it.
    lines.sort(key=lambda line: line.scratch)
    tested = [one for one in compared.values() if one.difference.count > 1]
    count = max((one.difference.count for one in tested), default=0)
    least = next((one.detectable for one in tested if one.difference.count == count), math.nan)
    return Judged(judge, about["metric"], about["task"], about["labels"], lines, len(tested), count, least)


def _load(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise workspace.UserError(f"{path}: cannot be read ({error}); run `unmask ablate {name}` again") from error


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    told = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in told)


def _beside(found: Ablation) -> str:
    """Others' numbers beside ours, by label, with the scale of each."""
    if not found.published:
        return ""
    table = found.tables[0]
    ours = {line.label: f"{100 * line.score.mean:.1f}" for line in table.lines if line.score and not line.scratch}
    labels = list(dict.fromkeys([*ours, *(label for one in found.published for label in one.numbers)]))
    if axis(found):
        labels.sort(key=float)
    lines = [
        [label, ours.get(label, "-"), *(f"{one.numbers.get(label, math.nan):g}" for one in found.published)]
        for label in labels
    ]
    head = [_setting(found), f"here, {_measure(table)}, %", *(f"{one.source}, %" for one in found.published)]
    shown = _table(head, [[cell.replace("nan", "-") for cell in line] for line in lines])
    scales = [f"{one.source}: {one.scale}" + (f"; {one.remark}" if one.remark else "") for one in found.published]
    said = "Published numbers, at a scale of their own: compare which setting is better, not how high it is."
    return f"\n{said}\n\n{shown}\n" + "".join(f"- {scale}.\n" for scale in scales)


def _marked(table: Judged) -> str:
    top = next((line for line in table.lines if line.best), None)
    if top:
        return f"Bold: {top.label}, the highest mean, claimed to be better than the baseline."
    highest = max((line for line in table.lines if line.score and not line.scratch), key=_height)
    if highest.baseline:
        return "No point is marked best: the baseline has the highest mean."
    return "No point is marked best: the highest mean is not claimed to be better than the baseline."


def _others(table: Judged, top: Line) -> str:
    claimed = sum(bool(line.compared and line.compared.claimed) for line in table.lines)
    return f"{claimed} of {table.tested} differences to the baseline can be claimed. {missed(table)}"


def _height(line: Line) -> float:
    return line.score.mean if line.score else -math.inf


def _lost(line: Line, length: int = WHY) -> str:
    count = len(line.failed) + len(line.seeds)
    return f"{len(line.failed)} of {count} seeds failed: {_why(line, length)}" if line.failed else "no seed has run"


def _why(line: Line, length: int = WHY) -> str:
    """Say an error in short: its last line, which is where Python says what it was."""
    said = [text.strip() for text in str(line.failed[0]["error"]).splitlines() if text.strip()] if line.failed else []
    return _short(said[-1], length).rstrip(".") if said else "no reason is known" if line.failed else "no seed has run"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def _gain(gain: Interval | None) -> str:
    if gain is None or not gain.count:
        return "-"
    mean, low, high = (round(100 * one, 1) + 0.0 for one in (gain.mean, gain.low, gain.high))  # no -0.0
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]" if gain.count > 1 else f"{mean:+.1f} (one seed)"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _measure(table: Judged) -> str:
    return f"validation {METRICS.get(table.metric, table.metric)}"


def _setting(found: Ablation) -> str:
    """Head the first column: the axis where there is one, as it is written in rows."""
    return found.axes[0] if len(found.axes) == 1 and found.form != "points" else "setting"


def _bounds(prefix: str, found: Interval | None) -> dict[str, Any]:
    if found is None:
        return {f"{prefix}{key}": math.nan for key in ("mean", "error", "low", "high")} | {f"{prefix}seeds": 0}
    named = {"mean": found.mean, "error": found.half, "low": found.low, "high": found.high, "seeds": found.count}
    return {f"{prefix}{key}": value for key, value in named.items()}


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [float(run[key]) for run in runs if run.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A value of an axis as a cell: a number as it is, `nan` where a point has none."""
    return value if _number(value) else "nan" if value is None else words(value)


def _key(label: str) -> str:
    """Write a label with the characters that MLflow takes in the name of a metric."""
    return re.sub(r"[^\w.-]+", "_", label).strip("_")


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text).replace("<", "$<$").replace("\N{HORIZONTAL ELLIPSIS}", "\\ldots{}")
