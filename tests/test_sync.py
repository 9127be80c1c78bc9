"""The record outlives its server: what MLflow does not take is kept, and sent once and only once; nothing waits for it.

A real server stands behind a gate that can make it slow, failing or dead.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Clone, Tried, free_port
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from flows import sender, spool, sync, tracking, workspace
from flows.tracking import Record
from flows.workers import wait_until

pytestmark = [
    pytest.mark.orchestration,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
DATA = {"name": "scenes", "md5": "0" * 32}


class Server:
    """MLflow's server, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    def start(self, most_bytes: int = resource.RLIM_INFINITY) -> None:
        """Start it; with `most_bytes` no file of its may grow beyond, as on a disk that is full."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        limit = (most_bytes, resource.RLIM_INFINITY)
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            )  # fmt: skip
        if not wait_until(self._answers, 300):
            self.kill()
            raise AssertionError((self.folder / "log").read_text())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Gate:
    """Passes requests on, after `delay` seconds; answers `failing` of them with 500 instead where it is set."""

    def __init__(self, port: int) -> None:
        gate = self
        self.delay, self.failing = 0.0, False

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(gate.delay)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
                kind = {"Content-Type": self.headers.get("Content-Type", "application/json")}
                asked = urllib.request.Request(f"http://127.0.0.1:{port}{self.path}", body, kind, method=self.command)
                try:
                    if gate.failing:
                        status, said = 500, b"{}"
                    else:
                        with urllib.request.urlopen(asked, timeout=60) as answer:
                            status, said = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, said = error.code, error.read()
                except OSError:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    there = Server(tmp_path_factory.mktemp("mlflow"))
    yield there
    there.kill()


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    there = Gate(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there.address)
    yield there
    there.server.shutdown()
    there.server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMASK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(spool, "AGAIN_SECONDS", 0.3)
    return tmp_path / "home"


def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note requests that the main thread makes."""
    real = requests.Session.request

    def request(session: requests.Session, method: str, url: str, **given: Any) -> requests.Response:
        if threading.current_thread() is threading.main_thread():
            ASKED.append(url)
        return real(session, method, url, **given)

    monkeypatch.setattr(requests.Session, "request", request)


ASKED: list[str] = []


def beside(act: Callable[[], None]) -> None:
    """Do what a running stage does, and check that it asks MLflow nothing itself, however long an answer takes."""
    ASKED.clear()
    act()
    assert not ASKED


def lines(first: int, last: int) -> list[dict[str, float]]:
    return [{"step": step, "time": 1e9 + step, "loss": 1 / step} for step in range(first, last)]


class Told:
    """What a stage says of a point and at its end, in parts between which its server may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        self.record = Record("pretrain", "row", self.folder, DATA, {"optim": {"lr": 0.1}}, watch=False)
        row = {"seed": 0, "mask": {"ratio": 0.5}}
        self.curve = self.record.point("job", self.folder / "seed_0", {"seed": 0}, row, {"trial": "3"})

    def train(self, first: int, last: int) -> None:
        self.curve.add(lines(first, last))
        self.curve.flush()

    def finish(self) -> None:
        self.curve.finish({"steps": 30, "validation_score": 0.5})
        self.record.metrics(self.record.parent, {"score": 0.5})
        picture = self.folder / "picture.txt"
        picture.write_text("as it was")
        self.record.file(self.record.parent, picture)
        picture.write_text("later")
        manifest = self.folder / "manifest.json"
        manifest.write_text(json.dumps({"mlflow_run_id": self.record.parent}))
        self.record.file(self.record.parent, manifest)
        self.record.tag(self.record.parent, "state", "complete")

    def whole(self) -> None:
        beside(self.begin)
        for start in (1, 11, 21):
            beside(lambda start=start: self.train(start, start + 10))
        beside(self.finish)
        self.record.end(self.record.parent)


def check(address: str, run: Told) -> tuple[Run, Run]:
    """Check that MLflow has all of it once; gives the parent run and the job's."""
    client = MlflowClient(address)
    (experiment,) = client.search_experiments(filter_string=f"name = '{sender.EXPERIMENT}'")
    name = run.record.parent
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`unmask.id` = '{name}'")
    (job,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [one.info.status for one in (parent, job)] == ["FINISHED", "FINISHED"]
    assert (job.data.tags["trial"], parent.data.tags["state"]) == ("3", "complete")
    assert (parent.data.params, job.data.params) == ({"optim.lr": "0.1"}, {"seed": "0"})
    assert next(iter(job.data.metrics)) == "validation_score"
    history = {key: client.get_metric_history(job.info.run_id, key) for key in job.data.metrics}
    assert history.keys() == {"loss", "steps", "validation_score"}
    assert len(history["steps"]) == 1
    assert Counter(point.step for point in history["loss"]) == Counter(range(1, 31))
    assert [point.step for point in history["validation_score"]] == [0, 30], "nan so far, and the score"
    assert len(client.get_metric_history(parent.info.run_id, "score")) == 1
    assert Path(client.download_artifacts(parent.info.run_id, "picture.txt")).read_text() == "as it was"
    said = json.loads(Path(client.download_artifacts(parent.info.run_id, "manifest.json")).read_text())
    assert said["mlflow_run_id"] == parent.info.run_id
    assert not list(spool.folder().iterdir())
    return parent, job


KILLS = """
import os, signal
from mlflow.tracking import MlflowClient
from flows import spool, sync

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(before):
    pid = os.fork()
    if not pid:
        before()
        sync.sync()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def in_create():
    real = MlflowClient.create_run
    MlflowClient.create_run = lambda *given: (real(*given), die())  # the run is there, and nobody knows its id

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

print(*[child(before) for before in (in_create, after(1), after(2), after(3), after(2), after(3))])
"""


@pytest.mark.reliability
def test_what_a_dead_server_missed_is_sent_once_whenever_sync_is_killed(
    server: Server,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tried: Tried,
) -> None:
    gone = dead(monkeypatch)
    run = Told(tmp_path / "job")
    run.whole()
    said = capfd.readouterr().err
    assert said.count("does not answer") == said.count("unmask sync` sends it") == 1
    assert run.record.known(run.record.parent) == run.record.parent, "it has no other name"
    with pytest.raises(workspace.UserError, match=f"{gone} does not answer.*\n.*pretrain-row .13 operations"):
        sync.sync()
    database = f"sqlite:///{server.database}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLS], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.stdout.splitlines()[-1] == " ".join(["-9"] * 6), done.stdout + done.stderr
    capfd.readouterr()
    sync.sync()
    assert "pretrain-row: sent" in capfd.readouterr().out
    check(f"http://127.0.0.1:{server.port}", run)
    sync.sync()
    assert "MLflow has the whole record" in capfd.readouterr().out
    tried("MLflow dead from the start, `unmask sync` killed", 6, "the whole record, each point once")


@pytest.mark.reliability
def test_a_server_killed_in_the_middle_gets_the_rest_when_it_is_back(
    server: Server, gate: Gate, tmp_path: Path, capfd: pytest.CaptureFixture[str], tried: Tried
) -> None:
    run = Told(tmp_path / "job")
    beside(run.begin)
    beside(lambda: run.train(1, 11))
    known = run.record.known(run.record.parent)
    assert len(known) == 32
    server.kill()
    beside(lambda: run.train(11, 21))
    assert wait_until(lambda: bool(run.record.spool.fault), 60)
    assert run.record.known([run.record.parent]) == [known]
    server.start()
    beside(lambda: run.train(21, 31))
    beside(run.finish)
    assert wait_until(lambda: run.record.spool.idle, 60)
    run.record.end(run.record.parent)
    assert "does not answer" in capfd.readouterr().err
    assert check(gate.address, run)[0].info.run_id == known
    tried("MLflow killed during a training", 1, "the whole record, each point once")


@pytest.mark.reliability
def test_what_fails_with_500_is_tried_again_and_said_once(
    gate: Gate, tmp_path: Path, capfd: pytest.CaptureFixture[str], tried: Tried
) -> None:
    gate.failing = True
    run = Told(tmp_path / "job")
    beside(run.begin)
    for step in range(1, 31):
        beside(lambda step=step: run.train(step, step + 1))
    begun = time.monotonic()
    assert run.record.known(run.record.parent) == run.record.parent
    assert time.monotonic() - begun < 20, "a server that fails is not waited for"
    gate.failing = False
    run.finish()
    assert wait_until(lambda: run.record.spool.idle, 60)
    run.record.end(run.record.parent)
    assert capfd.readouterr().err.count("does not answer") == 1
    check(gate.address, run)
    tried("MLflow answering 500", 1, "the whole record, each point once")


@pytest.mark.reliability
def test_a_slow_server_gives_its_ids_in_time_and_gets_the_rest_by_the_next_run(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    gate.delay = 5.0
    run = Told(tmp_path / "job")
    beside(run.begin)
    for step in range(1, 31):
        beside(lambda step=step: run.train(step, step + 1))
    ids = run.record.known([run.record.parent, run.curve.run])
    assert [len(one) for one in ids] == [32, 32]
    run.finish()
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "END_SECONDS", 1.0)
        run.record.end(run.record.parent)
    assert spool.left(), "it answers too slowly to be waited for"
    gate.delay = 0.0
    assert wait_until(lambda: not run.record.spool.thread.is_alive(), 30)
    after = Record("report", "all", tmp_path / "report", DATA, {"a": 1}, watch=False)
    assert wait_until(lambda: len(spool.left()) == 1, 60)
    after.end(after.parent)
    parent, job = check(gate.address, run)
    assert [parent.info.run_id, job.info.run_id] == ids
    tried("MLflow answering after 5 s", 1, "training does not wait; the whole record by the next run")


@pytest.mark.reliability
def test_a_database_on_a_full_disk_takes_the_rest_when_there_is_room(
    server: Server, gate: Gate, tmp_path: Path, tried: Tried
) -> None:
    server.kill()
    server.start(most_bytes=server.database.stat().st_size)
    run = Told(tmp_path / "job")
    beside(run.begin)
    for step in range(1, 31):
        beside(lambda step=step: run.train(step, step + 1))
    for place in range(1000):  # what fits into pages that are there is taken
        run.record.tag(run.record.parent, f"filling {place}", "x" * 4000)
        wait_until(lambda: run.record.spool.idle or bool(run.record.spool.fault), 60)
        if run.record.spool.fault:
            break
    assert run.record.spool.fault
    run.finish()
    server.kill()
    server.start()
    assert wait_until(lambda: run.record.spool.idle, 60)
    run.record.end(run.record.parent)
    check(gate.address, run)
    tried("MLflow's database on a full disk", 1, "the whole record when there is room")


FIRST = """
import os, signal, sys
from pathlib import Path
from flows.tracking import Record
from flows.workers import wait_until

folder = Path(sys.argv[1])
record = Record("pretrain", "row", folder, {"name": "scenes", "md5": "0" * 32}, {"optim": {"lr": 0.1}}, watch=False)
curve = record.point("job", folder / "seed_0", {"seed": 0}, {"seed": 0}, {"trial": "3"})
curve.add([{"step": step, "time": step, "loss": 1 / step} for step in range(1, 11)])
curve.flush()
assert wait_until(lambda: record.spool.idle, 60)
curve.add([{"step": step, "time": step, "loss": 1 / step} for step in range(11, 16)])
curve.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_a_run_that_the_next_goes_on_with(
    server: Server, gate: Gate, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "job"
    command = [sys.executable, "-c", FIRST, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    assert len(spool.left()) == 1
    run = Told(folder)
    run.whole()  # its curve is told from the start again
    check(gate.address, run)
    # One that nobody goes on with is over.
    subprocess.run([*command[:-1], str(tmp_path / "other")], cwd=ROOT, env=environment)
    sync.sync()
    assert "pretrain-row: sent" in capfd.readouterr().out
    name = json.loads((tmp_path / "other" / "mlflow.json").read_text())["run"]
    client = MlflowClient(gate.address)
    (parent,) = client.search_runs(["1"], f"tags.`unmask.id` = '{name}'")
    (job,) = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert (parent.info.status, job.info.status) == ("KILLED", "KILLED")
    assert len(client.get_metric_history(job.info.run_id, "loss")) == 15


STAGES = """\
stages:
  one: {cmd: cp one.json runs/pretrain/one/manifest.json, deps: [one.json], outs: [runs/pretrain/one/manifest.json]}
  two: {cmd: cp two.json runs/pretrain/two/manifest.json, deps: [two.json], outs: [runs/pretrain/two/manifest.json]}
"""


def test_sync_puts_ids_into_what_was_published_and_dvc_does_not_run_it_again(
    clone: Clone, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_HOME", str(clone.folder / ".unmask"))
    clone.environment["MLFLOW_TRACKING_URI"] = dead(monkeypatch)
    record = Record("pretrain", "one", clone.folder / "job", DATA, {"a": 1}, watch=False)
    record.end(record.parent)
    (clone.folder / "dvc.yaml").write_text(STAGES)
    for name in ("one", "two"):
        manifest = {"mlflow_run_id": record.known(record.parent), "row": name}
        (clone.folder / f"{name}.json").write_text(json.dumps(manifest))
        (clone.folder / "runs" / "pretrain" / name).mkdir(parents=True)
    clone.dvc("repro", "one", "two")
    (clone.folder / "two.json").write_text("{}")
    assert "does not answer" in clone.unmask("sync", fails=True)
    clone.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.port}"
    said = clone.unmask("sync")
    assert "sent 1 runs" in said
    client = MlflowClient(clone.environment["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs(["1"], f"tags.`unmask.id` = '{record.parent}'")
    for name in ("one", "two"):
        found = json.loads((clone.folder / "runs" / "pretrain" / name / "manifest.json").read_text())
        assert found == {"mlflow_run_id": run.info.run_id, "row": name}
    status = clone.dvc("status", "one", "two")
    assert "two.json" in status, "what was stale before is stale"
    assert "one.json" not in status
    assert "runs/pretrain/one" not in status
    assert "didn't change" in clone.dvc("repro", "one")
    assert run.info.run_id in (clone.folder / "runs" / "pretrain" / "one" / "manifest.json").read_text()
