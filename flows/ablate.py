"""Run an ablation: pretrain and judge all points over the seeds, say what differs. `python -m flows.ablate NAME`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import ablations, figures, rows, strips, workspace
from flows.downstream import check_labels
from flows.points import PIXELS, Laboratory, Measured, each
from flows.progress import Bar
from flows.stage import Stage, artifact_key, begun, command, died, picture_address, published, shown
from flows.workers import JobDiedError, JobFailedError, Watch, Workers, slots
from mim_core.cores import cores
from mim_core.files import read_curve

Point = dict[str, Any]
SCRATCH: Point = {"label": "from scratch", "values": {}, "row": None, "baseline": False, "scratch": True}
SUMMED = ("device_hours", "claims", "detectable")
OF_PRETRAINING = ("parameters", "encoder_parameters", "images_seen", "hidden_share", "avg_distance_px", "hole_psnr")


def checked(name: str) -> Stage:
    """Check all that can be checked before work starts, labels and tokenizers too; raises UserError."""
    stage = Stage("ablate", name, rows.LABORATORY["ablate"])
    where = f"ablations.yaml: {stage.section}.{name}"
    for judge, row in rows.judges("ablate", name).items():
        check_labels(row, rows.needs(judge), stage.pack, f"{where}.judges.{judge}")
    for point in rows.points(name):
        if fitted := rows.fitted(point["row"]):
            published("tokenizer", f"targets/{fitted}", "tokenizer.safetensors", f"fit_target@{fitted}").digest()
    return stage


class Board:
    """What the points of an ablation share: who measures them, and where they are shown."""

    def __init__(self, stage: Stage, laboratory: Laboratory, record: Any, bar: Bar) -> None:
        self.stage, self.laboratory, self.record, self.bar = stage, laboratory, record, bar
        self.judges = rows.judges("ablate", stage.row)

    def folder(self, point: Point, seed: int) -> Path:
        key = workspace.digest([point["row"], point["label"], seed])
        return self.stage.state / f"seed_{seed}-{key[:16]}"


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=died,
    task_run_name="{point[label]}, seed {seed}",
)
def measure(board: Board, point: Point, seed: int) -> Point:
    """Pretrain a point with a seed and judge it; a point that is finished is read."""
    folder = board.folder(point, seed)
    done = folder / "run.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    name = board.stage.row
    curve = board.record.point(
        f"{name}: {point['label']}, seed {seed}",
        folder,
        {**point["values"], "point": point["label"], "seed": seed},
        {**(point["row"] or {"init": "scratch"}), "seed": seed},
        {"ablation": name, "point": point["label"], "baseline": str(point["baseline"]).lower(), "seed": str(seed)},
    )

    def shown(part: str, prefix: str = "") -> Watch:
        add = each(curve.add, prefix) if prefix else curve.add

        def watch(lines: list[dict[str, float]]) -> None:
            board.bar.update(f"{folder.name} {part}", lines)
            add(lines)

        return watch

    try:
        run = _measured(board, point, seed, curve, shown)
    except BaseException as error:
        curve.fail(error)
        raise
    curve.flush()
    final = {f"{judge}.validation_score": score for judge, score in run["scores"].items()}
    numbers = {key: run[key] for key in (*OF_PRETRAINING, "pretrain_seconds", "device_hours") if key in run}
    first = next(iter(run["scores"].values()))
    board.record.metrics(curve.run, {**numbers, **final, "validation_score": first})
    board.record.end(curve.run)
    workspace.write_json(done, run)
    return run


def _measured(board: Board, point: Point, seed: int, curve: Any, shown: Callable[..., Watch]) -> Point:
    """Measure a point with a seed; `shown` gives the watch of a job, by its part and the prefix of its values."""

    def finish(one: Measured, part: str, prefix: str = "") -> None:
        shown(part, prefix)(read_curve(one.folder / "curve.jsonl"))

    begun: Measured | None = None
    if point["row"]:
        begun = board.laboratory.pretrained(point["row"], seed, shown("pretrain"))
        finish(begun, "pretrain")
    judged: dict[str, Measured] = {}
    for judge, row in board.judges.items():
        whole = row if begun else {**row, "init": "scratch", "encoder": _baseline(board)["row"]["encoder"]}
        judged[judge] = board.laboratory.judged(whole, seed, begun, False, shown(judge, f"{judge}."))
        finish(judged[judge], judge, f"{judge}.")
    seconds = (begun.seconds if begun else 0.0) + sum(one.seconds for one in judged.values())
    scores = {judge: float(one.result["validation_score"]) for judge, one in judged.items()}
    return {
        "seed": seed,
        "mlflow_run_id": curve.run,
        "scores": scores,
        "lr": {judge: one.result["lr"] for judge, one in judged.items()},
        "metrics": {judge: one.result["metric"] for judge, one in judged.items()},
        "pretrain_seconds": begun.seconds if begun else 0.0,
        "judge_seconds": {judge: one.seconds for judge, one in judged.items()},
        # A worker has a share of the machine, and device-hours count the whole of it.
        "device_hours": seconds / slots() / 3600,
        "compute": next(iter(judged.values())).result["compute"],
        "picture": str(begun.folder / PIXELS) if begun else None,
        **({key: begun.result[key] for key in OF_PRETRAINING if key in begun.result} if begun else {}),
    }


def _baseline(board: Board) -> Point:
    return next(point for point in rows.points(board.stage.row) if point["baseline"])


@task(cache_policy=NO_CACHE)
def publish(stage: Stage, record: Any, points: Sequence[Point]) -> tuple[Path, ablations.Ablation]:
    """Put results, table and figure where DVC expects them; the manifest comes last."""
    folder = workspace.run_folder("ablate", stage.row)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for point in points for run in point["runs"]]
    given = rows.judges("ablate", stage.row)
    form = next(key for key in ("grid", "zip", "points") if stage.params[key] is not None)
    setting = {path for point in points for path in point["values"]}
    results = {
        "name": stage.row,
        **{key: stage.params[key] for key in ("base", "change", "seeds")},
        "form": form,
        "axes": list(stage.params[form]) if form != "points" else sorted(setting),
        "data": stage.data,
        "judges": {
            judge: {"metric": runs[0]["metrics"][judge], "task": row["task"], "labels": row["labels"]}
            for judge, row in given.items()
        },
        "wall_seconds": time.time() - stage.started,
        "device_hours": sum(run["device_hours"] for run in runs),
        "points": [
            {**point, "runs": [{k: v for k, v in run.items() if k not in _INNER} for run in point["runs"]]}
            for point in points
        ],
    }
    results = record.known(results)
    workspace.write_json(folder / "results.json", results)
    found = ablations.of(results)
    (folder / "table.md").write_text(ablations.markdown(found))
    (folder / "table.csv").write_text(ablations.table_csv(found))
    (folder / "figure.png").write_bytes(figures.ablation(found))
    pictures = {point["label"]: Path(point["runs"][0]["picture"]) for point in points if _drawn(point)}
    (folder / "recoveries.png").write_bytes(strips.recovered(pictures))
    metrics = ablations.summary(found)
    workspace.write_json(folder / "metrics.json", metrics)
    fitted = {rows.fitted(point["row"]) for point in points if point["row"]} - {None}
    workspace.write_manifest(
        folder,
        stage="ablate",
        row=stage.row,
        params={**stage.params, "points": [point["row"] for point in points], "judges": given},
        data=stage.data,
        parents=[f"targets/{name}" for name in sorted(map(str, fitted))],
        started=stage.started,
        device_seconds=results["device_hours"] * 3600,
        images_seen=sum(run.get("images_seen", 0) for run in runs),
        compute=runs[0]["compute"],
        metrics=metrics,
        runs={"mlflow_run_id": record.known(record.parent), "prefect_flow_run_id": str(runtime.flow_run.id)},
    )
    return folder, found


_INNER = frozenset({"picture", "compute", "metrics"})


def _drawn(point: Point) -> bool:
    return bool(point["runs"]) and bool(point["runs"][0]["picture"]) and Path(point["runs"][0]["picture"]).exists()


@task(cache_policy=NO_CACHE)
def show(stage: Stage, record: Any, folder: Path, found: ablations.Ablation, points: Sequence[Point]) -> None:
    """Show the ablation where people look: MLflow's parent run, with the axis as a curve, and Prefect's artifacts."""
    # The table has every point's; of single numbers a page of charts would be full.
    told = ablations.summary(found)
    record.metrics(record.parent, {key: one for key, one in told.items() if key.rpartition(".")[2] in SUMMED})
    for name, values in axis_curves(stage, points).items():
        for step, value in values.items():
            record.metrics(record.parent, {name: value}, step)
    for path in sorted(folder.iterdir()):
        record.file(record.parent, path)
    record.end(record.parent)
    text = f"{ablations.headline(found)}\n\n{(folder / 'table.md').read_text()}"
    with shown():
        create_markdown_artifact(text, key=artifact_key("ablation", stage.row))
        for name in ("figure", "recoveries"):
            picture = picture_address(folder / f"{name}.png")
            create_image_artifact(picture, key=artifact_key(f"ablation-{name}", stage.row), description=stage.row)


def axis_curves(stage: Stage, points: Sequence[Point]) -> dict[str, dict[int, float]]:
    """The mean score over an axis of numbers, with the axis's value as the step, as MLflow's charts draw it.

    Steps are whole numbers: of an axis of shares they are per cent, and the name says so. Empty for other axes.
    """
    at = [point for point in points if point["row"] and point["runs"]]
    values = [next(iter(point["values"].values())) for point in at if len(point["values"]) == 1]
    if len(values) < len(at) or not all(isinstance(one, (int, float)) for one in values):
        return {}
    percent = all(abs(one) <= 1 for one in values) and any(one != int(one) for one in values)
    axis = next(iter(at[0]["values"])) + ("_percent" if percent else "")
    found: dict[str, dict[int, float]] = {}
    first = next(iter(at[0]["runs"][0]["scores"]))
    for point, value in zip(at, values, strict=True):
        for judge in point["runs"][0]["scores"]:
            metric = point["runs"][0]["metrics"][judge]
            name = f"{metric}_by_{axis}" + ("" if judge == first else f" of {judge}")
            mean = sum(run["scores"][judge] for run in point["runs"]) / len(point["runs"])
            found.setdefault(name, {})[round(100 * value if percent else value)] = mean
    return found


@flow(name="ablate", flow_run_name="ablate {name}", task_runner=ThreadPoolTaskRunner(max_workers=slots()))  # type: ignore[arg-type]
def ablate(name: str) -> None:
    """Run one row of params/ablations.yaml; points go on side by side, one a slot of the machine."""
    stage = begun(checked, name)
    with stage.alone():
        _ablate(stage)
        stage.close()


def _ablate(stage: Stage) -> None:
    name, count = stage.row, slots()
    workers = Workers(count, max(1, cores() // count), f"ablate-{name}", stage.spans)
    from flows.tracking import Record  # imported while the workers import torch

    record = Record("ablate", name, stage.state, stage.data, stage.params)
    points = [{**point, "scratch": False, "runs": [], "failed": []} for point in rows.points(name)]
    if stage.params["scratch"]:
        points.append({**SCRATCH, "runs": [], "failed": []})
    seeds, given = stage.params["seeds"], rows.judges("ablate", name)
    jobs = len(seeds) * sum(len(given) + bool(point["row"]) for point in points)
    try:
        with workers, Bar(f"ablate {name}", jobs) as bar:
            board = Board(stage, Laboratory(stage, workers), record, bar)
            # A seed over all points before the next: what is cut off early has every point.
            asked = [(point, seed, measure.submit(board, point, seed)) for seed in seeds for point in points]
            for point, seed, run in asked:
                try:
                    point["runs"].append(run.result())
                except (JobFailedError, JobDiedError) as error:
                    point["failed"].append({"seed": seed, "error": str(error)})
        require_baseline(stage, points)
        folder, found = publish(stage, record, points)
        show(stage, record, folder, found, points)
    except BaseException as error:
        record.fail(error)
        raise


def require_baseline(stage: Stage, points: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where nothing can be compared: the baseline has failed for every seed."""
    base = next(point for point in points if point["baseline"])
    if not base["runs"]:
        raise workspace.UserError(
            f"ablations.yaml: {stage.section}.{stage.row}: the baseline '{base['label']}' failed for every seed: "
            f"{base['failed'][0]['error']}; mend it, and the same command measures what is missing"
        )


if __name__ == "__main__":
    command("ablate", checked, ablate)
