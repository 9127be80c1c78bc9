"""Search a space of rows: `python -m flows.search NAME`, for rows of params/search.yaml.

A trial pretrains a row and judges it on validation images. A probe on its features says while it pretrains whether it
lags behind the others, and the pruner ends it then; losses of reconstruction say nothing here, as those of two targets
do not compare. The best row and the default row are pretrained again with fresh seeds, and these are scored on test
images, once.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import figures_search, rows, searches, warm, workspace
from flows.downstream import check_labels
from flows.points import Laboratory, Measured, each
from flows.spaces import Row, Space, tokenizers
from flows.stage import Stage, artifact_key, begun, command, picture_address, published, shown
from flows.study import COMPLETE, DEFAULT, FAIL, HOUR, PRUNED, Course, Ongoing
from flows.workers import JobDiedError, StoppedError, Watch, Workers, slots
from mim_core.cores import cores
from mim_core.files import read_curve, write_atomically

TRIES = 3
"""How often a job is begun whose process is killed each time."""
Lines = list[dict[str, float]]


@dataclass(frozen=True)
class Bench:
    """What the runs of a search share: who measures, where it is recorded, and `ended`, which gets each trial at its
    end."""

    stage: Stage
    course: Course
    laboratory: Laboratory
    record: Any
    state: Path
    judge: Row
    ended: queue.SimpleQueue[Ongoing] = field(default_factory=queue.SimpleQueue)

    @property
    def probe(self) -> dict[str, int] | None:
        pruner = self.stage.params["pruner"]
        return None if pruner["name"] == "none" else {key: pruner[key] for key in ("labels", "evaluations")}

    def child(
        self, name: str, row: Row, seeds: Sequence[int], settings: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Any:
        """Open the MLflow run of a trial or of a run of the final comparison, told apart by its choices."""
        search, folder = self.stage.row, self.state / name.replace(" ", "_")
        whole, further = {**row, "seed": seeds[0]}, {"search": search, **tags}
        told = {**settings, "seed": ", ".join(map(str, seeds))}
        return self.record.point(f"{search} {name}", folder, told, whole, further)


def checked(name: str) -> Stage:
    """Check all that can be checked before work starts, tokenizers and labels too; raises UserError."""
    stage = Stage("search", name, rows.LABORATORY["search"])
    where = f"search.yaml: {stage.section}.{name}"
    for judge, row in rows.judges("search", name).items():
        check_labels(row, rows.needs(judge), stage.pack, f"{where}.judge.{judge}")
    base = rows.find(stage.rows, rows.PRETRAIN, stage.params["base"])
    for fitted in tokenizers(stage.params, base):
        published("tokenizer", f"targets/{fitted}", "tokenizer.safetensors", f"fit_target@{fitted}").digest()
    pruner, meta = stage.params["pruner"], json.loads((stage.pack / "meta.json").read_text())
    labels = meta["labelled"].get("train", 0) if "labels" in meta["annotations"] else 0
    if pruner["name"] != "none" and labels < pruner["labels"]:
        raise workspace.UserError(
            f"{where}.pruner.labels: found {pruner['labels']}; the dataset '{stage.data['name']}' has {labels} "
            "labelled training images, from which the probe learns; lower it, or give pruner: {name: none}"
        )
    return stage


@task(cache_policy=NO_CACHE, task_run_name="trial {one.place}")
def attempt(bench: Bench, one: Ongoing) -> None:
    """Pretrain and judge a trial, unless it lags behind; one that cannot run, or is killed often, has failed."""
    curve = None
    try:
        row = bench.course.space.row(one.settings)
        tags = {"trial": str(one.trial.number), "origin": one.origin}
        curve = bench.child(f"trial {one.place}", row, bench.stage.params["trial_seeds"], one.settings, tags)
        for turn in range(TRIES):
            try:
                _measure(bench, one, row, curve)
                break
            except JobDiedError:
                if turn + 1 == TRIES:
                    raise
    except StoppedError as error:
        # Everything stops: this trial goes on from its checkpoint when the command is given again.
        if curve:
            curve.fail(error)
        raise
    except (workspace.UserError, JobDiedError, ValueError) as error:
        bench.course.finish(one, FAIL, error=str(error))
        _close(bench, one, curve, "failed", "FAILED")
    finally:
        bench.ended.put(one)


def _measure(bench: Bench, one: Ongoing, row: Row, curve: Any) -> None:
    """Measure a trial and tell the study; raises JobDiedError, JobFailedError, StoppedError.

    It is probed, and may be pruned, while it pretrains with its first seed.
    """
    course, seeds = bench.course, bench.stage.params["trial_seeds"]

    def watching(part: str, prefix: str) -> Watch:
        add = each(curve.add, prefix) if prefix else curve.add
        clock = Clock()

        def watch(lines: Lines) -> bool:
            if lines:
                one.keep(**{f"ran_{part}": True, "mlflow_run_id": bench.record.known(curve.run, seconds=0)})
                one.seconds[part] = clock.read(lines)
                course.follow(one, lines)
                add(lines)
            return course.ends(one)

        return watch

    def note(part: str, done: Measured) -> None:
        # What another run had measured before costs nothing here.
        one.seconds[part] = done.seconds if done.new or one.told.get(f"ran_{part}") else 0.0

    def measured(seed: int) -> tuple[Measured, Measured] | None:
        """Pretrain and judge with one seed; None where the trial ends in between."""
        also = "" if seed == seeds[0] else f"seed_{seed}."
        probe = None if also else bench.probe
        begun = bench.laboratory.pretrained(row, seed, watching(f"{also}pretrain", also), probe)
        note(f"{also}pretrain", begun)
        course.follow(one, read_curve(begun.folder / "curve.jsonl"))
        if course.ends(one):
            return None
        judged = bench.laboratory.judged(bench.judge, seed, begun, False, watching(f"{also}judge", f"{also}judge."))
        note(f"{also}judge", judged)
        return begun, judged

    try:
        done: list[tuple[Measured, Measured]] = []
        for seed in seeds:
            # Once it is to end, nothing more begins.
            if one.pruned or one.stopped or not (pair := measured(seed)):
                break
            done.append(pair)
        if len(done) == len(seeds):
            parts = [part for pair in done for part in pair]
            score = sum(float(judged.result["validation_score"]) for _, judged in done) / len(done)
            cost, images = sum(part.seconds for part in parts), sum(part.result["images_seen"] for part in parts)
            course.finish(one, COMPLETE, score, cost=cost, images_seen=images)
            bench.record.metrics(curve.run, {"score": score, "validation_score": score, "cost_seconds": cost})
            _close(bench, one, curve, "complete")
            return
    except StoppedError:
        if not (one.pruned or one.stopped):
            raise
    if one.pruned:
        bench.laboratory.abandoned(row, seeds[0], bench.probe)
        course.finish(one, PRUNED)
        _close(bench, one, curve, "pruned")
    else:
        one.keep(stopped=True)
        course.finish(one, FAIL, error="stopped: the budget is met")
        _close(bench, one, curve, "stopped", "KILLED")


def _close(bench: Bench, one: Ongoing, curve: Any, state: str, status: str = "FINISHED") -> None:
    """Show what a trial came to: its own MLflow run, the search's history, a line at the terminal."""
    record, course = bench.record, bench.course
    trial = course.trials()[one.trial.number]
    best = course.best() if course.trials(COMPLETE) else None
    if curve:
        curve.flush()
        record.tag(curve.run, "state", state)
        record.end(curve.run, status)
    if state == "complete" and best:
        record.metrics(record.parent, {"score": trial.value, "best_score": best.value}, one.place)
    spent, given = course.spent() / HOUR / course.workers, course.search["budget_device_hours"]
    said = state if trial.value is None or state != "complete" else f"{100 * trial.value:.1f} %"
    if state == "failed":
        said += f" ({str(one.told['error']).splitlines()[0]})"
    leads = (
        f"best {100 * best.value:.1f} % (trial {best.number})" if best and best.value is not None else "none is done"
    )
    print(f"  trial {one.trial.number}: {said}; {leads}; {spent:.3f} of {given:g} device-hours", flush=True)


class Clock:
    """Adds up the seconds of curves that come one after another."""

    def __init__(self) -> None:
        self.before = self.last = 0.0

    def read(self, lines: Lines) -> float:
        for line in lines:
            if line["seconds"] < self.last:
                self.before += self.last
            self.last = line["seconds"]
        return self.before + self.last


@task(cache_policy=NO_CACHE, task_run_name="{label}, seed {seed}")
def compare(bench: Bench, label: str, row: Row, seed: int) -> dict[str, Any]:
    """Pretrain a row of the final comparison with a fresh seed, judge it, and score it on test images."""
    curve = bench.child(f"{label} seed {seed}", row, [seed], {}, {"final": label, "seed": str(seed)})
    for turn in range(TRIES):
        try:
            begun = bench.laboratory.pretrained(row, seed, curve.add)
            judged = bench.laboratory.judged(bench.judge, seed, begun, True, each(curve.add, "judge."))
            break
        except JobDiedError:
            if turn + 1 == TRIES:
                raise
        except StoppedError as error:
            curve.fail(error)
            raise
    seconds = begun.seconds + judged.seconds
    bench.course.note_final(f"{label} {seed}", seconds)
    scores = {key: float(judged.result[key]) for key in searches.SCORES}
    curve.flush()
    bench.record.metrics(curve.run, {**scores, "cost_seconds": seconds})
    bench.record.end(curve.run)
    return {
        **scores,
        "device_hours": seconds / HOUR / bench.course.workers,
        "images_seen": begun.result["images_seen"] + judged.result["images_seen"],
        "metric": judged.result["metric"],
        "compute": judged.result["compute"],
        "mlflow_run_id": curve.run,
    }


@task(cache_policy=NO_CACHE)
def publish(bench: Bench, finals: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any]) -> searches.Search:
    """Put results, tables, figure and the best row where DVC expects them; the manifest comes last."""
    stage, course = bench.stage, bench.course
    folder = workspace.run_folder(searches.KIND, stage.row)
    folder.mkdir(parents=True, exist_ok=True)
    best, space = course.best(), course.space
    (judge,) = stage.params["judge"]
    one = next(iter(finals["best"].values()))
    wall = course.study.user_attrs.get("wall_seconds", 0.0)
    inner = ("images_seen", "metric", "compute")
    keys = (
        "base",
        "change",
        "judge",
        "space",
        "sampler",
        "pruner",
        "seed",
        "trial_seeds",
        "seeds",
        "budget_device_hours",
        "warm_start",
    )
    said = {
        "name": stage.row,
        **{key: stage.params[key] for key in keys},
        "data": stage.data,
        "metric": one["metric"],
        "storage": course.storage,
        "study": course.study.study_name,
        "spent_device_hours": course.spent() / HOUR / course.workers,
        "wall_seconds": wall,
        "trials": course.report(),
        "not_told": told["left"],
        "importances": course.importances(),
        "best": {"number": best.number, "settings": space.tidy(best.params), "row": space.row(best.params)},
        "default": {
            "number": course.default() if course.default() >= 0 else None,
            "settings": space.settings(space.default),
            "row": space.default,
        },
        "finals": {
            arm: {seed: {key: one for key, one in run.items() if key not in inner} for seed, run in runs.items()}
            for arm, runs in finals.items()
        },
    }
    said = bench.record.known(said)
    # Not sorted: settings and rows keep the order of their files, which tables follow.
    write_atomically(folder / "results.json", json.dumps(said, indent=1) + "\n")
    found = searches.of(said, None, folder)
    (folder / "trials.csv").write_text(searches.trials_csv(found))
    (folder / "table.md").write_text(searches.markdown(found))
    (folder / "best.yaml").write_text(searches.best_yaml(found))
    (folder / "figure.png").write_bytes(figures_search.search(found))
    course.draw(folder / "plots")
    metrics = searches.summary(found)
    workspace.write_json(folder / "metrics.json", metrics)
    images = sum(trial.user_attrs.get("images_seen", 0) for trial in course.trials())
    workspace.write_manifest(
        folder,
        stage="search",
        row=stage.row,
        params={**stage.params, "storage": course.storage, "default": space.default, "judges": {judge: bench.judge}},
        data=stage.data,
        parents=[f"targets/{name}" for name in tokenizers(stage.params, space.base)],
        started=stage.started,
        device_seconds=course.spent() / course.workers,
        images_seen=images + sum(run["images_seen"] for runs in finals.values() for run in runs.values()),
        compute=one["compute"],
        metrics=metrics,
        runs={
            "mlflow_run_id": bench.record.known(bench.record.parent),
            "prefect_flow_run_id": str(runtime.flow_run.id),
        },
    )
    return found


@task(cache_policy=NO_CACHE)
def show(bench: Bench, found: searches.Search) -> None:
    """Show the search where people look: MLflow's parent run, Prefect's artifacts."""
    record = bench.record
    record.metrics(record.parent, searches.summary(found))
    for path in sorted(found.folder.iterdir()):
        if path.is_file():
            record.file(record.parent, path)
    record.tag(record.parent, "search", found.name)
    record.end(record.parent)
    header, lines = searches.terminal(found)
    table = [dict(zip(header, line, strict=True)) for line in lines]
    trials = [
        {"trial": one["number"], "state": one["state"], "score": one["score"], **one["settings"]} for one in found.tried
    ]
    picture = picture_address(found.folder / "figure.png")
    with shown():
        key = artifact_key("search", found.name)
        create_table_artifact(table, key=key, description=searches.headline(found))
        key = artifact_key("search-trials", found.name)
        create_table_artifact(trials, key=key, description=f"Trials of {found.name}")
        key = artifact_key("search-figure", found.name)
        create_image_artifact(picture, key=key, description=searches.counted(found))


@flow(name="search", flow_run_name="search {name}", task_runner=ThreadPoolTaskRunner(max_workers=slots()))  # type: ignore[arg-type]
def search(name: str) -> None:
    """Run one row of params/search.yaml; trials go on side by side, one a slot of the machine."""
    stage = begun(checked, name)
    (judge,) = rows.judges("search", name).values()
    key = study_key(stage, judge)
    state = workspace.home() / "optuna" / f"{name}-{key[:12]}"
    with stage.alone(state / "lock"):
        count = slots()
        workers = Workers(count, max(1, cores() // count), f"search-{name}", stage.spans)
        from flows.tracking import Record  # imported while the workers import torch

        base = rows.find(stage.rows, rows.PRETRAIN, stage.params["base"])
        space = Space(stage.params, {**base, "data": stage.params["data"]})
        course = Course(name, stage.params, space, key, state.parent, count)
        record = Record("search", name, state, stage.data, {**stage.params, "storage": course.storage})
        bench = Bench(stage, course, Laboratory(stage, workers), record, state, judge)
        try:
            with workers:
                told, finals = explore(bench)
            show(bench, publish(bench, finals, told))
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            for one in list(course.running.values()):
                course.leave(one)
        stage.close()


def explore(bench: Bench) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    """Run the trials and the final comparison; gives what ablations told, and the comparison's runs by arm and seed."""
    stage, course = bench.stage, bench.course
    given = rows.judges("search", stage.row)
    told = course.tell(
        lambda: warm.known(stage.params["warm_start"], course.space, given, stage.data, stage.params["trial_seeds"])
    )
    if stage.params["warm_start"]:
        print(f"  {len(told['taken'])} results of ablations are known from the start", flush=True)
        print("".join(f"  not taken: {reason}\n" for reason in told["left"]), end="", flush=True)
    before = course.study.user_attrs.get("wall_seconds", 0.0)
    runs: dict[int, Any] = {}
    while True:
        while len(runs) < course.workers and (one := course.next()):
            runs[one.trial.number] = attempt.submit(bench, one)
        if not runs:
            break
        over = bench.ended.get()
        runs.pop(over.trial.number).result()
        course.study.set_user_attr("wall_seconds", before + time.time() - stage.started)
    if not course.trials(COMPLETE):
        raise workspace.UserError(_nothing(course))
    course.close()
    best = course.best()
    arms = {"default": (DEFAULT, course.space.default), "best": (course.label(best), course.space.row(best.params))}
    # The default row is not run twice where it is the best.
    asked = {
        label: {seed: compare.submit(bench, label, row, seed) for seed in stage.params["seeds"]}
        for label, row in dict(arms.values()).items()
    }
    done = {label: {str(seed): run.result() for seed, run in of.items()} for label, of in asked.items()}
    course.study.set_user_attr("wall_seconds", before + time.time() - stage.started)
    return told, {arm: done[label] for arm, (label, _) in arms.items()}


def _nothing(course: Course) -> str:
    reasons = {trial.user_attrs["error"] for trial in course.trials(FAIL) if "error" in trial.user_attrs}
    said = "\n".join(sorted(reasons))
    return f"params/search.yaml: {course.name}: no trial was completed; change its space or raise its budget:\n{said}"


def study_key(stage: Stage, judge: Row) -> str:
    """Name the study by what makes its trials comparable: all of the row but how far it goes, data, code, and the rows
    that it begins from and is judged by."""
    ends = ("trials", "budget_device_hours", "seeds", "storage")
    row = {key: value for key, value in stage.params.items() if key not in ends}
    base = rows.find(stage.rows, rows.PRETRAIN, stage.params["base"])
    return workspace.digest([row, base, judge, stage.data, workspace.code_fingerprint()])


if __name__ == "__main__":
    command("search", checked, search)
