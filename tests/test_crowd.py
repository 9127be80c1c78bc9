"""Four flows at once on one repository, and the same row twice: nothing is lost, and nothing is written by two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Clone, Tried, make_clone
from mlflow.tracking import MlflowClient

from mim_core.files import read_curve

pytestmark = [pytest.mark.orchestration, pytest.mark.slow]
ROWS = ("one", "two", "three", "four")
ROW = """\
  {name}:
    data: scenes
    encoder: {{name: vit, patch_px: 4, width: 32, depth: 1, heads: 2, positions: sincos}}
    mask: {{name: random, ratio: 0.6, unit_px: 4}}
    fill: mask_token
    head: linear
    target: pixels
    loss: l1
    seed: {seed}
    optim: {{lr: 1.0e-3, batch: 32, epochs: {epochs}}}
    checkpoint_minutes: 0.0001
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone with both servers up, a pack, four short rows and a long one."""
    there = make_clone(tmp_path_factory.mktemp("lab") / "clone")
    with (there.folder / "params/pretrain.yaml").open("a") as file:
        for seed, name in enumerate(ROWS):
            file.write(ROW.format(name=name, seed=seed, epochs=2))
        file.write(ROW.format(name="long", seed=0, epochs=4000))
    try:
        there.unmask("up")
        there.unmask("data", "restore")
        there.dvc("repro", "prepare@scenes")
        yield there
    finally:
        there.unmask("down")


def pretrain(lab: Clone, name: str) -> subprocess.Popen[str]:
    return lab.start(sys.executable, "-m", "flows.pretrain", name)


def weights(lab: Clone, name: str) -> bytes:
    return (lab.folder / "runs" / "pretrain" / name / "model.safetensors").read_bytes()


@pytest.mark.reliability
def test_four_flows_at_once_lose_nothing(lab: Clone, tried: Tried) -> None:
    state = lab.folder / ".unmask"
    (state / "rows.json").unlink(missing_ok=True)  # all four check the rows, and keep what they found
    (state / "md5.json").unlink(missing_ok=True)
    before = len((state / "timings.jsonl").read_text().splitlines())
    processes = [pretrain(lab, name) for name in ROWS]
    for process in processes:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
    client = MlflowClient(f"http://127.0.0.1:{lab.environment['UNMASK_MLFLOW_PORT']}")
    for name in ROWS:
        manifest = json.loads((lab.folder / "runs" / "pretrain" / name / "manifest.json").read_text())
        run = client.get_run(manifest["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.metrics["steps"] == manifest["metrics"]["steps"] == 16
        (job,) = client.search_runs([run.info.experiment_id], f"run_name = '{name} seed {ROWS.index(name)}'")
        assert len(client.get_metric_history(job.info.run_id, "loss")) == 16, "every point of the curve"
    times = [json.loads(line) for line in (state / "timings.jsonl").read_text().splitlines()]
    assert sorted(line["stage"] for line in times[before:]) == sorted(f"pretrain {name}" for name in ROWS)
    for name in ("rows.json", "md5.json"):
        json.loads((state / name).read_text())
    assert not list((state / "jobs").iterdir())
    assert not list((state / "processes").glob("*.json"))
    assert not any(lock.read_text() for lock in (state / "locks").iterdir()), "all are let go of"
    # Beside others a run's weights are what they are alone.
    crowded = {name: weights(lab, name) for name in ROWS}
    for name in ("one", "three"):
        lab.run(sys.executable, "-m", "flows.pretrain", name)
        assert weights(lab, name) == crowded[name], name
    tried("four flows at once on one repository", 1, "nothing lost")


@pytest.mark.reliability
def test_a_row_that_runs_is_refused_a_second_time_and_the_first_goes_on(lab: Clone, tried: Tried) -> None:
    first = pretrain(lab, "long")
    try:
        curves = lab.folder / ".unmask" / "jobs"
        steps = seen(first, curves)
        said = lab.run(sys.executable, "-m", "flows.pretrain", "long", fails=True)
        assert f"pretrain long: process {first.pid} on host " in said
        assert "wait for its end, or stop it" in said
        assert "Traceback" not in said
        assert first.poll() is None
        assert seen(first, curves, steps) > steps
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = reports(curves)
    # What the dead one left holds nobody up.
    second = pretrain(lab, "long")
    try:
        assert seen(second, curves, steps) > steps
    finally:
        second.send_signal(signal.SIGTERM)
        output, _ = second.communicate(timeout=60)
    assert "interrupted; the same command goes on" in output
    tried("a row started twice", 1, "the second is refused and told who runs it")


def reports(jobs: Path) -> int:
    return sum(len(read_curve(path)) for path in jobs.glob("pretrain-long-*/*/curve.jsonl"))


def seen(process: subprocess.Popen[str], jobs: Path, more_than: int = 0) -> int:
    """Wait until the long row's job is further than so many reports; gives its reports."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        count = reports(jobs)
        if count > more_than:
            return count
        time.sleep(0.2)
    raise AssertionError("waited in vain")
