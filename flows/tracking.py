"""The record in MLflow: a parent run a stage, a child run a job, with curves, pictures, lineage and the registered
encoder or model.

MLflow is a view: the truth lies in the files that jobs and stages write. What a server does not take is kept on disk
and sent later, see `flows.spool`, and the training goes on; the next run of a job under the same key goes on in the
same MLflow run, and points that are there already are not written twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from flows import janitor, spool, workspace
from flows.workers import StoppedError

UPLOAD_SECONDS = 5.0
SCORE = "validation_score"
"""What points are compared by."""
HIDDEN = frozenset({"step", "steps", "time"})
Given = TypeVar("Given")


class Record:
    """The MLflow runs of one stage; every call survives a server that does not.

    Runs are named by MLflow's id, or by a name of their own (`spooled-...`, their tag `unmask.id`) where it did not
    answer as they were opened.
    """

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

        `watch` adds the machine's metrics (processor, memory, disk) to the run while it goes on. What earlier records
        could not send is sent beside, where the server answers.
        """
        self.stage, self.row, self.data = stage, row, data
        self.over = False
        self.open: set[str] = set()
        self.spool = spool.Spool(f"{stage}-{row}")
        self.monitor: SystemMetricsMonitor | None = None
        self.parent = ""
        # Asked first: opening takes several calls, each of which a slow server would make its own wait.
        if self.attempt(lambda: self.spool.sender.experiment()):
            threading.Thread(target=_catch_up, daemon=True).start()
        self.parent = self._open(f"{stage} {row}", folder, params, None)
        if not self.parent.startswith(spool.LOCAL):
            janitor.note_mlflow(self.parent)
            if watch:
                self.attempt(lambda: self._watch_system(self.parent))

    def attempt(self, call: Callable[[], Given]) -> Given | None:
        """Ask MLflow, unless it fails or is slow; a failure is told once."""
        answer: Given | None = None if self.over else self.spool.attempt(call)
        return answer

    def do(self, op: str, run: str, **what: Any) -> None:
        """Do an operation on a run, now or later."""
        if not self.over:
            self.spool.do({"op": op, "run": run, **what})

    def known(self, run: str) -> str:
        """A run's id in MLflow, for what refers to it: waits a while for a slow server to give it one."""
        if run.startswith(spool.LOCAL):
            self.spool.settle(10.0)
        return self.spool.sender.ids.get(run, run)

    def child(self, name: str, folder: Path, params: Mapping[str, Any]) -> Curve:
        """Open a job's run under the stage's, or the one that the job's folder says is there."""
        return Curve(self, self._open(name, folder, params, self.parent))

    def point(
        self, name: str, folder: Path, params: Mapping[str, Any], row: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Curve:
        """Open the run of a point, as `child` does, for a page that compares many.

        MLflow's page begins with the first params that differ and the metric that was written first. So its params are
        the few that tell points apart, the whole `row` is an artifact, and its score, nan so far, comes first.
        """
        run = self._open(name, folder, params, self.parent, tags, row)
        self.do("metrics", run, points=[(SCORE, math.nan, int(time.time() * 1000), 0)])
        return Curve(self, run)

    def metrics(self, run: str, values: Mapping[str, Any], step: int = 0) -> None:
        now = int(time.time() * 1000)
        points = [
            (named(key), float(value), now, step)
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        self.do("metrics", run, points=points)

    def file(self, run: str, path: Path) -> None:
        self.do("file", run, path=str(path))

    def tag(self, run: str, key: str, value: str) -> None:
        self.do("tag", run, key=key, value=value)

    def register(self, name: str, weights: Path, about: Mapping[str, Any]) -> None:
        """Register an encoder: a model that embeds uint8 images, with its own preprocessing and no pickled code."""
        self.do("register", self.parent, name=name, path=str(weights), about=dict(about))

    def compete(
        self, weights: Path, pack: Path, params: Mapping[str, Any], finals: Sequence[Mapping[str, Any]]
    ) -> None:
        """Register the model that a downstream row published, the best of `finals` on validation images, and let it
        compete to be its comparison's champion. The run's tag `registered` says what came out.
        """
        best = max(finals, key=lambda point: float(point["validation_score"]))
        told = {key: best[key] for key in ("metric", "test_score", "validation_score", "lr", "seed")}
        told |= {"task": params["task"]["name"], "init": params["init"], "labels": params["labels"] or "all"}
        told |= {"data": self.data["name"], "data_md5": self.data["md5"], "row": self.row}
        told |= {"code": workspace.code_fingerprint(), "git_commit": _commit() or "none"}
        tags = {key: str(value) for key, value in told.items()}
        self.do("compete", self.parent, path=str(weights), pack=str(pack), tags=tags)

    def end(self, run: str, status: str = "FINISHED") -> None:
        if run == self.parent and self.monitor:
            self.monitor.finish()
        self.open.discard(run)
        self.do("end", run, status=status)
        if run == self.parent:
            self.spool.close()

    def fail(self, error: BaseException) -> None:
        """End the runs that are still open: KILLED where they were interrupted, else FAILED; nothing comes after."""
        for run in sorted(self.open, key=lambda run: run == self.parent):
            self.end(run, ended_by(error))
        self.over = True

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
        there = json.loads(marker.read_text()) if marker.exists() else {}
        if "run_id" in there and not self._gone(there["run_id"]):
            self.open.add(there["run_id"])
            return str(there["run_id"])
        fresh = "run_id" in there or "local" not in there
        local = f"{spool.LOCAL}{uuid.uuid4().hex}" if fresh else there["local"]
        tags = {"mlflow.runName": name, "stage": self.stage, "row": self.row, "data": self.data["name"]}
        tags |= {"data_md5": self.data["md5"], "code": workspace.code_fingerprint(), **(further or {})}
        if commit := _commit():
            tags["mlflow.source.git.commit"] = commit
        workspace.write_json(marker, {"local": local})  # before the run: a kill must not make a second one
        run = self.spool.do(
            {
                "op": "open",
                "run": local,
                "fresh": fresh,
                "record": self.spool.path.stem,
                "tags": tags,
                "parent": parent,
                "flat": {named(key): str(value)[:6000] for key, value in flatten(params).items()},
                "params": dict(row or params),
                "data": [self.data["name"], self.data["md5"], self.stage],
                "marker": str(marker),
            }
        )
        self.open.add(run or local)
        return run or local

    def _gone(self, run: str) -> bool:
        """Take up a run that was there; gives whether the record was cleared since, which a dead server cannot say."""
        try:
            if self.spool.straight():
                self.spool.sender.client.update_run(run, status="RUNNING")
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
        except OSError:
            pass
        return False

    def _watch_system(self, run: str) -> None:
        self.monitor = SystemMetricsMonitor(run, sampling_interval=5, samples_before_logging=2, resume_logging=True)
        self.monitor.start()


class Curve:
    """A job's curve on its way to its run: gathered, and sent every few seconds."""

    def __init__(self, record: Record, run: str) -> None:
        self.record, self.run = record, run
        self.waiting: list[tuple[str, float, int, int]] = []
        self.sent = time.monotonic()
        found = record.attempt(lambda: record.spool.sender.points(record.spool.sender.resolve(run)))
        self.there: set[tuple[str, int]] = found or set()
        # Where nothing was answered, what is sent is compared with what is there then.
        self.check = found is None

    def add(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Take new lines of the curve."""
        for line in lines:
            for key, value in line.items():
                point = (key, int(line["step"]))
                if key in HIDDEN or point in self.there or not math.isfinite(value):
                    continue
                self.there.add(point)
                self.waiting.append((key, value, int(line["time"] * 1000), int(line["step"])))
        if time.monotonic() - self.sent > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what waits; up to 1,000 points a call, MLflow's limit."""
        for start in range(0, len(self.waiting), 1000):
            self.record.do("metrics", self.run, points=self.waiting[start : start + 1000], check=self.check)
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


def _catch_up() -> None:
    """Send what earlier records left; what a failure leaves again waits for the next time."""
    with contextlib.suppress(MlflowException, OSError):
        for _ in spool.sweep(spool.Sender()):
            pass
