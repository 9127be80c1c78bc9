"""The published results: arms, their statistics over seeds, and their cost, from files alone: no server is asked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import rows, workspace

if TYPE_CHECKING:
    from flows.ablations import Ablation
    from flows.searches import Search
    from mim_core.statistics import Interval

SCRATCH = "scratch"
METRICS = {"miou": "mIoU", "ap": "AP", "voc07_ap": "VOC07 AP", "voc07_map": "VOC07 mAP"}
"""How tables and figures write a metric whose name is not a word."""


@dataclass(frozen=True)
class Tokenizer:
    """A published tokenizer, a row of targets.yaml."""

    row: str
    manifest: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Pretrained:
    """A published pretraining run; `curve` holds the cells that each line has.

    `fitted` names the tokenizer that its target was fitted as, where it was. `tokenizer_device_hours` come on top of
    the run's own (0 without a tokenizer, None where that is not published).
    """

    row: str
    manifest: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]
    folder: Path
    fitted: str | None
    tokenizer_device_hours: float | None

    @property
    def device_hours(self) -> float | None:
        """Device-hours of pretraining, its tokenizer's among them."""
        own: float = self.manifest["device_hours"]
        return None if self.tokenizer_device_hours is None else own + self.tokenizer_device_hours


@dataclass(frozen=True)
class Arm:
    """A published downstream run: one line of the table. Scores are shares; `seeds` maps a seed to its own on test
    images, `validation` to that on validation images, by which rows are chosen.

    `task` is in short words and `protocol` in full; `metric` is what the score is. `device_hours` are the arm's own,
    over its grid and all its seeds; `pretrain_device_hours` are those of what it begins from and come on top (0 from
    scratch, None where that is not published, or others' weights). `baseline` starts the same encoder from scratch, and
    `difference` is to it, paired by seed.
    """

    row: str
    task: str
    protocol: str
    metric: str
    init: str
    data: str
    labels: int | None
    score: Interval
    seeds: Mapping[int, float]
    lr: float | None
    grid: Sequence[Mapping[str, Any]]
    wall_seconds: float
    device_hours: float
    pretrain_device_hours: float | None
    baseline: str | None
    difference: Interval | None
    verdict: str
    encoder: Mapping[str, Any]
    manifest: Mapping[str, Any]
    folder: Path
    validation: Mapping[int, float]

    @property
    def comparison(self) -> tuple[str, str, int | None]:
        """What an arm shares with those it may be compared with: the task with all its params, data, labels."""
        return self.protocol, self.data, self.labels

    @property
    def total_device_hours(self) -> float | None:
        return None if self.pretrain_device_hours is None else self.device_hours + self.pretrain_device_hours


@dataclass(frozen=True)
class Published:
    """All that the rows in `params/` have published, in their order; `absent` names the rest as `<stage> <row>`.

    Ablations and searches are questions that one may ask: those that have not run are not absent.
    """

    rows: rows.Rows
    arms: Sequence[Arm]
    pretrained: Mapping[str, Pretrained]
    tokenizers: Mapping[str, Tokenizer]
    packs: Mapping[str, Mapping[str, Any]]
    absent: Sequence[str]
    ablations: Sequence[Ablation] = ()
    searches: Sequence[Search] = ()


def read() -> Published:
    """Read what is published; raises UserError for bad rows and for a broken file."""
    from flows import ablations, searches  # they build on this module

    given = rows.load()
    packs = {n: _read(meta) for n in given["data"] if (meta := workspace.pack_folder(n) / "meta.json").exists()}
    absent = [f"prepare {name}" for name in given["data"] if name not in packs]
    tokenizers: dict[str, Tokenizer] = {}
    pretrained: dict[str, Pretrained] = {}
    arms: list[Arm] = []
    # Each after what it builds on or is compared with.
    wanted = [("targets", row) for row in given["targets"]] + [("pretrain", row) for row in rows.pretraining(given)]
    wanted += [("downstream", row) for row in _in_turn(given)]
    for kind, row in wanted:
        folder = workspace.run_folder(kind, row)
        if not (folder / "manifest.json").exists():
            absent.append(f"{'fit_target' if kind == 'targets' else kind} {row}")
        elif kind == "targets":
            tokenizers[row] = Tokenizer(row, _read(folder / "manifest.json"), folder)
        elif kind == "pretrain":
            fitted, manifest = rows.fitted(rows.pretraining(given)[row]), _read(folder / "manifest.json")
            extra = 0.0 if not fitted else tokenizers[fitted].manifest["device_hours"] if fitted in tokenizers else None
            curve = _read(folder / "curve.csv", _curve)
            pretrained[row] = Pretrained(row, manifest, curve, folder, fitted, extra)
        else:
            arms.append(_arm(row, folder, given, pretrained, arms))
    return Published(given, arms, pretrained, tokenizers, packs, absent, ablations.read(), searches.read())


def comparisons(arms: Iterable[Arm]) -> list[list[Arm]]:
    """Group arms by task, data and labels, in order of appearance."""
    groups: dict[Any, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.comparison, []).append(arm)
    return list(groups.values())


def measure(arms: Iterable[Arm]) -> str:
    """Name the metric of arms, or say `score` where they have several."""
    found = {METRICS.get(arm.metric, arm.metric) for arm in arms}
    return found.pop() if len(found) == 1 else "score"


def title(arm: Arm) -> str:
    """Name what is compared: task, data, labels and metric."""
    return f"{arm.task}, {arm.data}, {budget(arm.labels)}: {measure([arm])}"


def budget(labels: int | None) -> str:
    """Say how many labels an arm may use."""
    return "all labels" if labels is None else f"{labels:,} labels"


def stale(manifest: Mapping[str, Any]) -> bool:
    """Whether a result was made by other code than the code that lies here."""
    return bool(manifest.get("code") != workspace.code_fingerprint())


def verdict(gain: Interval) -> str:
    """Say a difference of shares in words, and no more than the seeds support."""
    points = f"{100 * gain.mean:+.1f} points"
    if gain.count < 2:
        return f"{points} (one seed: no interval)"
    bounds = f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
    return f"no difference ({points} {bounds})" if gain.low <= 0 <= gain.high else f"{points} {bounds}"


def of_seeds(seeds: Sequence[int]) -> str:
    """Name seeds: `seed 0`, `seeds 0, 1`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def duration(seconds: float) -> str:
    """Say a time as `41 s`, `12 min 05 s` or `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def percent(score: Interval) -> str:
    """Say a mean share in per cent, with its interval where there is one."""
    bounds = f"[{100 * score.low:.1f}, {100 * score.high:.1f}]" if score.count > 1 else "(one seed)"
    return f"{100 * score.mean:.1f} {bounds}"


def cells(arm: Arm) -> dict[str, str]:
    """The table's columns for an arm, as text."""
    return {
        "arm": arm.row + (" (made by other code)" if stale(arm.manifest) else ""),
        "init": arm.init,
        "data": arm.data,
        "labels": "all" if arm.labels is None else f"{arm.labels:,}",
        "task": f"{arm.task}: {measure([arm])}",
        "test score, % [95 %]": percent(arm.score),
        "per seed, %": ", ".join(f"{100 * value:.1f}" for value in arm.seeds.values()),
        "lr": "-" if arm.lr is None else f"{arm.lr:g}",
        "difference to baseline": arm.verdict,
        "wall": duration(arm.wall_seconds),
        "device-hours": hours(arm.device_hours),
        "with pretraining": hours(arm.total_device_hours),
    }


def terminal(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Give header and rows for a terminal: the columns that fit there; device-hours are those with pretraining."""
    keys = ["arm", "labels", "test score, % [95 %]", "lr", "difference to baseline", "with pretraining"]
    heads = {"test score, % [95 %]": f"test {measure(arms)}, % [95 %]", "with pretraining": "device-hours"}
    return [heads.get(key, key) for key in keys], [[cells(arm)[key] for key in keys] for arm in arms]


def markdown(arms: Sequence[Arm]) -> str:
    """All columns as a Markdown table, with what they mean below."""
    if not arms:
        return "No downstream result is published.\n"
    lines = [list(cells(arms[0])), ["---"] * len(cells(arms[0])), *(list(cells(arm).values()) for arm in arms)]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"{table}\nIntervals: Student's t over seeds, 95 %; differences are paired by seed.\n"


def _in_turn(given: rows.Rows) -> list[str]:
    """Give the downstream rows, each after the one that it begins from."""
    order: list[str] = []
    waiting = list(rows.judged(given))
    while waiting:
        ready = [row for row in waiting if given["continued"].get(row, {}).get("init") not in waiting]
        order += ready
        waiting = [row for row in waiting if row not in ready]
    return order


def _arm(row: str, folder: Path, given: rows.Rows, pretrained: Mapping[str, Pretrained], before: Sequence[Arm]) -> Arm:
    from mim_core.statistics import difference, interval  # imports scipy

    manifest, said = _read(folder / "manifest.json"), _read(folder / "results.json")
    try:
        seeds = {int(one["seed"]): float(one["test_score"]) for one in said["seeds"]}
        init, protocol, score = said["init"], json.dumps(said["task"], sort_keys=True), interval(list(seeds.values()))
        # What pretraining and tuning set apart: a row's drop path, what weights began as.
        encoder = {**said["encoder"], "drop_path": None, "init": None}
        key = (protocol, said["data"], said["labels"])
        rivals = [arm for arm in before if arm.init == SCRATCH != init and arm.comparison == key]
        same = [arm for arm in rivals if arm.encoder == encoder]
        # The strongest of several baselines: a claim has to hold against it.
        rival = max(same, key=lambda arm: arm.score.mean, default=None)
        shared = [seed for seed in seeds if rival and seed in rival.seeds]
        gain = difference([seeds[s] for s in shared], [rival.seeds[s] for s in shared]) if rival and shared else None
        words = "baseline" if init == SCRATCH else "no baseline with this encoder" if rivals else "no baseline"
        words = f"no seed in common with {rival.row}" if rival else words
        return Arm(
            row, task_words(said["task"]), protocol, said["metric"], init, key[1], key[2], score, seeds, said["lr"],
            said["grid"], manifest["wall_seconds"], manifest["device_hours"],
            _before(row, init, given, pretrained, before), rival.row if rival else None, gain,
            verdict(gain) if gain else words, encoder, manifest, folder,
            {int(one["seed"]): float(one["validation_score"]) for one in said["seeds"]},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise workspace.UserError(f"{folder}: not a whole result ({error!r}); run `dvc repro` again") from error


def _before(
    row: str, init: str, given: rows.Rows, pretrained: Mapping[str, Pretrained], before: Sequence[Arm]
) -> float | None:
    """Device-hours of what an arm begins from; None where they are not known."""
    if init == SCRATCH:
        return 0.0
    if row in given["continued"]:
        return next((arm.total_device_hours for arm in before if arm.row == init), None)
    return pretrained[init].device_hours if row in given["downstream"] and init in pretrained else None


def task_words(task: Mapping[str, Any]) -> str:
    """Say a task in short words: its name, and those of the pieces that it is made of."""
    inner = [one["name"] for one in task.values() if isinstance(one, Mapping) and "name" in one]
    return f"{task['name']} ({', '.join(inner)})" if inner else str(task["name"])


def _curve(text: str) -> list[dict[str, float]]:
    return [{key: float(cell) for key, cell in line.items() if cell} for line in csv.DictReader(text.splitlines())]


def _read(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    try:
        return parse(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise workspace.UserError(f"{path}: cannot be read ({error}); run `dvc repro` again") from error
