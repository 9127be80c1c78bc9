"""What is stopped, cut off or crowded out, on real servers: signals, kills and the concurrency limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import Clone, make_clone, prefect, recorded
from mlflow.tracking import MlflowClient

from mim_core import checkpoint
from mim_core.files import read_curve

# They hold seconds to a promise, which a machine busy with other tests cannot keep.
pytestmark = [pytest.mark.orchestration, pytest.mark.slow]
PRETRAIN = (sys.executable, "-m", "flows.pretrain", "simmim_vit")
DOWNSTREAM = (sys.executable, "-m", "flows.downstream", "scratch_2000")
AGAIN = "interrupted; the same command goes on from the last checkpoint"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone with both servers up, a pack, and runs long enough to be stopped, with no checkpoints between."""
    there = make_clone(tmp_path_factory.mktemp("lab") / "clone")
    there.edit("params/pretrain.yaml", ("epochs: 8", "epochs: 200"), ("checkpoint_minutes: 0.0001", ""))
    there.edit("params/downstream.yaml", ("epochs: 2", "epochs: 100"))
    try:
        there.unmask("up")
        there.unmask("data", "restore")
        there.dvc("repro", "prepare@scenes")
        yield there
    finally:
        there.unmask("down")


def until(true: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return found


def jobs(lab: Clone, stage: str) -> list[Path]:
    """The folders of a stage's jobs that train."""
    found = (lab.folder / ".unmask" / "jobs").glob(f"{stage}-*/*/curve.jsonl")
    return sorted(path.parent for path in found if read_curve(path))


def started(lab: Clone, command: tuple[str, ...], stage: str, count: int = 1) -> subprocess.Popen[str]:
    """Start a stage and wait until its jobs train further than before."""
    before = {folder: len(read_curve(folder / "curve.jsonl")) for folder in jobs(lab, stage)}

    def further() -> bool:
        now = {folder: len(read_curve(folder / "curve.jsonl")) for folder in jobs(lab, stage)}
        return len([1 for folder, lines in now.items() if lines > before.get(folder, 0) + 1]) >= count

    process = lab.start(*command)
    until(further, process)
    return process


def flow_runs(lab: Clone, name: str) -> list[dict[str, Any]]:
    """The flow runs of a name, the newest first."""
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_DESC"}
    return list(prefect(lab, "/flow_runs/filter", body))


def limit(lab: Clone) -> dict[str, Any]:
    return dict(next(one for one in prefect(lab, "/v2/concurrency_limits/filter", {}) if one["name"] == "gpu"))


def tasks(lab: Clone, run: dict[str, Any]) -> set[str]:
    """The states of a flow run's tasks."""
    found = prefect(lab, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    return {task["state"]["type"] for task in found}


def mlflow_status(lab: Clone, folder: Path) -> list[str]:
    """Statuses in MLflow of a job's run and of its parent's."""
    client = MlflowClient(f"http://127.0.0.1:{lab.environment['UNMASK_MLFLOW_PORT']}")
    return [client.get_run(recorded(lab, one)).info.status for one in (folder, folder.parent)]


def saved(folder: Path) -> int:
    """The step of a job's newest checkpoint."""
    found = checkpoint.latest(folder / "checkpoints")
    return int(checkpoint.load(found)[0]["step"]) if found else 0


def stop(lab: Clone, process: subprocess.Popen[str], number: int, stage: str) -> None:
    """Send a signal and check what holds for any stage that is interrupted while its jobs train."""
    folders = jobs(lab, stage)
    process.send_signal(number)
    sent = time.time()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert AGAIN in output
    assert "Traceback" not in output
    for folder in folders:
        newest = max(one.stat().st_mtime for one in (folder / "checkpoints").iterdir())
        assert newest < sent + 5
        assert saved(folder) >= read_curve(folder / "curve.jsonl")[-1]["step"]
        assert mlflow_status(lab, folder) == ["KILLED", "KILLED"]


def test_a_signal_to_a_pretraining_leaves_a_checkpoint_and_records_that_say_so(lab: Clone) -> None:
    process = started(lab, PRETRAIN, "pretrain")
    assert limit(lab)["active_slots"] == limit(lab)["limit"], "it uses all of the machine"
    stop(lab, process, signal.SIGTERM, "pretrain")
    run = flow_runs(lab, "pretrain simmim_vit")[0]
    assert run["state"]["type"] == "CRASHED"
    assert tasks(lab, run) == {"CRASHED"}
    assert limit(lab)["active_slots"] == 0
    assert not list((lab.folder / ".unmask" / "processes").iterdir())


def test_a_signal_to_a_fine_tuning_stops_all_its_jobs(lab: Clone) -> None:
    count = min(2, limit(lab)["limit"])
    process = started(lab, DOWNSTREAM, "downstream", count)
    assert limit(lab)["active_slots"] == count
    assert len(jobs(lab, "downstream")) == count
    stop(lab, process, signal.SIGINT, "downstream")
    assert flow_runs(lab, "downstream scratch_2000")[0]["state"]["type"] == "CRASHED"
    assert limit(lab)["active_slots"] == 0


@pytest.mark.slow
def test_a_worker_that_is_stopped_by_hand_ends_its_stage_in_the_same_way(lab: Clone) -> None:
    process = started(lab, PRETRAIN, "pretrain")
    (folder,) = jobs(lab, "pretrain")
    before = saved(folder)
    os.kill(int((folder / "worker.pid").read_text()), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert AGAIN in output
    assert before < saved(folder)
    assert mlflow_status(lab, folder) == ["KILLED", "KILLED"]


def test_a_stage_waits_for_the_machine_and_can_be_interrupted_while_it_waits(lab: Clone) -> None:
    held = {"names": ["gpu"], "slots": limit(lab)["limit"], "lease_duration": 60}
    lease = prefect(lab, "/v2/concurrency_limits/increment-with-lease", held)["lease_id"]
    (folder,) = jobs(lab, "pretrain")
    (folder / "worker.pid").unlink()
    process = lab.start(*PRETRAIN)
    until(lambda: tasks(lab, flow_runs(lab, "pretrain simmim_vit")[0]) == {"RUNNING"}, process)
    time.sleep(2)
    assert not (folder / "worker.pid").exists(), "the job has begun"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143, output
    body = json.dumps({"lease_id": lease}).encode()
    answers = f"http://127.0.0.1:{lab.environment['UNMASK_PREFECT_PORT']}/api/v2/concurrency_limits"
    asked = urllib.request.Request(f"{answers}/decrement-with-lease", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(asked, timeout=30).close()
    assert limit(lab)["active_slots"] == 0


@pytest.mark.slow
def test_without_the_limit_nothing_begins_and_up_creates_it(lab: Clone) -> None:
    before = limit(lab)
    port = lab.environment["UNMASK_PREFECT_PORT"]
    address = f"http://127.0.0.1:{port}/api/v2/concurrency_limits/{before['id']}"
    urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=30).close()
    output = lab.run(*PRETRAIN, fails=True)
    assert "has no concurrency limit 'gpu'; run `unmask up`" in output
    assert "Traceback" not in output
    lab.unmask("up")
    assert limit(lab)["limit"] == before["limit"]


def test_what_was_killed_is_marked_and_blocks_nobody(lab: Clone) -> None:
    process = started(lab, PRETRAIN, "pretrain")
    (folder,) = jobs(lab, "pretrain")
    run = flow_runs(lab, "pretrain simmim_vit")[0]
    processes = lab.folder / ".unmask" / "processes"
    other, retried = processes / "other.json", processes / "retried.json"
    dead = subprocess.Popen(["true"])
    dead.wait()
    of = {"pid": dead.pid, "started": 1.0, "flow_run": run["id"]}
    retried.write_text(json.dumps({**of, "host": socket.gethostname()}))
    lab.unmask("up")
    assert flow_runs(lab, "pretrain simmim_vit")[0]["state"]["type"] == "RUNNING", "a retry of it runs"
    assert not retried.exists()

    process.kill()
    process.communicate(timeout=60)
    assert flow_runs(lab, "pretrain simmim_vit")[0]["state"]["type"] == "RUNNING"
    assert mlflow_status(lab, folder) == ["RUNNING", "RUNNING"]
    assert limit(lab)["active_slots"] == limit(lab)["limit"]
    other.write_text(json.dumps({**of, "host": "elsewhere", "flow_run": str(uuid4())}))
    lab.run(sys.executable, "-m", "flows.prepare", "scenes")
    state = flow_runs(lab, "pretrain simmim_vit")[0]["state"]
    assert (state["type"], "process was killed" in state["message"]) == ("CRASHED", True)
    assert tasks(lab, run) == {"CRASHED"}
    lab.unmask("sync")  # as the next record does
    assert mlflow_status(lab, folder) == ["KILLED", "KILLED"]
    assert limit(lab)["active_slots"] == 0
    assert list(processes.iterdir()) == [other], "it may be alive on its own machine"
    # The worker's checkpoint, written as its parent was gone.
    until(lambda: saved(folder) >= read_curve(folder / "curve.jsonl")[-1]["step"], seconds=5)


@pytest.mark.slow
def test_a_killed_holder_on_another_machine_blocks_for_a_minute(lab: Clone) -> None:
    held = {"names": ["gpu"], "slots": limit(lab)["limit"], "lease_duration": 60}
    prefect(lab, "/v2/concurrency_limits/increment-with-lease", held)
    begun = time.monotonic()
    until(lambda: limit(lab)["active_slots"] == 0, seconds=75)
    assert time.monotonic() - begun > 50
