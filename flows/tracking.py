"""The record in MLflow: a parent run a stage, a child run a job, with curves, pictures, lineage and the registered
encoder or model.

MLflow is a view: the truth lies in the files that jobs and stages write. A server that does not answer costs a warning
and the view, never the training; the next run of a job under the same key goes on in the same MLflow run, and points
that are there already are not written twice.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from flows import janitor, registry, servers, workspace
from flows.workers import StoppedError

EXPERIMENT = "unmask"
UPLOAD_SECONDS = 5.0
SCORE = "validation_score"
"""What points are compared by."""
HIDDEN = frozenset({"step", "steps", "time"})
Given = TypeVar("Given")


class Record:
    """The MLflow runs of one stage; every call survives a server that does not."""

    def __init__(
        self,
        stage: str,
        row: str,
        folder: Path,
        data: Mapping[str, str],
        params: Mapping[str, Any],
        watch: bool = True,
    ) -> None:
        """Open the stage's parent run, or the one that `folder`, the stage's state, says is already there.

        `watch` adds the machine's metrics (processor, memory, disk) to the run while it goes on.
        """
        self.stage, self.row, self.data = stage, row, data
        self.lost = ""
        self.open: set[str] = set()
        (workspace.home() / "mlflow").mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient()
        self.monitor: SystemMetricsMonitor | None = None
        self.parent = self.attempt(lambda: self._open(f"{stage} {row}", folder, params, None))
        if self.parent:
            janitor.note_mlflow(self.parent)
        if self.parent and watch:
            parent = self.parent
            self.attempt(lambda: self._watch_system(parent))

    def attempt(self, call: Callable[[], Given]) -> Given | None:
        """Make a call to MLflow unless an earlier one failed; a failure is told once."""
        if self.lost:
            return None
        try:
            return call()
        except (MlflowException, OSError) as error:
            self.lost = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"MLflow does not answer, the run goes on without it: {self.lost}", stacklevel=2)
            return None

    def child(self, name: str, folder: Path, params: Mapping[str, Any]) -> Curve:
        """Open a job's run under the stage's, or the one that the job's folder says is there."""
        return Curve(self, self.attempt(lambda: self._open(name, folder, params, self.parent)))

    def point(
        self, name: str, folder: Path, params: Mapping[str, Any], row: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Curve:
        """Open the run of a point, as `child` does, for a page that compares many.

        MLflow's page begins with the first params that differ and the metric that was written first. So its params are
        the few that tell points apart, the whole `row` is an artifact, and its score, nan so far, comes first.
        """
        run = self.attempt(lambda: self._open(name, folder, params, self.parent, tags, row))
        if run:
            unknown = [Metric(SCORE, math.nan, int(time.time() * 1000), 0)]
            self.attempt(lambda: self.client.log_batch(run, metrics=unknown))
        return Curve(self, run)

    def metrics(self, run: str | None, values: Mapping[str, Any], step: int = 0) -> None:
        now = int(time.time() * 1000)
        points = [
            Metric(named(key), float(value), now, step)
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        if run:
            self.attempt(lambda: self.client.log_batch(run, metrics=points))

    def file(self, run: str | None, path: Path) -> None:
        if run:
            self.attempt(lambda: self.client.log_artifact(run, str(path)))

    def register(self, name: str, weights: Path, about: Mapping[str, Any]) -> None:
        """Register an encoder: a model that embeds uint8 images, with its own preprocessing and no pickled code."""
        if self.parent:
            parent = self.parent
            self.attempt(lambda: registry.register_encoder(self.client, parent, name, weights, about))

    def compete(
        self, weights: Path, pack: Path, params: Mapping[str, Any], finals: Sequence[Mapping[str, Any]]
    ) -> None:
        """Register the model that a downstream row published, the best of `finals` on validation images, and let it
        compete to be its comparison's champion. The run's tag `registered` says what came out.
        """
        if not self.parent:
            return
        parent, best = self.parent, max(finals, key=lambda point: float(point["validation_score"]))
        told = {key: best[key] for key in ("metric", "test_score", "validation_score", "lr", "seed")}
        told |= {"task": params["task"]["name"], "init": params["init"], "labels": params["labels"] or "all"}
        told |= {"data": self.data["name"], "data_md5": self.data["md5"], "row": self.row}
        told |= {"code": workspace.code_fingerprint(), "git_commit": _commit() or "none"}
        tags = {key: str(value) for key, value in told.items()}

        def enter() -> None:
            lock = workspace.home() / "mlflow" / "champion.lock"
            verdict = registry.register_model(self.client, parent, weights, pack, tags, lock)
            self.client.set_tag(parent, "registered", verdict)

        self.attempt(enter)

    def end(self, run: str | None, status: str = "FINISHED") -> None:
        if run == self.parent and self.monitor:
            self.monitor.finish()
        if run:
            self.open.discard(run)
            self.attempt(lambda: self.client.set_terminated(run, status))

    def fail(self, error: BaseException) -> None:
        """End the runs that are still open: KILLED where they were interrupted, else FAILED; nothing comes after."""
        for run in sorted(self.open, key=lambda run: run == self.parent):
            self.end(run, ended_by(error))
        self.lost = self.lost or "the stage has ended"

    def _open(
        self,
        name: str,
        folder: Path,
        params: Mapping[str, Any],
        parent: str | None,
        further: Mapping[str, str] | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> str:
        marker = folder / "mlflow.json"
        if marker.exists():
            there = str(json.loads(marker.read_text())["run_id"])
            try:
                self.client.update_run(there, status="RUNNING")
                self.open.add(there)
                return there
            except MlflowException:  # the record was cleared since: begin a new run
                marker.unlink()
        tags = {"mlflow.runName": name, "stage": self.stage, "row": self.row, "data": self.data["name"]}
        tags |= {"data_md5": self.data["md5"], "code": workspace.code_fingerprint(), **(further or {})}
        if commit := _commit():
            tags["mlflow.source.git.commit"] = commit
        if parent:
            tags["mlflow.parentRunId"] = parent
        run: str = self.client.create_run(_experiment(self.client), tags=tags).info.run_id
        self.open.add(run)
        flat = [Param(named(key), str(value)[:6000]) for key, value in flatten(params).items()]
        for start in range(0, len(flat), 100):  # MLflow's limit a call
            self.client.log_batch(run, params=flat[start : start + 100])
        dataset = Dataset(
            self.data["name"], self.data["md5"], "local", json.dumps({"folder": f"data/{self.data['name']}"})
        )
        self.client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", self.stage)])])
        self.client.log_dict(run, dict(row or params), "params.json")
        folder.mkdir(parents=True, exist_ok=True)
        workspace.write_json(marker, {"run_id": run})
        return run

    def _watch_system(self, run: str) -> None:
        self.monitor = SystemMetricsMonitor(run, sampling_interval=5, samples_before_logging=2, resume_logging=True)
        self.monitor.start()


class Curve:
    """A job's curve on its way to its run: gathered, and sent every few seconds."""

    def __init__(self, record: Record, run: str | None) -> None:
        self.record, self.run = record, run
        self.waiting: list[Metric] = []
        self.sent = time.monotonic()
        self.there: set[tuple[str, int]] = set()
        if run:
            self.there = record.attempt(lambda: _points(record.client, run)) or set()

    def add(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Take new lines of the curve."""
        for line in lines:
            for key, value in line.items():
                point = (key, int(line["step"]))
                if key in HIDDEN or point in self.there or not math.isfinite(value):
                    continue
                self.there.add(point)
                self.waiting.append(Metric(key, value, int(line["time"] * 1000), int(line["step"])))
        if time.monotonic() - self.sent > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what waits; up to 1,000 points a call, MLflow's limit."""
        for start in range(0, len(self.waiting), 1000):
            part = self.waiting[start : start + 1000]
            if self.run:
                run = self.run
                self.record.attempt(lambda part=part, run=run: self.record.client.log_batch(run, metrics=part))  # type: ignore[misc]
        self.waiting, self.sent = [], time.monotonic()

    def finish(self, values: Mapping[str, Any]) -> None:
        """Send the rest and the final values, and end the run."""
        self.flush()
        final = {key: value for key, value in values.items() if (key, int(values["steps"])) not in self.there}
        self.record.metrics(self.run, final, int(values["steps"]))
        self.record.end(self.run)

    def fail(self, error: BaseException) -> None:
        """Send the rest, and end the run of a job that did not come to its end."""
        self.flush()
        self.record.end(self.run, ended_by(error))


def ended_by(error: BaseException) -> str:
    """A run's status in MLflow after an error: KILLED where a signal or a request stopped it, and it may go on."""
    return "KILLED" if isinstance(error, StoppedError) or not isinstance(error, Exception) else "FAILED"


def mark_killed(parent: str) -> bool:
    """End a run and its children where they are open, as their process is dead; gives whether MLflow answered."""
    try:
        client = MlflowClient()
        experiment = client.get_run(parent).info.experiment_id
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        for run in (*children, client.get_run(parent)):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
    except MlflowException as error:
        return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")  # the record was cleared
    except OSError:
        return False
    return True


def flatten(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Name nested params by their path with points, as rows in `params/` are addressed."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = inner
    return flat


def named(key: str) -> str:
    """Write a name as MLflow takes it: labels of points may hold more than letters, digits and the signs it knows."""
    return re.sub(r"[^\w\-. :/]", "", key)


def _commit() -> str:
    return (workspace.git("rev-parse", "HEAD") or "").strip()


def _experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=servers.artifacts()))
    except MlflowException:  # another stage made it just now
        found = client.get_experiment_by_name(EXPERIMENT)
        if not found:
            raise
        return str(found.experiment_id)


def _points(client: MlflowClient, run: str) -> set[tuple[str, int]]:
    keys = client.get_run(run).data.metrics
    return {(key, point.step) for key in keys for point in client.get_metric_history(run, key)}
