"""Operations on MLflow, each of which can be done twice, as a kill or a lost answer makes it, and changes nothing then.

A run is found by its tag `unmask.id`, which is its own name, by which it goes until MLflow has given it an id; a point
of a metric that is there is not written again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient

from flows import registry, servers, workspace

EXPERIMENT = "unmask"
NAME = re.compile(r"spooled-[0-9a-f]{32}")
"""A run's own name."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"}
"""What MLflow answers where the same operation would never succeed."""


class Sender:
    """Does operations in MLflow; for one thread. `ids` has MLflow's ids of the runs by their own names."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._new: set[str] = set()
        self._there: dict[str, set[tuple[str, int, str]]] = {}

    @property
    def client(self) -> MlflowClient:
        if not self._client:  # opening a database fails where it cannot be read
            (workspace.home() / "mlflow").mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient()
        return self._client

    def create(self, said: Mapping[str, Any]) -> None:
        """Find or create the run that an operation opens: only its tags, as what refers to it waits for its id."""
        name = said["run"]
        if name in self.ids:
            return
        run = self.find(name)
        if run:
            # Those that an earlier process opened; what is published names them, too.
            below = f"tags.`mlflow.parentRunId` = '{run}'"
            for child in self.client.search_runs([self.experiment()], below):
                self.ids[child.data.tags.get("unmask.id", "")] = child.info.run_id
        else:
            parent = {"mlflow.parentRunId": self.resolve(said["parent"])} if said["parent"] else {}
            tags = {**said["tags"], **parent, "unmask.id": name}
            run = str(self.client.create_run(self.experiment(), said["time"], tags).info.run_id)
            self._new.add(run)
            self._there[run] = set()
        self.ids[name] = run

    def send(self, said: Mapping[str, Any]) -> None:
        """Do an operation; raises what MLflow's client does."""
        run = self.resolve(said["run"])
        try:
            getattr(self, f"_{said['op']}")(run, said)
        except BaseException:
            self._there.pop(run, None)  # it may have been done all the same
            raise

    def find(self, name: str) -> str | None:
        """Find a run's id in MLflow by its own name."""
        found = self.client.search_runs([self.experiment()], f"tags.`unmask.id` = '{name}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def resolve(self, name: str) -> str:
        if name not in self.ids:
            found = self.find(name)
            if not found:
                raise MlflowException(f"no run has the tag unmask.id = {name}", RESOURCE_DOES_NOT_EXIST)
            self.ids[name] = found
        return self.ids[name]

    def experiment(self) -> str:
        if self._experiment:
            return self._experiment
        found = self.client.get_experiment_by_name(EXPERIMENT)
        try:
            made = found.experiment_id if found else self.client.create_experiment(EXPERIMENT, servers.artifacts())
        except MlflowException:  # another stage made it just now
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if not found:
                raise
            made = found.experiment_id
        self._experiment = str(made)
        return self._experiment

    def _open(self, run: str, said: Mapping[str, Any]) -> None:
        if run in self._new:
            self._new.discard(run)
        else:
            found = self.client.get_run(run)
            if found.info.status != "RUNNING":
                self.client.update_run(run, status="RUNNING")
            if found.data.params:  # they come last: all is told
                return
        name, md5, stage = said["data"]
        self.client.log_dict(run, said["about"], "params.json")
        dataset = Dataset(name, md5, "local", json.dumps({"folder": f"data/{name}"}))
        self.client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", stage)])])
        params = [Param(key, value) for key, value in said["params"].items()]
        for start in range(0, len(params), 100):  # MLflow's limit a call
            self.client.log_batch(run, params=params[start : start + 100])

    def _metrics(self, run: str, said: Mapping[str, Any]) -> None:
        if run not in self._there:
            keys = self.client.get_run(run).data.metrics
            history = [point for key in keys for point in self.client.get_metric_history(run, key)]
            self._there[run] = {told for point in history for told in _told(point)}
        there, curve = self._there[run], said.get("curve", False)
        points = [point for point in (Metric(*one) for one in said["points"]) if _told(point)[curve] not in there]
        if points:
            self.client.log_batch(run, metrics=points)
        there |= {told for point in points for told in _told(point)}

    def _file(self, run: str, said: Mapping[str, Any]) -> None:
        path = Path(said["path"])
        if path.suffix == ".json":  # a manifest that was written while MLflow was dead
            path.write_text(with_ids(path.read_text(), self.ids))
        self.client.log_artifact(run, str(path))

    def _tag(self, run: str, said: Mapping[str, Any]) -> None:
        self.client.set_tag(run, said["key"], said["value"])

    def _end(self, run: str, said: Mapping[str, Any]) -> None:
        self.client.set_terminated(run, said["status"], said["time"])

    def _register(self, run: str, said: Mapping[str, Any]) -> None:
        if not self.client.search_model_versions(f"run_id='{run}'"):
            registry.register_encoder(self.client, run, said["name"], Path(said["path"]), said["about"])

    def _compete(self, run: str, said: Mapping[str, Any]) -> None:
        if "registered" in self.client.get_run(run).data.tags:
            return
        lock = workspace.home() / "mlflow" / "champion.lock"
        verdict = registry.register_model(self.client, run, Path(said["path"]), said["example"], said["tags"], lock)
        self.client.set_tag(run, "registered", verdict)


def _told(point: Metric) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
    """What makes a metric's point one that is there: key, step and value, as summaries change, or for a curve the first
    two: a device may compute a step a little differently the second time."""
    return (point.key, point.step, repr(point.value)), (point.key, point.step, "")


def with_ids(text: str, ids: Mapping[str, str]) -> str:
    """Put MLflow's ids in place of the runs' own names, where they are known."""
    return NAME.sub(lambda found: ids.get(found[0], found[0]), text)


def refused(error: Exception) -> bool:
    """Whether the same operation would meet the same error again, whenever it is done."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    certain = (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, ImportError)
    return isinstance(error, certain) and not isinstance(error, json.JSONDecodeError)
