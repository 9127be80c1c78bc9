"""A stage that is one training run on all of the machine, as pretraining and tokenizers are: train, publish, record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import runtime, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import workspace
from flows.progress import Bar
from flows.stage import Stage, artifact_key, died, picture_address, shown, write_curves
from flows.workers import Workers
from mim_core.cores import cores


@dataclass(frozen=True)
class Training:
    """How a stage's run is published and shown.

    `kind` is its folder below runs/, `weights` and `pictures` its products (a picture with what it shows), `metrics`
    those that its summary holds. `artifacts` begins the names of Prefect's artifacts, `registered` is the product that
    MLflow registers as a model.
    """

    kind: str
    weights: tuple[str, ...]
    pictures: Mapping[str, str]
    metrics: tuple[str, ...]
    artifacts: str = ""
    registered: str | None = None


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=1, retry_condition_fn=died)
def train(stage: Stage, workers: Workers, record: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train on all of the machine; resumes where a checkpoint of the same work lies."""
    seed = job["seed"]
    curve = record.child(f"{stage.row} seed {seed}", Path(job["folder"]), {**stage.params, "seed": seed})
    with Bar(f"{stage.name} {stage.row}", 1) as bar:

        def watch(lines: list[dict[str, float]]) -> None:
            bar.update("", lines)
            curve.add(lines)

        result = workers.run(job, watch)
    curve.finish(result)
    return result


@task(cache_policy=NO_CACHE)
def publish(stage: Stage, training: Training, record: Any, job: Path, result: dict[str, Any]) -> Path:
    """Put the products where DVC expects them; the manifest comes last."""
    folder = stage.publish(training.kind, job, (*training.weights, *training.pictures))
    write_curves(folder / "curve.csv", {(): job / "curve.jsonl"}, ())
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    metrics = {key: value for key, value in numbers.items() if math.isfinite(value)}
    workspace.write_json(folder / "metrics.json", metrics)
    workspace.write_manifest(
        folder,
        stage=stage.name,
        row=stage.row,
        params=stage.params,
        data=stage.data,
        parents=stage.parents,
        started=stage.started,
        device_seconds=result["seconds"] * result["compute"].get("devices", 1),
        images_seen=result["images_seen"],
        compute=result["compute"],
        metrics=metrics,
        runs={"mlflow_run_id": record.known(record.parent), "prefect_flow_run_id": str(runtime.flow_run.id)},
    )
    return folder


@task(cache_policy=NO_CACHE)
def show(stage: Stage, training: Training, record: Any, folder: Path, result: dict[str, Any]) -> None:
    """Show the run where people look: MLflow's parent run and model registry, Prefect's artifacts."""
    record.metrics(record.parent, result, result["steps"])
    for name in (*training.pictures, "manifest.json", "curve.csv"):
        record.file(record.parent, folder / name)
    if training.registered:
        record.register(stage.row, folder / training.registered, result["about"])
    record.end(record.parent)
    with shown():
        for name, said in training.pictures.items():
            key = artifact_key(f"{training.artifacts}{Path(name).stem}", stage.row)
            create_image_artifact(image_url=picture_address(folder / name), key=key, description=f"{said}: {stage.row}")
        lines = "\n".join(f"| {key} | {result[key]:,.4g} |" for key in training.metrics if key in result)
        key = artifact_key(f"{training.artifacts}result", stage.row)
        create_markdown_artifact(f"**{stage.row}**\n\n| | |\n|---|---|\n{lines}", key=key)


def run(stage: Stage, training: Training, **wiring: Any) -> None:
    """Train a checked stage's row; `wiring` is what its job needs beside the row, the pack, the folder and the seed.

    Raises UserError where another process runs it.
    """
    with stage.alone():
        _run(stage, training, wiring)
        stage.close()


def _run(stage: Stage, training: Training, wiring: Mapping[str, Any]) -> None:
    workers = Workers(1, cores(), f"{stage.name}-{stage.row}", stage.spans)
    from flows.tracking import Record  # imported while the worker imports torch

    record = Record(stage.name, stage.row, stage.state, stage.data, stage.params)
    seed = stage.params["seed"]
    folder = stage.state / f"seed_{seed}"
    job = {"kind": stage.name, "row": stage.params, "pack": str(stage.pack), "folder": str(folder), "seed": seed}
    try:
        with workers:
            result = train(stage, workers, record, {**job, **wiring})
        published = publish(stage, training, record, folder, result)
        show(stage, training, record, published, result)
    except BaseException as error:
        record.fail(error)
        raise
