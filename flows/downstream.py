"""Judge an encoder on a task: choose the learning rate, repeat over seeds, score on test images.

`python -m flows.downstream ROW`, for rows of both `baselines` and `downstream`: every arm has the same grid and effort.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import workspace
from flows.progress import Bar
from flows.stage import Stage, artifact_key, command, died, encoder_of, write_curves
from flows.workers import Workers, cores, slots

Point = dict[str, Any]


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=died,
    task_run_name="lr {lr} seed {seed}",
)
def fine_tune(stage: Stage, workers: Workers, record: Any, bar: Bar, lr: float, seed: int, test: bool) -> Point:
    """Fine-tune with one learning rate and seed; with `test`, score on test images too."""
    folder = stage.state / f"lr_{lr:g}_seed_{seed}"
    job = {
        "kind": stage.params["task"],
        "row": stage.params,
        "pack": str(stage.pack),
        "folder": str(folder),
        "seed": seed,
        "lr": lr,
        "init": str(stage.start.file) if stage.start else None,
        "test": test,
    }
    curve = record.child(f"{stage.row} lr {lr:g} seed {seed}", folder, {**stage.params, "lr": lr, "seed": seed})

    def watch(lines: list[dict[str, float]]) -> None:
        bar.update(folder.name, lines)
        curve.add(lines)

    result = workers.run(job, watch)
    curve.finish(result)
    return {"lr": lr, "seed": seed, **result}


def checked(row: str) -> Stage:
    """Check all that can be checked before work starts, labels and the encoder's file too; raises UserError."""
    stage = Stage("downstream", row, ("baselines", "downstream"), encoder_of)
    meta = json.loads((stage.pack / "meta.json").read_text())
    where = f"downstream.yaml: {stage.row}"
    for split in ("train", "validation", "test"):
        if not meta["labelled"].get(split):
            raise workspace.UserError(
                f"{where}: the dataset '{stage.data['name']}' has no labelled {split} images; classification needs "
                "sub-folders that name the classes, and shares for validation and test in its row of params/data.yaml"
            )
    labels, there = stage.params["labels"], meta["labelled"]["train"]
    if labels and labels > there:
        raise workspace.UserError(f"{where}.labels: found {labels}; the training split has {there} labels; lower it")
    return stage


@task(cache_policy=NO_CACHE)
def publish(stage: Stage, record: Any, grid: Sequence[Point], finals: Sequence[Point]) -> tuple[Path, Point]:
    """Put results where DVC expects them; the manifest comes last."""
    from mim_core.statistics import interval

    best = max(finals, key=lambda point: float(point["validation_accuracy"]))
    job = stage.state / f"lr_{best['lr']:g}_seed_{best['seed']}"
    folder = stage.publish("downstream", job, ("classifier.safetensors",))
    points = {(point["seed"], point["lr"]): point for point in (*grid, *finals)}
    curves = {(seed, lr): stage.state / f"lr_{lr:g}_seed_{seed}" / "curve.jsonl" for seed, lr in points}
    write_curves(folder / "curve.csv", curves, ("seed", "lr"))
    kept = ("seed", "lr", "validation_accuracy", "test_accuracy", "test_cross_entropy", "seconds")
    workspace.write_json(
        folder / "results.json",
        {
            **{key: stage.params[key] for key in ("task", "init", "labels", "data")},
            "lr": best["lr"],
            "grid": [{key: point[key] for key in kept if key in point and "test" not in key} for point in grid],
            "seeds": [{key: point[key] for key in kept if key in point} for point in finals],
        },
    )
    over = interval([point["test_accuracy"] for point in finals])
    metrics = {
        "test_accuracy": over.mean,
        "test_accuracy_half_width": over.half,
        "validation_accuracy": interval([point["validation_accuracy"] for point in finals]).mean,
        "lr": best["lr"],
        "seeds": len(finals),
        "seconds": sum(point["seconds"] for point in points.values()),
        "parameters": best["parameters"],
    }
    if over.count < 2:
        del metrics["test_accuracy_half_width"]
    workspace.write_json(folder / "metrics.json", metrics)
    workspace.write_manifest(
        folder,
        stage="downstream",
        row=stage.row,
        params=stage.params,
        data=stage.data,
        parents=stage.parents,
        started=stage.started,
        # A worker has a share of the machine, and device-hours count the whole of it.
        device_seconds=metrics["seconds"] / slots(),
        images_seen=sum(point["images_seen"] for point in points.values()),
        compute=best["compute"],
        metrics=metrics,
        runs={"mlflow_run_id": record.parent, "prefect_flow_run_id": str(runtime.flow_run.id)},
    )
    return folder, metrics


@task(cache_policy=NO_CACHE)
def show(
    stage: Stage, record: Any, folder: Path, metrics: Point, grid: Sequence[Point], finals: Sequence[Point]
) -> None:
    """Show the run where people look: MLflow's parent run, Prefect's artifacts."""
    record.metrics(record.parent, metrics)
    for name in ("results.json", "manifest.json", "curve.csv"):
        record.file(record.parent, folder / name)
    record.end(record.parent)
    keys = ("lr", "seed", "validation_accuracy", "test_accuracy", "seconds")
    table = [{key: round(point[key], 5) for key in keys if key in point} for point in (*grid[1:], *finals)]
    said = f"{stage.row}: learning rate {metrics['lr']:g} chosen on validation"
    create_table_artifact(table, key=artifact_key("result", stage.row), description=said)


@flow(name="downstream", flow_run_name="downstream {row}", task_runner=ThreadPoolTaskRunner(max_workers=8))  # type: ignore[arg-type]
def downstream(row: str) -> None:
    """Judge one row of params/downstream.yaml."""
    stage = checked(row)
    count = slots()
    workers = Workers(count, max(1, cores() // count), f"downstream-{row}", stage.spans)
    from flows.tracking import Record  # imported while the workers import torch

    record = Record("downstream", row, stage.state, stage.data, stage.params)
    rates, seeds = stage.params["lr_grid"], stage.params["seeds"]
    try:
        with Bar(f"downstream {row}", len(rates) + len(seeds) - 1) as bar:

            def run(points: list[tuple[float, int]], test: bool) -> list[Point]:
                runs = [fine_tune.submit(stage, workers, record, bar, lr, seed, test) for lr, seed in points]
                return [run.result() for run in runs]

            grid = run([(lr, seeds[0]) for lr in rates], test=len(rates) == 1)
            chosen = max(grid, key=lambda point: float(point["validation_accuracy"]))["lr"]
            # The first seed's run at the chosen rate is done: it is only scored.
            finals = run([(chosen, seed) for seed in seeds], test=True)
        folder, metrics = publish(stage, record, grid, finals)
        show(stage, record, folder, metrics, grid, finals)
    except BaseException:
        record.end(record.parent, "FAILED")
        raise
    finally:
        workers.stop()
    stage.close()


if __name__ == "__main__":
    command("downstream", checked, downstream)
