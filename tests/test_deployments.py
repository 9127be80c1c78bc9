"""The deployments of prefect.yaml, on a real server with a real worker of its pool."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Clone, make_clone, prefect, recorded
from mlflow.tracking import MlflowClient

from mim_core import checkpoint
from mim_core.files import read_curve

pytestmark = [pytest.mark.orchestration, pytest.mark.slow]
NAMES = {"pretrain", "downstream", "ablate", "search", "nightly"}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone with both servers up, a pack, all deployments, and a worker that runs them."""
    there = make_clone(tmp_path_factory.mktemp("deployed") / "clone")
    shutil.copyfile(ROOT / "prefect.yaml", there.folder / "prefect.yaml")
    there.edit("params/pretrain.yaml", ("epochs: 8", "epochs: 60"), ("checkpoint_minutes: 0.0001", ""))
    worker = None
    try:
        there.unmask("up")
        there.unmask("data", "restore")
        there.dvc("repro", "prepare@scenes")
        there.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{there.environment['UNMASK_PREFECT_PORT']}/api"
        there.run(sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all")
        worker = there.start(sys.executable, "-m", "prefect", "worker", "start", "-p", "unmask")
        yield there
    finally:
        if worker:
            worker.terminate()
            worker.communicate(timeout=60)
        there.unmask("down")


def read(deployed: Clone, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{deployed.environment['PREFECT_API_URL']}{path}", timeout=30) as answer:
        return dict(json.load(answer))


def state(deployed: Clone, run: str) -> str:
    return str(read(deployed, f"/flow_runs/{run}")["state"]["type"])


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def submit(deployed: Clone, name: str, **parameters: str) -> str:
    deployment = read(deployed, f"/deployments/name/{name}/{name}")
    path = f"/deployments/{deployment['id']}/create_flow_run"
    return str(prefect(deployed, path, {"parameters": parameters})["id"])


def steps(deployed: Clone) -> int:
    """Reports of the pretraining's curve."""
    return sum(
        len(read_curve(path))
        for path in (deployed.folder / ".unmask" / "jobs").glob("pretrain-simmim_vit-*/seed_0/curve.jsonl")
    )


def cancel_in_training(deployed: Clone, run: str) -> Path:
    """Cancel a run as the page's button does, and check that the pretraining in it has a checkpoint; its folder."""
    until(lambda: steps(deployed) > 2)
    prefect(deployed, f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until(lambda: state(deployed, run) not in ("CANCELLING", "RUNNING"), 60)
    assert state(deployed, run) == "CANCELLED"
    (folder,) = (deployed.folder / ".unmask" / "jobs").glob("pretrain-simmim_vit-*")
    found = checkpoint.latest(folder / "seed_0" / "checkpoints")
    assert found
    assert checkpoint.load(found)[0]["step"] >= read_curve(folder / "seed_0" / "curve.jsonl")[-1]["step"]
    return folder


def test_every_deployment_is_there_and_none_is_scheduled(deployed: Clone) -> None:
    there = {name: read(deployed, f"/deployments/name/{name}/{name}") for name in NAMES}
    assert all(one["work_pool_name"] == "unmask" for one in there.values())
    assert {name: list(one["parameter_openapi_schema"]["properties"]) for name, one in there.items()} == {
        "pretrain": ["row"], "downstream": ["row"], "ablate": ["name"], "search": ["name"], "nightly": [],
    }  # fmt: skip
    schedules = {name: [one["active"] for one in said["schedules"]] for name, said in there.items()}
    assert schedules == {name: [False] if name == "nightly" else [] for name in NAMES}


def test_default_rows_exist_and_no_path_of_a_machine_is_committed() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    for said in yaml.safe_load(text)["deployments"]:
        for row in said.get("parameters", {}).values():
            assert any(f"\n  {row}:" in file.read_text() for file in (ROOT / "params").glob("*.yaml")), row
    assert str(Path.home()) not in text
    assert "directory: .\n" in text


def test_a_cancelled_pretraining_has_a_checkpoint_and_a_retry_goes_on_from_it(deployed: Clone) -> None:
    run = submit(deployed, "pretrain", row="simmim_vit")
    folder = cancel_in_training(deployed, run)
    client = MlflowClient(f"http://127.0.0.1:{deployed.environment['UNMASK_MLFLOW_PORT']}")
    parent = recorded(deployed, folder)
    assert client.get_run(parent).info.status == "KILLED"

    # As the page's button does.
    retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    prefect(deployed, f"/flow_runs/{run}/set_state", retry)
    until(lambda: state(deployed, run) in ("COMPLETED", "FAILED", "CRASHED"), 240)
    assert state(deployed, run) == "COMPLETED"
    published = deployed.folder / "runs" / "pretrain" / "simmim_vit"
    manifest = json.loads((published / "manifest.json").read_text())
    assert (manifest["prefect_flow_run_id"], manifest["mlflow_run_id"]) == (run, parent)
    assert client.get_run(parent).info.status == "FINISHED"
    lines = (published / "curve.csv").read_text().splitlines()
    seen = [int(line.split(",")[0]) for line in lines[1:]]
    assert seen == sorted(set(seen)), "the curve goes on from the checkpoint"
    limits = prefect(deployed, "/v2/concurrency_limits/filter", {})
    assert [one["active_slots"] for one in limits if one["name"] == "gpu"] == [0]


@pytest.mark.slow
def test_a_night_reproduces_and_a_cancelled_one_leaves_a_checkpoint(deployed: Clone) -> None:
    stage = "stages:\n  one:\n    cmd: "
    (deployed.folder / "dvc.yaml").write_text(f"{stage}python -m flows.pretrain simmim_vit\n")
    cancel_in_training(deployed, submit(deployed, "nightly"))
    (deployed.folder / "dvc.yaml").write_text(f"{stage}echo reproduced\n")
    run = submit(deployed, "nightly")
    until(lambda: state(deployed, run) in ("COMPLETED", "FAILED", "CRASHED"))
    assert state(deployed, run) == "COMPLETED"

    def logged() -> bool:
        found = prefect(deployed, "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
        return "reproduced" in [line["message"] for line in found]

    until(logged, 20)  # they are sent from time to time
