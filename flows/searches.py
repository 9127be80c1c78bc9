"""Published searches: what was tried, what came out, and how it is said. From files alone, runs/search/NAME.

Trials are compared on validation images over the same few seeds; the best row and the default row are compared again
with fresh ones, on test images too, which nothing has looked at before.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows import results, rows, workspace
from flows.spaces import words
from mim_core.changes import value_at

if TYPE_CHECKING:
    from mim_core.statistics import Interval

KIND = "search"
STATES = {"complete": "completed", "pruned": "pruned", "stopped": "stopped by the budget", "failed": "failed"}
"""What a trial can have come to, and how it is said."""
ARMS = {"best": "best row found", "default": "default row"}
SCORES = {"validation_score": "validation", "test_score": "test"}
LEADERS = 5
NOTE = (
    "Trials share their seeds and are scored on validation images, a probe on which ends those that lag. The best of "
    "many trials is likely to have been lucky: only the rows that were pretrained again with fresh seeds compare. "
    "Test images were scored once, for these. Intervals: Student's t over seeds, 95 %; differences are paired by seed. "
    "Importance: the share of the scores' variation that a setting accounts for among completed trials."
)


@dataclass(frozen=True)
class Final:
    """A row of the final comparison over its fresh seeds; scores are shares, by seed."""

    validation: Mapping[int, float]
    test: Mapping[int, float]
    device_hours: float


@dataclass(frozen=True)
class Search:
    """A search as it was published. `finals` has `best` and `default`; a gain is the best row's over the default's."""

    name: str
    results: Mapping[str, Any]
    finals: Mapping[str, Final]
    manifest: Mapping[str, Any]
    folder: Path

    @property
    def tried(self) -> list[Mapping[str, Any]]:
        """The search's own trials, in their order."""
        own = [trial for trial in self.results["trials"] if trial["place"] is not None]
        return sorted(own, key=lambda trial: int(trial["place"]))

    @property
    def told(self) -> list[Mapping[str, Any]]:
        """Results of ablations that the sampler knew from the start."""
        return [trial for trial in self.results["trials"] if trial["place"] is None]

    @property
    def metric(self) -> str:
        return str(results.METRICS.get(self.results["metric"], self.results["metric"]))

    @property
    def shared(self) -> str:
        """The seeds that all trials have, in words."""
        return results.of_seeds(self.results.get("trial_seeds", [0]))

    @property
    def found(self) -> bool:
        """Whether the best row is another than the default row."""
        return bool(self.results["best"]["row"] != self.results["default"]["row"])

    def interval(self, arm: str, split: str) -> Interval:
        from mim_core.statistics import interval  # imports scipy

        return interval(list(getattr(self.finals[arm], split).values()))

    def gain(self, split: str) -> Interval:
        from mim_core.statistics import difference

        best, default = (getattr(self.finals[arm], split) for arm in ARMS)
        shared = [seed for seed in best if seed in default]
        return difference([best[seed] for seed in shared], [default[seed] for seed in shared])


def read() -> list[Search]:
    """Read the searches that are published, in the order of params; raises UserError for a broken file."""
    given, found = rows.load(), []
    for name in [name for section in rows.LABORATORY[KIND] for name in given.get(section, {})]:
        folder = workspace.run_folder(KIND, name)
        if (folder / "manifest.json").exists():
            try:
                said, manifest = (json.loads((folder / f"{file}.json").read_text()) for file in ("results", "manifest"))
                found.append(of(said, manifest, folder))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise workspace.UserError(f"{folder}: not a whole result ({error!r}); run `dvc repro` again") from error
    return found


def of(said: Mapping[str, Any], manifest: Mapping[str, Any] | None = None, folder: Path | None = None) -> Search:
    """Make a search of its results.json."""
    finals = {}
    for arm in ARMS:
        runs = {int(seed): run for seed, run in said["finals"][arm].items()}
        validation, test = ({seed: float(run[key]) for seed, run in runs.items()} for key in SCORES)
        finals[arm] = Final(validation, test, sum(run["device_hours"] for run in runs.values()))
    name = str(said["name"])
    return Search(name, said, finals, manifest or {}, folder or workspace.run_folder(KIND, name))


def summary(search: Search) -> dict[str, float]:
    """Give the numbers of metrics.json and of MLflow's parent run; scores are shares."""
    states = Counter(trial["state"] for trial in search.tried)
    found: dict[str, float] = {"trials": len(search.tried), **{f"trials_{state}": states[state] for state in STATES}}
    for split in SCORES.values():
        for arm in ARMS:
            over = search.interval(arm, split)
            found[f"{arm}_{split}_score"] = over.mean
            if over.count > 1:
                found[f"{arm}_{split}_half_width"] = over.half
        gain = search.gain(split)
        found[f"{split}_gain"] = gain.mean
        if gain.count > 1:
            found[f"{split}_gain_half_width"] = gain.half
    scores = [trial["score"] for trial in search.results["trials"] if trial["score"] is not None]
    return {**found, "best_trial_score": max(scores), "device_hours": search.results["spent_device_hours"]}


def counted(search: Search) -> str:
    """Say how many trials came to what."""
    states = Counter(trial["state"] for trial in search.tried)
    parts = ", ".join(f"{states[state]} {said}" for state, said in STATES.items() if states[state])
    told = f"; {len(search.told)} results of ablations known from the start" if search.told else ""
    return f"{len(search.tried)} trials ({parts}){told}"


def cost(search: Search) -> str:
    spent, budget = search.results["spent_device_hours"], search.results["budget_device_hours"]
    return f"{results.hours(spent)} of {results.hours(budget)} device-hours"


def headline(search: Search) -> str:
    """Say what was found, and no more than the fresh seeds support."""
    tried = f"{search.name}: {counted(search)} took {cost(search)}."
    if not search.found:
        return f"{tried} None was better than the default row."
    chosen = ", ".join(f"{path} {words(value)}" for path, value in search.results["best"]["settings"].items())
    parts = []
    for split in ("validation", "test"):
        gain, before, after = search.gain(split), search.interval("default", split), search.interval("best", split)
        change = f"{split} {search.metric} from {100 * before.mean:.1f} to {100 * after.mean:.1f} %"
        parts.append(f"{change}: {results.verdict(gain)}")
    count = len(search.finals["best"].test)
    return f"{tried} Best: {chosen}. With {count} fresh seed{'s' * (count > 1)}, {'; '.join(parts)}."


def terminal(search: Search) -> tuple[list[str], list[list[str]]]:
    """Give header and rows for a terminal: the final comparison."""
    head, *body = _finals(search)
    return head, body


def _finals(search: Search) -> Iterator[list[str]]:
    yield ["row", *(f"{split} {search.metric}, % [95 %]" for split in SCORES.values()), "seeds", "device-hours"]
    for arm, said in ARMS.items():
        final = search.finals[arm]
        number = search.results[arm].get("number")
        name = said if number is None else f"{said} (trial {number})"
        scores = [results.percent(search.interval(arm, split)) for split in SCORES.values()]
        yield [name, *scores, ", ".join(map(str, final.test)), results.hours(final.device_hours)]
    if search.found:
        yield ["difference", *(results.verdict(search.gain(split)) for split in SCORES.values()), "", ""]


def markdown(search: Search) -> str:
    """Give the search's tables as Markdown: what was chosen, the final comparison, and the trials that led."""
    said = search.results
    best, default = said["best"], said["default"]
    chosen = [["setting", "default", "best", "importance"]]
    for path in said["space"]:
        share = said["importances"].get(path)
        before = (default.get("settings") or {}).get(path, value_at(default["row"], path))
        chosen.append([path, _cell(before), _cell(best["settings"][path]), "-" if share is None else f"{share:.0%}"])
    led = sorted((one for one in said["trials"] if one["score"] is not None), key=lambda one: -one["score"])[:LEADERS]
    trials = [["trial", f"validation {search.metric}, % ({search.shared})", *said["space"], "origin"]]
    for one in led:
        settings = [_cell(one["settings"].get(path)) for path in said["space"]]
        trials.append([str(one["number"]), f"{100 * one['score']:.1f}", *settings, one["origin"]])
    judge = next(iter(said["judge"]))
    text = (
        f"**{search.name}**: {counted(search)}, {cost(search)}; judged by {judge}, sampler {said['sampler']['name']}, "
    )
    text += f"pruner {said['pruner']['name']}.\n\n"
    return text + "\n".join(map(_table, (chosen, list(_finals(search)), trials))) + f"\n{NOTE}\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in ruled)


def _cell(value: Any) -> str:
    from flows.family import words as piece

    return "-" if value is None else words(value) if isinstance(value, (int, float, str)) else piece(value)


def trials_csv(search: Search) -> str:
    """Give all trials, a line each; scores are shares, reports are the probe's accuracy after each share of the run."""
    paths = list(search.results["space"])
    evaluations = search.results["pruner"].get("evaluations", 0) if search.results["pruner"]["name"] != "none" else 0
    probes = {str(step): f"probe_{step}_of_{evaluations}" for step in range(1, evaluations + 1)}
    columns = ["number", "place", "state", "score", *paths, *probes.values(), "device_seconds", "origin", "error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for trial in search.results["trials"]:
        reports = {probes[step]: value for step, value in trial["reports"].items() if step in probes}
        writer.writerow({**trial, **trial["settings"], **reports})
    return text.getvalue()


def best_yaml(search: Search) -> str:
    """Give the best row as YAML that can be appended to params/pretrain.yaml, below comments with its evidence."""
    said, name = search.results, f"{search.name}_best"
    lines = [f"Found by the search {search.name}, from {said['base']}: {counted(search)}, {cost(search)}."]
    if search.found:
        count = len(search.finals["best"].test)
        for split in SCORES.values():
            score, gain = search.interval("best", split), search.gain(split)
            lines.append(
                f"{split.capitalize()} {search.metric}, {count} fresh seed{'s' * (count > 1)}: "
                f"{results.percent(score)} %; over the default row {results.verdict(gain)}."
            )
    else:
        lines.append("No trial was better than the default row, which this is.")
    row = {
        key: value for key, value in said["best"]["row"].items() if value is not None and key != "checkpoint_minutes"
    }
    body = [f"{name}:"]
    for key, inner in row.items():
        text = yaml.safe_dump(inner, default_flow_style=True, sort_keys=False, width=4096).strip()
        body.append(f"  {key}: {text.removesuffix('...').strip()}")
    return "".join(f"  # {line}\n" for line in lines) + "".join(f"  {line}\n" for line in body)
