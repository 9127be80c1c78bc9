"""Operations on MLflow, each of which can be done again: sent at once, or kept in `.unmask/spool/` and sent later.

A stage's record has one file there, `<time>-<stage>-<row>.jsonl`, an operation a line, which its process holds locked;
a copy of each file to upload lies in the folder of the same name. Beside it `.at` holds how many bytes are sent; it is
written after each operation, and what a kill lets happen twice changes nothing: a run is found again by the tag
`unmask.id`, which is its name until MLflow gives it one, and a metric's point that is there is not written again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient, get_tracking_uri

from flows import registry, servers, workspace
from mim_core.files import write_atomically

EXPERIMENT = "unmask"
LOCAL = "spooled-"
"""Begins the name of a run that MLflow has not named yet."""
AGAIN_SECONDS = 30.0
"""Between two tries of a server that failed, or was slow."""
SLOW_SECONDS = 4.0
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
"""What MLflow answers where the same operation would never succeed."""
Operation = dict[str, Any]


class Sender:
    """Does operations; not for two threads at once where they are on the same run."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self.ids: dict[str, str] = {}
        self.there: dict[str, set[tuple[str, int]]] = {}

    @property
    def client(self) -> MlflowClient:
        if not self._client:  # opening a database fails where it cannot be read
            (workspace.home() / "mlflow").mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient()
        return self._client

    def send(self, operation: Mapping[str, Any]) -> str:
        """Do an operation, and give its run's id in MLflow; raises MlflowException and OSError."""
        try:
            if operation["op"] == "open":
                return self._open(operation)
            run = self.resolve(operation["run"])
            getattr(self, f"_{operation['op']}")(run, operation)
            return run
        except BaseException:
            self.there.clear()  # it may have been done all the same
            raise

    def resolve(self, run: str) -> str:
        """Find a run's id in MLflow; raises MlflowException where it has none."""
        if not run.startswith(LOCAL):
            return run
        if run not in self.ids:
            found = self._find(run)
            if not found:
                raise MlflowException(f"no run has the tag unmask.id = {run}", RESOURCE_DOES_NOT_EXIST)
            self.ids[run] = found
        return self.ids[run]

    def points(self, run: str) -> set[tuple[str, int]]:
        keys = self.client.get_run(run).data.metrics
        return {(key, point.step) for key in keys for point in self.client.get_metric_history(run, key)}

    def experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found:
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(EXPERIMENT, artifact_location=servers.artifacts()))
        except MlflowException:  # another stage made it just now
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if not found:
                raise
            return str(found.experiment_id)

    def _find(self, local: str) -> str | None:
        found = self.client.search_runs([self.experiment()], f"tags.`unmask.id` = '{local}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _open(self, said: Mapping[str, Any]) -> str:
        local = said["run"]
        run = None if said.get("fresh") else self._find(local)
        if run:
            self.client.update_run(run, status="RUNNING")
        else:
            tags = {**said["tags"], "unmask.id": local}
            if said["parent"]:
                tags["mlflow.parentRunId"] = self.resolve(said["parent"])
            run = str(self.client.create_run(self.experiment(), tags=tags).info.run_id)
        self.ids[local] = run
        self.client.set_tag(run, "unmask.record", said["record"])
        flat = [Param(key, value) for key, value in said["flat"].items()]
        for start in range(0, len(flat), 100):  # MLflow's limit a call
            self.client.log_batch(run, params=flat[start : start + 100])
        name, md5, stage = said["data"]
        dataset = Dataset(name, md5, "local", json.dumps({"folder": f"data/{name}"}))
        self.client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", stage)])])
        self.client.log_dict(run, said["params"], "params.json")
        marker = Path(said["marker"])
        # A stage that has published is without its folder.
        if marker.exists() and json.loads(marker.read_text()).get("local") == local:
            workspace.write_json(marker, {"run_id": run, "local": local})
        return run

    def _metrics(self, run: str, said: Mapping[str, Any]) -> None:
        points = [Metric(*point) for point in said["points"]]
        if said.get("check"):
            if run not in self.there:
                self.there[run] = self.points(run)
            points = [point for point in points if (point.key, point.step) not in self.there[run]]
        if points:
            self.client.log_batch(run, metrics=points)
        if run in self.there:
            self.there[run] |= {(point.key, point.step) for point in points}

    def _file(self, run: str, said: Mapping[str, Any]) -> None:
        self.client.log_artifact(run, said["path"])

    def _tag(self, run: str, said: Mapping[str, Any]) -> None:
        self.client.set_tag(run, said["key"], said["value"])

    def _end(self, run: str, said: Mapping[str, Any]) -> None:
        # One that has finished since, as the same work was gone on with, stays so.
        if said["status"] == "FINISHED" or self.client.get_run(run).info.status != "FINISHED":
            self.client.set_terminated(run, said["status"])

    def _register(self, run: str, said: Mapping[str, Any]) -> None:
        if not (said.get("check") and self.client.search_model_versions(f"run_id='{run}'")):
            registry.register_encoder(self.client, run, said["name"], Path(said["path"]), said["about"])

    def _compete(self, run: str, said: Mapping[str, Any]) -> None:
        if said.get("check") and "registered" in self.client.get_run(run).data.tags:
            return
        lock = workspace.home() / "mlflow" / "champion.lock"
        verdict = registry.register_model(self.client, run, Path(said["path"]), Path(said["pack"]), said["tags"], lock)
        self.client.set_tag(run, "registered", verdict)


class Spool:
    """A record's way to MLflow: straight while it answers soon, else by the file, which a thread sends on."""

    def __init__(self, name: str) -> None:
        self.path = folder() / f"{time.time_ns()}-{name}.jsonl"
        self.sender, self.lock = Sender(), threading.RLock()
        self.file: Any = None
        self.calm, self.told, self.fault, self.count = 0.0, False, "", 0
        self.wake = threading.Event()

    def straight(self) -> bool:
        return self.file is None and time.monotonic() >= self.calm

    def attempt(self, call: Any) -> Any:
        """Make a call that only asks, where MLflow answers; None where it does not, or is left alone."""
        if not self.straight():
            return None
        begun = time.monotonic()
        try:
            return call()
        except (MlflowException, OSError) as error:
            self._failed(error)
            return None
        finally:
            self._timed(begun)

    def do(self, operation: Operation) -> str | None:
        """Do an operation now, or keep it; gives the run's id in MLflow where it was done. Never raises."""
        if self.straight():
            begun = time.monotonic()
            try:
                return self.sender.send(operation)
            except (MlflowException, OSError) as error:
                if _refused(error):
                    warnings.warn(f"MLflow refused '{operation['op']}': {_first(error)}", stacklevel=3)
                    return None
                self._failed(error)
            finally:
                self._timed(begun)
        self._keep({**operation, "check": True, "fresh": False})
        return None

    def close(self, seconds: float = 5.0) -> None:
        """Send what is kept, within `seconds`; the rest stays, for the next record or `unmask sync`."""
        if not self.settle(seconds):
            warnings.warn("a part of the record waits in .unmask/spool; send it with `unmask sync`", stacklevel=3)

    def settle(self, seconds: float) -> bool:
        """Wait until what is kept is sent, or MLflow fails again, or the time is over; gives whether all is sent."""
        end = time.monotonic() + seconds
        self.fault, self.calm = "", 0.0
        self.wake.set()
        while self.file and not self.fault and time.monotonic() < end:
            time.sleep(0.02)
        return self.file is None

    def _timed(self, begun: float) -> None:
        if time.monotonic() - begun > SLOW_SECONDS:
            self.calm = time.monotonic() + AGAIN_SECONDS

    def _failed(self, error: Exception) -> None:
        self.calm, self.fault = time.monotonic() + AGAIN_SECONDS, _first(error)
        if not self.told:
            self.told = True
            warnings.warn(
                f"MLflow does not answer, its record is kept in .unmask/spool meanwhile: {self.fault}", stacklevel=4
            )

    def _keep(self, operation: Operation) -> None:
        try:
            with self.lock:
                if self.file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.file = self.path.open("ab")
                    fcntl.flock(self.file, fcntl.LOCK_EX)
                    threading.Thread(target=self._serve, daemon=True).start()
                if "path" in operation:
                    self.count += 1
                    source = Path(operation["path"])
                    copied = self.path.with_suffix("") / str(self.count) / source.name
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copied)  # not a link: what is published may be written anew in place
                    operation = {**operation, "path": str(copied)}
                self.file.write(json.dumps(operation, default=str).encode() + b"\n")
                self.file.flush()
        except OSError as error:  # a full disk must not end the training
            warnings.warn(f"a part of MLflow's record is lost: {error}", stacklevel=4)

    def _serve(self) -> None:
        """Send what is kept until nothing is; runs in a thread."""
        while self.file:
            self.wake.wait(max(0.0, self.calm - time.monotonic()) if self.fault else 0.1)
            self.wake.clear()
            try:
                for _ in replay(self.path, self.sender):
                    pass
            except (MlflowException, OSError) as error:
                self._failed(error)
                continue
            self.fault = ""
            with self.lock:
                if _sent(self.path) == self.path.stat().st_size and time.monotonic() >= self.calm:
                    _remove(self.path)
                    self.file.close()
                    self.file = None


def folder() -> Path:
    return workspace.home() / "spool"


def replay(path: Path, sender: Sender) -> Iterator[Operation]:
    """Send a file's operations that are not sent, in their order; gives each after it is noted.

    Raises MlflowException and OSError where MLflow does not answer. What it refuses for good goes to `.refused`.
    """
    with path.open("rb") as file:
        file.seek(_sent(path))
        for line in file:
            if not line.endswith(b"\n"):  # still being written, or cut short by a kill
                break
            operation = json.loads(line)
            try:
                sender.send(operation)
            except (MlflowException, OSError) as error:
                if not _refused(error):
                    raise
                operation["refused"] = _first(error)
                with path.with_suffix(".refused").open("a") as refused:
                    refused.write(json.dumps(operation) + "\n")
            write_atomically(path.with_suffix(".at"), str(file.tell()))
            yield operation


def sweep(sender: Sender) -> Iterator[str]:
    """Send what records whose process is over have left, and say so; raises MlflowException and OSError."""
    for path in sorted(folder().glob("*.jsonl")):
        name = path.stem.partition("-")[2]
        try:
            file = path.open("rb")
        except FileNotFoundError:  # sent by another process meanwhile
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{name}: its process goes on, and sends it itself"
                continue
            if not path.exists():
                continue
            done: Counter[str] = Counter()
            for operation in replay(path, sender):
                if "refused" in operation:
                    yield f"{name}: MLflow refused '{operation['op']}': {operation['refused']}"
                    continue
                done[operation["op"]] += len(operation.get("points", "."))
            _end_open(path, sender)
            _remove(path)
            yield f"{name}: sent {', '.join(f'{count} {WORDS[op]}' for op, count in done.items()) or 'the rest'}"


WORDS = {"open": "run(s)", "metrics": "point(s)", "file": "file(s)", "tag": "tag(s)", "end": "end(s) of runs"}
WORDS |= {"register": "encoder(s)", "compete": "model(s)"}


def waiting() -> dict[str, int]:
    """Count the operations that wait, by the record's name."""
    left: Counter[str] = Counter()
    for path in folder().glob("*.jsonl"):
        left[path.stem.partition("-")[2]] += path.read_bytes()[_sent(path) :].count(b"\n")
    return dict(left)


def sync() -> None:
    """Send all that waits and print it; raises UserError where MLflow does not answer."""
    if not list(folder().glob("*.jsonl")):
        print("nothing waits in .unmask/spool: MLflow has the whole record")
        return
    try:
        for line in sweep(Sender()):
            print(line, flush=True)
    except (MlflowException, OSError) as error:
        left = ", ".join(f"{name} ({count} operations)" for name, count in waiting().items())
        raise workspace.UserError(
            f"MLflow at {get_tracking_uri()} does not answer: {_first(error)}\nwhat waits: {left}"
        ) from None


def _end_open(path: Path, sender: Sender) -> None:
    """End runs that a dead process opened and did not end, unless another process has opened them since."""
    kept = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    ended = {one["run"] for one in kept if one["op"] == "end"}
    for one in kept:
        if one["op"] == "open" and one["run"] not in ended:
            try:
                run = sender.client.get_run(sender.resolve(one["run"]))
            except MlflowException as error:
                if _refused(error):  # it was cleared since
                    continue
                raise
            if run.info.status == "RUNNING" and run.data.tags.get("unmask.record") == one["record"]:
                sender.client.set_terminated(run.info.run_id, "KILLED")


def _sent(path: Path) -> int:
    try:
        return int(path.with_suffix(".at").read_text())
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    """Take away a file that is sent; the operations first, so that no kill leaves them without how far they are."""
    path.unlink()
    path.with_suffix(".at").unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def _refused(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in REFUSALS


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
