"""Pretrain a row: train, publish, record. `python -m flows.pretrain ROW`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import workspace
from flows.progress import Bar
from flows.stage import Stage, artifact_key, command, died, picture_address, write_curves
from flows.workers import Workers, cores

PRODUCTS = ("encoder.safetensors", "model.safetensors", "gallery.png")


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=1, retry_condition_fn=died)
def train(stage: Stage, workers: Workers, record: Any, folder: Path) -> dict[str, Any]:
    """Train on all of the machine; resumes where a checkpoint of the same work lies."""
    seed = stage.params["seed"]
    job = {"kind": "pretrain", "row": stage.params, "pack": str(stage.pack), "folder": str(folder), "seed": seed}
    curve = record.child(f"{stage.row} seed {seed}", folder, {**stage.params, "seed": seed})
    with Bar(f"pretrain {stage.row}", 1) as bar:

        def watch(lines: list[dict[str, float]]) -> None:
            bar.update("", lines)
            curve.add(lines)

        result = workers.run(job, watch)
    curve.finish(result)
    return result


@task(cache_policy=NO_CACHE)
def publish(stage: Stage, record: Any, job: Path, result: dict[str, Any]) -> Path:
    """Put the products where DVC expects them; the manifest comes last."""
    folder = stage.publish("pretrain", job, PRODUCTS)
    write_curves(folder / "curve.csv", {(): job / "curve.jsonl"}, ())
    metrics = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    workspace.write_json(folder / "metrics.json", metrics)
    workspace.write_manifest(
        folder,
        stage="pretrain",
        row=stage.row,
        params=stage.params,
        data=stage.data,
        parents=[],
        started=stage.started,
        device_seconds=result["seconds"],
        images_seen=result["images_seen"],
        compute=result["compute"],
        metrics=metrics,
        runs={"mlflow_run_id": record.parent, "prefect_flow_run_id": str(runtime.flow_run.id)},
    )
    return folder


@task(cache_policy=NO_CACHE)
def show(stage: Stage, record: Any, folder: Path, result: dict[str, Any]) -> None:
    """Show the run where people look: MLflow's parent run and model registry, Prefect's artifacts."""
    record.metrics(record.parent, result, result["steps"])
    for name in ("gallery.png", "manifest.json", "curve.csv"):
        record.file(record.parent, folder / name)
    record.register(stage.row, folder / "encoder.safetensors", result["about"])
    record.end(record.parent)
    picture, key = picture_address(folder / "gallery.png"), artifact_key("gallery", stage.row)
    create_image_artifact(image_url=picture, key=key, description=f"Reconstructions by {stage.row}")
    shown = ("loss", "validation_loss", "hole_psnr", "steps", "images_seen", "images_per_s", "seconds", "parameters")
    lines = "\n".join(f"| {key} | {result[key]:,.4g} |" for key in shown if key in result)
    create_markdown_artifact(f"**{stage.row}**\n\n| | |\n|---|---|\n{lines}", key=artifact_key("result", stage.row))


def checked(row: str) -> Stage:
    """Check all that can be checked before work starts; raises UserError."""
    return Stage("pretrain", row, ("pretrain",))


@flow(name="pretrain", flow_run_name="pretrain {row}")
def pretrain(row: str) -> None:
    """Pretrain one row of params/pretrain.yaml."""
    stage = checked(row)
    workers = Workers(1, cores(), f"pretrain-{row}", stage.spans)
    from flows.tracking import Record  # imported while the worker imports torch

    record = Record("pretrain", row, stage.state, stage.data, stage.params)
    try:
        job = stage.state / f"seed_{stage.params['seed']}"
        result = train(stage, workers, record, job)
        folder = publish(stage, record, job, result)
        show(stage, record, folder, result)
    except BaseException:
        record.end(record.parent, "FAILED")
        raise
    finally:
        workers.stop()
    stage.close()


if __name__ == "__main__":
    command("pretrain", checked, pretrain)
