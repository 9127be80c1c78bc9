"""The record in MLflow outlives its server: dead, killed, slow or failing; what is kept is sent once and only once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from flows import spool, workspace
from flows.tracking import Record

DATA = {"name": "scenes", "md5": "abc"}
KILLS = """
import os, signal, sys
from mlflow.tracking import MlflowClient
from flows import spool
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def child(before):
    pid = os.fork()
    if not pid:
        before()
        spool.sync()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def in_open():
    MlflowClient.set_tag = lambda *_: die()  # the run is created, nothing else is done

def after(count):
    note = spool.write_atomically
    def counted(path, text):
        nonlocal count
        count -= 1
        if not count:
            die()  # the operation is done and not noted
        note(path, text)
    def begin():
        spool.write_atomically = counted
    return begin

print(*[child(before) for before in (in_open, after(1), after(2), after(4), after(2), after(3))])
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def use(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@contextmanager
def told(*words: str) -> Iterator[None]:
    """Check that what is warned of is this, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    said = [str(one.message) for one in caught if one.category is UserWarning]
    assert [word in line for word, line in zip(words, said, strict=True)] == [True] * len(words), said


def dead() -> str:
    return f"http://127.0.0.1:{free_port()}"


def begin(folder: Path) -> Record:
    return Record("pretrain", "row", folder, DATA, {"optim": {"lr": 0.1}}, watch=False)


def lines(first: int, last: int) -> list[dict[str, float]]:
    return [{"step": step, "time": 1e9 + step, "loss": 1 / step} for step in range(first, last)]


def rest(record: Record, folder: Path) -> None:
    """What a stage records of a job and at its end."""
    curve = record.child("job", folder / "seed_0", {"seed": 0}, {"trial": "3"})
    for start in (1, 11, 21):
        curve.add(lines(start, start + 10))
        curve.flush()
    curve.finish({"steps": 30, "score": 0.5})
    record.metrics(record.parent, {"score": 0.5})
    picture = folder / "picture.txt"
    picture.write_text("as it was")
    record.file(record.parent, picture)
    picture.write_text("later")
    record.tag(record.parent, "state", "complete")
    record.end(record.parent)


def check(address: str, folder: Path) -> tuple[Run, Run]:
    """Check that MLflow has all of it once; gives the parent run and the job's."""
    client = MlflowClient(address)
    runs = client.search_runs([client.get_experiment_by_name(spool.EXPERIMENT).experiment_id])
    assert len(runs) == 2
    job, parent = sorted(runs, key=lambda run: run.info.run_name)
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert job.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (job.data.tags["trial"], parent.data.tags["state"]) == ("3", "complete")
    assert (parent.data.params, job.data.params) == ({"optim.lr": "0.1"}, {"seed": "0"})
    assert json.loads((folder / "mlflow.json").read_text())["run_id"] == parent.info.run_id
    steps = Counter(point.step for point in client.get_metric_history(job.info.run_id, "loss"))
    assert steps == Counter(range(1, 31))
    for run in (job, parent):
        assert len(client.get_metric_history(run.info.run_id, "score")) == 1
    assert Path(client.download_artifacts(parent.info.run_id, "picture.txt")).read_text() == "as it was"
    assert not list(spool.folder().iterdir())
    return parent, job


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_what_a_dead_server_missed_is_sent_once_whenever_sync_is_killed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = use(dead(), monkeypatch)
    begun = time.monotonic()
    with told("does not answer", "unmask sync"):
        record = begin(tmp_path / "job")
        rest(record, tmp_path / "job")
    assert time.monotonic() - begun < 10
    with record.spool.file:  # as its process's end does
        pass
    with pytest.raises(workspace.UserError, match=f"{gone} does not answer.*\n.*pretrain-row .11 operations"):
        spool.sync()
    address = use(f"sqlite:///{home}/mlflow/mlflow.db", monkeypatch)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLS], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.stdout.splitlines()[-1] == " ".join(["-9"] * 6), done.stdout + done.stderr
    capsys.readouterr()
    spool.sync()
    assert "pretrain-row: sent" in capsys.readouterr().out
    check(address, tmp_path / "job")
    spool.sync()
    assert "nothing waits" in capsys.readouterr().out


def serve(port: int, home: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow/mlflow.db"]
    with (home / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except OSError:
            time.sleep(0.2)
    raise AssertionError((home / "log").read_text())


def test_a_server_killed_in_the_middle_gets_the_rest_when_it_is_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "mlflow").mkdir(parents=True)
    port = free_port()
    address = use(f"http://127.0.0.1:{port}", monkeypatch)
    server = serve(port, home)
    try:
        record = begin(tmp_path / "job")
        curve = record.child("job", tmp_path / "job" / "seed_0", {"seed": 0}, {"trial": "3"})
        curve.add(lines(1, 11))
        curve.flush()
        assert not record.spool.path.exists()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        with told("does not answer"):
            curve.add(lines(11, 16))
            curve.flush()
        server = serve(port, home)
        # The same job, gone on with after a kill: what its curve tells again is there or waits.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rest(record, tmp_path / "job")
        if record.spool.file:
            record.spool.close(30)
        check(address, tmp_path / "job")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(params=[0.0, 5.0], ids=["500", "slow"])
def failing(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers 500, at once or after 5 s."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(request.param)
            self.send_error(500)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_fails_or_is_slow_costs_one_answer(
    failing: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(failing, monkeypatch)
    begun = time.monotonic()
    with told("does not answer"):
        record = begin(tmp_path / "job")
        curve = record.child("job", tmp_path / "job" / "seed_0", {"seed": 0}, {"trial": "3"})
    assert time.monotonic() - begun < 7
    begun = time.monotonic()
    for step in range(1, 101):
        curve.add(lines(step, step + 1))
        curve.flush()
    assert time.monotonic() - begun < 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest(record, tmp_path / "job")  # its end waits 5 s at most
    assert time.monotonic() - begun < 8
    kept = [json.loads(line) for line in record.spool.path.read_text().splitlines()]
    assert sum(len(one["points"]) for one in kept if one["op"] == "metrics") == 100 + 30 + 3
