"""The record in MLflow: a parent run a stage, a child run a job, with curves, pictures, lineage and the registered
encoder or model.

MLflow is a view: the truth lies in the files that jobs and stages write. What is said here goes to disk first and is
sent beside, see `flows.spool`: a server that is slow, fails or is dead costs the training nothing. The next run of a
job under the same key goes on in the same MLflow run, and points that are there already are not written twice.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from flows import registry, workspace
from flows.sender import NAME, with_ids
from flows.spool import Spool
from flows.workers import StoppedError

UPLOAD_SECONDS = 5.0
BACKLOG_SECONDS = 60.0
"""Between two uploads of a curve where MLflow is behind."""
ID_SECONDS, END_SECONDS, KILLED_SECONDS = 120.0, 60.0, 10.0
"""How long a stage waits at its end while MLflow answers: for ids to publish, for all to be sent, and for the latter
where it was interrupted."""
SCORE = "validation_score"
"""What points are compared by."""
HIDDEN = frozenset({"step", "steps", "time"})
Given = TypeVar("Given")


class Record:
    """The MLflow runs of one stage, each by a name of its own; only `known`, the parent's `end` and `fail` wait."""

    def __init__(
        self,
        stage: str,
        row: str,
        folder: Path,
        data: Mapping[str, str],
        params: Mapping[str, Any],
        watch: bool = True,
        score: str = "",
    ) -> None:
        """Open the stage's parent run, or the one that `folder`, the stage's state, says is already there.

        `watch` adds the machine's metrics (processor, memory, disk) to the run while it goes on. `score` names the
        metric that runs of this stage are compared by.
        """
        self.stage, self.row, self.data = stage, row, data
        self.open: set[str] = set()
        self.spool = Spool(f"{stage}-{row}")
        self.parent = ""
        self.parent = self._open(f"{stage} {row}", folder, params)
        if score:
            self._begin_with(score, self.parent)
        self.machine = Machine(self) if watch else None

    def known(self, value: Given, seconds: float = ID_SECONDS) -> Given:
        """Put MLflow's ids of runs in place of their own names in a JSON value, for what is published.

        Waits for a server that answers, however slowly. Where it does not, names stay, and `unmask sync` puts the ids
        into what was published.
        """
        ids, text = self.spool.sender.ids, json.dumps(value)
        names = set(NAME.findall(text))
        if seconds:
            self.spool.settle(lambda: names <= ids.keys(), seconds)
            if not names <= ids.keys():
                self.spool.tell("what is published here has no id of MLflow's yet; `unmask sync` puts it in")
        found: Given = json.loads(with_ids(text, ids))
        return found

    def child(self, name: str, folder: Path, params: Mapping[str, Any]) -> Curve:
        """Open a job's run under the stage's, or the one that the job's folder says is there."""
        return Curve(self, self._open(name, folder, params))

    def point(
        self, name: str, folder: Path, params: Mapping[str, Any], row: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Curve:
        """Open the run of a point, as `child` does, for a page that compares many.

        MLflow's page begins with the first params that differ. So its params are the few that tell points apart, and
        the whole `row` is an artifact.
        """
        run = self._open(name, folder, params, tags, row)
        self._begin_with(SCORE, run)
        return Curve(self, run)

    def _begin_with(self, score: str, run: str) -> None:
        """Write a score, nan so far: MLflow's page that compares begins with the metric that was written first."""
        self.do("metrics", run, points=[(score, math.nan, int(time.time() * 1000), 0)])

    def do(self, op: str, run: str, **what: Any) -> None:
        """Say something of a run, see `flows.sender`."""
        self.spool.do({"op": op, "run": run, **what})

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

    def compete(self, weights: Path, pack: Path, params: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """Register the model that a downstream row published, whose run gave `best`, and let it compete to be its
        comparison's champion. The run's tag `registered` says what came out.
        """
        told = {key: best[key] for key in ("metric", "test_score", "validation_score", "lr", "seed")}
        told |= {"task": params["task"]["name"], "init": params["init"], "labels": params["labels"] or "all"}
        told |= {"data": self.data["name"], "data_md5": self.data["md5"], "row": self.row}
        told |= {"code": workspace.code_fingerprint(), "git_commit": _commit() or "none"}
        tags = {key: str(value) for key, value in told.items()} | registry.pack_digests(pack)
        self.do("compete", self.parent, path=str(weights), example=best["example"], tags=tags)

    def end(self, run: str, status: str = "FINISHED") -> None:
        """End a run; with the parent the record ends."""
        self.open.discard(run)
        if run == self.parent and self.machine:
            self.machine.finish()
        self.do("end", run, status=status)
        if run == self.parent:
            self.spool.close(KILLED_SECONDS if status == "KILLED" else END_SECONDS)

    def fail(self, error: BaseException) -> None:
        """End the runs that are still open: KILLED where they were interrupted, else FAILED; nothing comes after."""
        for run in sorted(self.open, key=lambda run: run == self.parent):
            self.end(run, ended_by(error))

    def _open(
        self,
        name: str,
        folder: Path,
        params: Mapping[str, Any],
        further: Mapping[str, str] | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> str:
        marker = folder / "mlflow.json"
        there = json.loads(marker.read_text()) if marker.exists() else {}
        run = str(there.get("run") or f"spooled-{uuid.uuid4().hex}")
        workspace.write_json(marker, {"run": run})
        tags = {"mlflow.runName": name, "stage": self.stage, "row": self.row, "data": self.data["name"]}
        tags |= {"data_md5": self.data["md5"], "code": workspace.code_fingerprint(), **(further or {})}
        if "pack" in self.data:
            tags["pack"] = self.data["pack"]
        if commit := _commit():
            tags["mlflow.source.git.commit"] = commit
        self.do(
            "open",
            run,
            parent=self.parent,
            tags=tags,
            params={named(key): str(value)[:6000] for key, value in flatten(params).items()},
            about=row or params,
            data=[self.data["name"], self.data["md5"], self.stage],
        )
        self.open.add(run)
        return run


class Machine(SystemMetricsMonitor):  # type: ignore[misc]
    """The machine's metrics, on the record's way to the parent run; MLflow's own way would ask the server each time."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.parent, sampling_interval=5, samples_before_logging=2)
        self.record = record
        self.start()

    def monitor(self) -> None:
        """Sample until the end; a step is a second, as a stage that goes on cannot know how many steps there were."""
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    break  # a stage of a few seconds has metrics, too
            values = {f"{self._metrics_prefix}{key}": value for key, value in self.aggregate_metrics().items()}
            for monitor in self.monitors:
                monitor.clear_metrics()
            self.record.metrics(self.record.parent, values, int(time.time()))

    def finish(self) -> None:
        """Send what has been sampled, and end."""
        self._shutdown_event.set()
        if self._process:
            self._process.join()


class Curve:
    """A job's curve on its way to its run: gathered, and sent every few seconds."""

    def __init__(self, record: Record, run: str) -> None:
        self.record, self.run = record, run
        self.waiting: list[tuple[str, float, int, int]] = []
        self.sent = time.monotonic()
        self.there: set[tuple[str, int]] = set()

    def add(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Take new lines of the curve."""
        for line in lines:
            for key, value in line.items():
                point = (key, int(line["step"]))
                if key in HIDDEN or point in self.there or not math.isfinite(value):
                    continue
                self.there.add(point)
                self.waiting.append((key, value, int(line["time"] * 1000), int(line["step"])))
        waited = time.monotonic() - self.sent
        if waited > BACKLOG_SECONDS or (waited > UPLOAD_SECONDS and self.record.spool.idle):
            self.flush()

    def flush(self) -> None:
        """Send what waits; up to 1,000 points a call, MLflow's limit."""
        for start in range(0, len(self.waiting), 1000):
            self.record.do("metrics", self.run, points=self.waiting[start : start + 1000], curve=True)
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
