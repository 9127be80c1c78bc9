"""Judge an encoder on a task: choose the learning rate, repeat over seeds, score on test images.

`python -m flows.downstream ROW`, for rows of every section of params/downstream.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import rows, workspace
from flows.progress import Bar
from flows.stage import Stage, artifact_key, begun, command, died, encoder_of, picture_address, shown, write_curves
from flows.workers import Workers, slots
from mim_core.cores import cores

Point = dict[str, Any]
WEIGHTS, PICTURE = "model.safetensors", "predictions.png"


@task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=died,
    task_run_name="lr {lr} seed {seed}",
)
def learn(stage: Stage, workers: Workers, record: Any, bar: Bar, lr: float, seed: int, test: bool) -> Point:
    """Train with one learning rate and seed; with `test`, score on test images too."""
    folder = stage.state / f"lr_{lr:g}_seed_{seed}"
    begun_from = str(stage.start.file) if stage.start else None
    job = {
        "kind": "downstream",
        "row": stage.params,
        "pack": str(stage.pack),
        "folder": str(folder),
        "seed": seed,
        "lr": lr,
        "init": stage.params["init"] if stage.params["init"].startswith("timm:") else begun_from,
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
    """Check all that can be checked before work starts, annotations and the file of weights too; raises UserError."""
    stage = Stage("downstream", row, tuple(rows.JUDGED), encoder_of)
    check_labels(stage.params, rows.needs(row), stage.pack, f"downstream.yaml: {stage.section}.{row}")
    return stage


def check_labels(row: Point, needs: Sequence[str], pack: Path, where: str) -> None:
    """Check that a pack has the annotations and labels that a downstream row needs; raises UserError."""
    meta = json.loads((pack / "meta.json").read_text())
    name, dataset = row["task"]["name"], row["data"]
    if not set(needs) & set(meta["annotations"]):
        raise workspace.UserError(
            f"{where}.data: the dataset '{dataset}' is annotated with {meta['annotations'] or 'nothing'}; the task "
            f"'{name}' needs {' or '.join(needs)}; choose another dataset, or a source that reads them"
        )
    there = meta["labelled"] if {"labels"} <= set(needs) & set(meta["annotations"]) else meta["counts"]
    for split in ("train", "validation", "test"):
        if not there.get(split):
            raise workspace.UserError(
                f"{where}: the dataset '{dataset}' has no labelled {split} images; '{name}' needs them; give its row "
                "of params/data.yaml shares for validation and test (a folder has labels where it has sub-folders)"
            )
    labels = row["labels"]
    if labels and labels > there["train"]:
        raise workspace.UserError(
            f"{where}.labels: found {labels}; the training split has {there['train']} labels; lower it"
        )


@task(cache_policy=NO_CACHE)
def publish(
    stage: Stage, record: Any, grid: Sequence[Point], finals: Sequence[Point], best: Point
) -> tuple[Path, Point]:
    """Put results where DVC expects them, with the model of the `best` of finals; the manifest comes last."""
    from mim_core.statistics import interval

    job = stage.state / f"lr_{best['lr']:g}_seed_{best['seed']}"
    folder = stage.publish("downstream", job, (WEIGHTS, PICTURE))
    points = {(point["seed"], point["lr"]): point for point in (*grid, *finals)}
    curves = {(seed, lr): stage.state / f"lr_{lr:g}_seed_{seed}" / "curve.jsonl" for seed, lr in points}
    write_curves(folder / "curve.csv", curves, ("seed", "lr"))

    def kept(point: Point, *begins: str) -> Point:
        return {key: one for key, one in point.items() if key in ("seed", "lr", "seconds") or key.startswith(begins)}

    workspace.write_json(
        folder / "results.json",
        {
            **{key: stage.params[key] for key in ("task", "init", "labels", "data")},
            "metric": best["metric"],
            "encoder": best["encoder"],
            "lr": best["lr"] or None,
            "grid": [kept(point, "validation_") for point in grid if point["lr"]],
            "seeds": [kept(point, "validation_", "test_") for point in finals],
        },
    )
    over = interval([point["test_score"] for point in finals])
    numbers = [key for key, one in best.items() if key.startswith(("validation_", "test_")) and isinstance(one, float)]
    metrics = {
        **{key: interval([point[key] for point in finals]).mean for key in numbers},
        "test_score_half_width": over.half,
        **({"lr": best["lr"]} if best["lr"] else {}),
        "seeds": len(finals),
        "seconds": sum(point["seconds"] for point in points.values()),
        "parameters": best["parameters"],
    }
    if over.count < 2:
        del metrics["test_score_half_width"]
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
        runs={"mlflow_run_id": record.known(record.parent), "prefect_flow_run_id": str(runtime.flow_run.id)},
    )
    return folder, metrics


@task(cache_policy=NO_CACHE)
def show(
    stage: Stage, record: Any, folder: Path, metrics: Point, grid: Sequence[Point], finals: Sequence[Point], best: Point
) -> None:
    """Show the run where people look: MLflow's parent run and model registry, Prefect's artifacts."""
    record.metrics(record.parent, metrics)
    for name in ("results.json", "manifest.json", "curve.csv", PICTURE):
        record.file(record.parent, folder / name)
    record.compete(folder / WEIGHTS, stage.pack, stage.params, best)
    record.end(record.parent)
    keys = ("lr", "seed", "validation_score", "test_score", "seconds")
    table = [{key: round(point[key], 5) for key in keys if key in point} for point in (*grid[1:], *finals)]
    chosen = f", learning rate {metrics['lr']:g} chosen on validation" if "lr" in metrics else ""
    said = f"{stage.row}: {finals[0]['metric']}{chosen}"
    with shown():
        create_table_artifact(table, key=artifact_key("result", stage.row), description=said)
        picture = picture_address(folder / PICTURE)
        key = artifact_key("predictions", stage.row)
        create_image_artifact(picture, key=key, description=f"Predictions: {stage.row}")


@flow(name="downstream", flow_run_name="downstream {row}", task_runner=ThreadPoolTaskRunner(max_workers=8))  # type: ignore[arg-type]
def downstream(row: str) -> None:
    """Judge one row of params/downstream.yaml."""
    stage = begun(checked, row)
    with stage.alone():
        _downstream(stage)
        stage.close()


def _downstream(stage: Stage) -> None:
    row, count = stage.row, slots()
    workers = Workers(count, max(1, cores() // count), f"downstream-{row}", stage.spans)
    from flows.tracking import Record  # imported while the workers import torch

    # MLflow's page that compares arms begins with the first param by name in which they differ: that is which they are.
    params = {"arm": row, **stage.params}
    record = Record("downstream", row, stage.state, stage.data, params, score="test_score")
    rates, seeds = stage.params["lr_grid"] or [0.0], stage.params["seeds"]  # none where nothing is trained
    try:
        with workers, Bar(f"downstream {row}", len(rates) + len(seeds) - 1) as bar:

            def run(points: list[tuple[float, int]], test: bool) -> list[Point]:
                runs = [learn.submit(stage, workers, record, bar, lr, seed, test) for lr, seed in points]
                return [run.result() for run in runs]

            grid = run([(lr, seeds[0]) for lr in rates], test=len(rates) == 1)
            chosen = max(grid, key=lambda point: float(point["validation_score"]))["lr"]
            # The first seed's run at the chosen rate is done: it is only scored.
            finals = run([(chosen, seed) for seed in seeds], test=True)
        best = max(finals, key=lambda point: float(point["validation_score"]))
        folder, metrics = publish(stage, record, grid, finals, best)
        show(stage, record, folder, metrics, grid, finals, best)
    except BaseException as error:
        record.fail(error)
        raise


if __name__ == "__main__":
    command("downstream", checked, downstream)
