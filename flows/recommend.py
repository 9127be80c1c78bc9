"""A recommended row for a dataset, with the evidence for it, ready to run at full size.

Rows are chosen on validation images, and only by differences that the statistics claim. The cheapest row is what is
recommended unless another is shown to be better, which then is asked the same of what costs more: so no row stands here
for a difference that chance may have made. Where a search or an ablation began from the chosen row and claims a gain,
its pieces are taken over: of a search all at once, as they were tried; of ablations those of the one with the largest
gain, as several were never tried together.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows import family, recipes, results, rows, workspace
from flows.results import SCRATCH, Arm, Published, comparisons, percent, verdict
from mim_core.changes import changed, words

if TYPE_CHECKING:
    from mim_core.statistics import Interval

TRANSFERRED = ("mask", "fill", "head", "target", "loss", "adversarial")
"""Pieces whose change holds at another size; what is found of `optim` is of the run's own length and batch."""
KEYS = ("data", *family.PIECES, "adversarial", "augment", "optim")
TASKS = ("classify", "segment", "detect")
"""Tasks by which encoders are chosen, the preferred first: those that tune the encoder, which the methods are for."""
NOTHING = "Nothing is recommended yet: no row of pretraining has been judged. Run `dvc repro`, or `unmask ablate NAME`."


@dataclass(frozen=True)
class Recommendation:
    """What is recommended for a dataset: a row by name, and why.

    `start` is the small row that it comes from, `values` what ablations or searches change in it; `recipe` is the
    paper's row that gives the size, None where none fits. `evidence` are sentences; `unknown` say what was not tried.
    """

    data: str
    name: str
    section: str
    row: Mapping[str, Any]
    start: str
    values: Mapping[str, Any]
    recipe: str | None
    evidence: Sequence[str]
    unknown: Sequence[str]

    @property
    def text(self) -> str:
        """The row as YAML, below comments."""
        return _text(self)


@dataclass(frozen=True)
class Candidate:
    """A pretrain row that an arm judges; scores are on validation images, by seed."""

    row: str
    arm: Arm
    scores: Mapping[int, float]
    scratch: Arm | None
    cost: float

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


def recommend(published: Published) -> list[Recommendation]:
    """Recommend a row for each dataset that has results; raises UserError where recipes.yaml is broken."""
    given, found = rows.pretraining(published.rows), []
    checks: Checks | None = None
    for data in published.rows["data"]:
        chosen = _of_family(data, published) or _of_laboratory(data, published)
        if chosen:
            start, evidence = chosen
            values, more = _changes(start, data, published)
            checks = checks or Checks()  # imports torch
            found.append(_at_full_size(data, start, values, given[start], [*evidence, *more], checks))
    return found


def as_yaml(found: Sequence[Recommendation]) -> str:
    """Give what is recommended as rows to append to params/pretrain.yaml, below comments with the evidence."""
    return "\n".join(one.text for one in found) or f"# {NOTHING}\n"


def _of_family(data: str, published: Published) -> tuple[str, list[str]] | None:
    """Choose among the family's rows by the arms that judge them; None where none has been judged."""
    groups = [
        (group, candidates)
        for group in comparisons(arm for arm in published.arms if arm.data == data)
        if (candidates := _candidates(group, published)) and json.loads(group[0].protocol)["name"] in TASKS
    ]
    if not groups:
        return None
    # By the comparison with most rows; of equals by the preferred task.
    group, candidates = max(groups, key=lambda one: (len(one[1]), -TASKS.index(json.loads(one[0][0].protocol)["name"])))
    return _climb(candidates, group)


def _candidates(group: Sequence[Arm], published: Published) -> list[Candidate]:
    """The rows that arms of one comparison judge, the cheapest first."""
    found = []
    for arm in group:
        cost = arm.pretrain_device_hours
        if arm.init in published.pretrained:
            scratch = next((one for one in group if one.row == arm.baseline), None)
            found.append(Candidate(arm.init, arm, arm.validation, scratch, math.inf if cost is None else cost))
    return sorted(found, key=lambda one: one.cost)


def _climb(candidates: Sequence[Candidate], group: Sequence[Arm]) -> tuple[str, list[str]]:
    """Begin with the cheapest row that is shown to gain by pretraining, and go up where more is shown to pay."""
    from mim_core.statistics import versus

    where = f"{results.title(group[0])}, on validation images"
    gaining = []
    for scratch in {one.scratch.row: one.scratch for one in candidates if one.scratch}.values():
        own = {one.row: one for one in candidates if one.scratch and one.scratch.row == scratch.row}
        shown = versus(scratch.validation, {row: one.scores for row, one in own.items()})
        gaining += [own[row] for row, found in shown.items() if found.claimed and found.difference.mean > 0]
    left = sorted(gaining, key=lambda one: one.cost) or list(candidates)
    chosen, told = left[0], []
    said = f"{where}: {chosen.row} {_score(chosen.scores)}"
    if gaining:
        gain = _paired(chosen.scores, chosen.scratch.validation) if chosen.scratch else None
        told.append(f"{said}, over its encoder from scratch {verdict(gain)}." if gain else f"{said}.")
    else:
        told.append(
            f"No row was shown to be better than its encoder from scratch ({where}; {len(candidates)} "
            f"row{'s' * (len(candidates) != 1)}): {chosen.row} is the cheapest, and pretraining may not pay here."
        )
    rest = left[1:]
    while rest:
        shown = versus(chosen.scores, {one.row: one.scores for one in rest})
        better = [one for one in rest if shown[one.row].claimed and shown[one.row].difference.mean > 0]
        if not better:
            break
        step, found = better[0], shown[better[0].row]
        told.append(
            f"{step.row} {_score(step.scores)} is better than {chosen.row}, which costs less: "
            f"{verdict(found.difference)}, Holm p {found.adjusted:.3f} in {len(shown)} comparisons."
        )
        chosen, rest = step, [one for one in left if one.cost > step.cost]
    if rest:
        count = min(len(chosen.scores), *(len(one.scores) for one in rest))
        told.append(
            f"No difference was shown between {chosen.row} and what costs more ({_listed([one.row for one in rest])}) "
            f"with {count} seed{'s' * (count != 1)}: the cheapest of these is taken."
        )
    others = [one.row for one in candidates if one not in left]
    if gaining and others:
        told.append(f"Not shown to be better than their encoder from scratch: {_listed(others)}.")
    ahead = [arm for arm in group if arm.init == SCRATCH and _mean(arm.validation) > chosen.mean]
    if ahead:
        best = max(ahead, key=lambda arm: _mean(arm.validation))
        told.append(
            f"Careful: {best.row}, which is not pretrained, has {_score(best.validation)} there: at the size that was "
            "tried it may be the better choice."
        )
    told.append(f"On test images, as a report only: {chosen.arm.row} {percent(chosen.arm.score)} %.")
    return chosen.row, told


def _of_laboratory(data: str, published: Published) -> tuple[str, list[str]] | None:
    """Without judged rows: the row that a search or an ablation began from, searches first."""
    began = [(one.results["data"]["name"], one.results["base"], one.name) for one in published.searches]
    began += [(one.data["name"], one.base, one.name) for one in published.ablations]
    for name, base, study in began:
        if name == data and base in rows.pretraining(published.rows):
            return str(base), [f"No row of pretraining has been judged beside others; {study} began from {base}."]
    return None


def _changes(start: str, data: str, published: Published) -> tuple[dict[str, Any], list[str]]:
    """What a search, else one ablation, claims to be better than the row `start`; and sentences on all of them."""
    from mim_core.statistics import versus

    told: list[str] = []
    values: dict[str, Any] = {}
    for search in published.searches:
        said = search.results
        if said["data"]["name"] != data or not search.found:
            continue
        gain, seeds = search.gain("validation"), len(search.finals["best"].validation)
        best = {key: said["best"]["row"].get(key) for key in TRANSFERRED}
        own = {key: one for key, one in best.items() if one != said["default"]["row"].get(key)}
        scores = {arm: final.validation for arm, final in search.finals.items()}
        found = versus(scores["default"], {"best": scores["best"]})["best"]
        why = "" if found.claimed and gain.mean > 0 else "no gain was shown"
        why = why or _elsewhere(said["base"], said["change"], start)
        why = why or ("" if own else "it differs in nothing that holds at another size")
        why = why or ("another search's row was" if values else "")
        values = values or ({} if why else own)
        told.append(
            f"The search {search.name} ({seeds} fresh seeds): its best row over its default row {verdict(gain)} on "
            f"validation images; on test images, as a report only, {verdict(search.gain('test'))}. "
            f"{f'Not taken over, as {why}' if why else 'Its pieces are taken over'}."
        )
    tops = []
    for ablation in published.ablations:
        table = ablation.tables[0]
        top = next((line for line in table.lines if line.best), None)
        if ablation.data["name"] == data and top and top.difference:
            tops.append((top.difference, ablation, top))
        elif ablation.data["name"] == data and ablation.base == start:
            told.append(f"The ablation {ablation.name}: no setting was shown to be better than {table.base.label}.")
    for gain, ablation, top in sorted(tops, key=lambda one: -one[0].mean):
        own = {path: one for path, one in top.values.items() if path.split(".")[0] in TRANSFERRED}
        why = _elsewhere(ablation.base, ablation.change, start)
        why = why or ("" if own else "it is of the run's own length or batch")
        why = why or ("it was not tried together with what is" if values else "")
        values = values or ({} if why else own)
        told.append(
            f"The ablation {ablation.name}: {top.label} over {ablation.tables[0].base.label} {verdict(gain)} on "
            f"validation images with {gain.count} seeds, claimed after Holm's correction. "
            f"{f'Not taken over, as {why}' if why else 'It is taken over'}."
        )
    return values, told


def _elsewhere(base: str, change: Mapping[str, Any], start: str) -> str:
    """Say why a comparison is not one with the row `start`; empty where it is."""
    if base != start:
        return f"it began from {base}"
    other = [path for path in change if path.split(".")[0] in (*TRANSFERRED, "encoder")]
    return f"all its points differ from {start} in {_listed(other)}" if other else ""


def _at_full_size(
    data: str, start: str, values: Mapping[str, Any], small: Mapping[str, Any], evidence: Sequence[str], checks: Checks
) -> Recommendation:
    """Put the pieces of a small row onto the paper's recipe that fits it, in a form that the checks of rows pass."""
    winner = changed(small, values)
    papers = recipes.pretraining()
    encoder = _piece(winner["encoder"])["name"]
    alike = [name for name in papers if _piece(papers[name]["encoder"])["name"] == encoder]
    alike.sort(key=lambda name: -_likeness(winner, papers[name]))
    row, recipe, unknown = winner, None, []
    for name in alike:
        whole = next((one for one in _grown(winner, papers[name], values) if not checks.faults(one, data)), None)
        if whole:
            row, recipe = whole, name
            break
    else:
        unknown.append(
            f"No paper's recipe with an encoder {encoder} fits images of {data}: the row has the size that was tried."
        )
    row = {key: row[key] for key in KEYS if row.get(key) is not None} | {"data": data}
    unknown += list(_untried(row, winner, start, recipe, values))
    section = "pretrain_fitted" if rows.fitted(row) else "pretrain"
    return Recommendation(data, f"{data}_recommended", section, row, start, values, recipe, evidence, unknown)


def _likeness(row: Mapping[str, Any], paper: Mapping[str, Any]) -> int:
    """How many of a row's pieces a recipe has."""
    same = sum(int(_piece(row[key])["name"] == _piece(paper[key])["name"]) for key in family.PIECES)
    return same + int(bool(row.get("adversarial")) == bool(paper.get("adversarial")))


def _grown(winner: Mapping[str, Any], paper: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the row at a recipe's size: its encoder, decoder and training, with the patches that the images took.

    Then the same with as many stages as were tried, where images are too small for all of the recipe's.
    """
    own, large = _piece(winner["encoder"]), _piece(paper["encoder"])
    encoder = {**large, **{key: own[key] for key in ("patch_px", "window") if key in own and key in large}}
    head = winner["head"]
    if _piece(head)["name"] == _piece(paper["head"])["name"] and not any(
        path.split(".")[0] == "head" for path in values
    ):
        head = paper["head"]
    stages = {key: large[key][: len(own[key])] for key in ("depths", "heads") if isinstance(large.get(key), list)}
    stages |= {"layers": own["layers"]} if "layers" in large else {}
    for changes in ({}, stages) if stages else ({},):
        yield {**winner, "encoder": {**encoder, **changes}, "head": head, "optim": paper["optim"]}


class Checks:
    """The checks of rows, with everything that params/ holds read once."""

    def __init__(self) -> None:
        from mim_core import params, spec

        try:
            self.params = params.load(workspace.params_folder())
        except spec.SpecError as error:
            raise workspace.UserError(str(error)) from None

    def faults(self, row: Mapping[str, Any], data: str) -> list[str]:
        """Give the faults of a pretrain row, of its own and with the dataset's images."""
        from mim_core.params import PretrainRow
        from mim_core.params.relations import fits, size_of
        from mim_core.spec import SpecError, check

        try:
            one = check(PretrainRow, dict(row), "row")
        except SpecError as error:
            return str(error).splitlines()
        return fits(one, size_of(self.params, data), self.params)


def _untried(
    row: Mapping[str, Any], winner: Mapping[str, Any], start: str, recipe: str | None, values: Mapping[str, Any]
) -> Iterator[str]:
    """Say what is known of the row at its size and what is not."""
    small, large = (family.short({"encoder": one["encoder"]})["encoder"] for one in (winner, row))
    if recipe:
        yield (
            f"Tried on these images: {start}'s encoder {small}, {_length(winner['optim'])}. Not tried: the encoder "
            f"{large} and the length, batch and rate of {recipe} ({_length(row['optim'])}). Patches, mask, target and "
            "crops are those that were tried."
        )
    if values:
        yield "The changes were measured at the shorter budget of their ablation or search."
    if fitted := rows.fitted(row):
        yield f"The tokenizer is the one that was tried, {fitted} of params/targets.yaml; a larger one was not."


def _length(optim: Mapping[str, Any]) -> str:
    rate = optim.get("base_lr") or optim.get("lr")
    of = f" for {optim['base_batch']:,} images" if optim.get("base_lr") and optim.get("base_batch") else ""
    return f"{optim['epochs']:g} epochs, batch {optim['batch']:,}, lr {rate:g}{of}"


def _text(one: Recommendation) -> str:
    """A recommendation as a row below comments."""
    changes = f" with {_listed([f'{path} {words(value)}' for path, value in one.values.items()])}" if one.values else ""
    size = f", at the size of the recipe {one.recipe}" if one.recipe else ""
    said = [f"Recommended for {one.data}: {one.start}{changes}{size}.", *one.evidence, *one.unknown]
    if one.section == "pretrain_fitted":
        said.append("It belongs below `pretrain_fitted:` in params/pretrain.yaml.")
    else:
        said.append("It belongs below `pretrain:` in params/pretrain.yaml; then `dvc repro pretrain@" + one.name + "`.")
    # A label may hold line breaks, and no line of a comment may be one of the file.
    lines = [line for text in said for line in textwrap.wrap(" ".join(text.split()), 114)]
    return "".join(f"  # {line}\n" for line in lines) + recipes.indented(recipes.as_yaml({one.name: one.row}))


def _piece(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"name": value}


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    from mim_core.statistics import difference

    shared = [seed for seed in one if seed in other]
    return difference([one[seed] for seed in shared], [other[seed] for seed in shared]) if shared else None


def _score(scores: Mapping[int, float]) -> str:
    from mim_core.statistics import interval

    count = len(scores)
    return f"{percent(interval(list(scores.values())))} % ({count} seed{'s' * (count != 1)})"


def _mean(scores: Mapping[int, float]) -> float:
    return sum(scores.values()) / len(scores) if scores else -math.inf


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
