"""Time the same small training while MLflow's server is healthy, slow, failing or dead, beside no record at all.

    python benchmarks/record.py simmim_vit

Each round trains with each, and next to it without a record, first or second in turns, in one warm worker that has all
cores; the record is the product's own, with its curve and the machine's metrics. A job waits for no record: it writes
its curve to a file, which the stage's process reads. So a record slows it by what it takes of the same cores, and no
more: `taken` is the CPU-seconds that the stage's process used during the job (the slow and the failing server, which
run in it, among them), less those without a record, and `server` those of MLflow's server likewise, both as shares of
the job's own. `clock` is the time of the job by the clock over that without a record, as a check: it is as good as the
machine is quiet, and stays in the JSON. `end` is what the stage then waits for: until it knows MLflow's id, and until
it has closed the record. Needs the pack of the row's dataset (`dvc repro prepare@scenes`) and an idle machine. Writes
benchmarks/record.json and the table benchmarks/record.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from machine import cpu_of, described, table

from flows import rows, workspace
from flows.workers import Workers, wait_until
from mim_core.cores import cores

SLOW_SECONDS = 5.0
Pair = tuple[dict[str, float], dict[str, float]]
"""What a training took with a record and, next to it, without."""


def main() -> None:
    """Train with each beside no record, and write the table after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--epochs", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    found = rows.find(rows.load(), ("pretrain",), given.row)
    row = {**found, "optim": {**found["optim"], "epochs": given.epochs}}
    taken: dict[str, list[Pair]] = {}
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as (healthy, pid):
        os.environ["UNMASK_HOME"] = home
        with gate(healthy, SLOW_SECONDS) as slow, gate(None, 0.0) as failing:
            ways = {"healthy": healthy, "slow": slow, "500": failing, "dead": "http://127.0.0.1:9"}
            workers = Workers(1, cores(), "benchmark", [])
            try:
                train(workers, row, healthy, 0, pid)  # what is imported at first use is no part of the rounds
                for turn in range(given.rounds):
                    for index, (way, address) in enumerate(ways.items()):
                        order = ("", address) if (turn + index) % 2 else (address, "")
                        pair = {bool(one): train(workers, row, one, turn, pid) for one in order}
                        taken.setdefault(way, []).append((pair[True], pair[False]))
                        for with_record, said in pair.items():
                            told = ", ".join(f"{key} {value:.2f} s" for key, value in said.items())
                            print(f"round {turn + 1}: {way if with_record else 'no record':10} {told}", flush=True)
                    write(given, taken)
            finally:
                workers.stop()


def write(given: argparse.Namespace, taken: dict[str, list[Pair]]) -> None:
    """Write what the rounds gave so far, and print the table."""
    shares = {
        way: [
            {
                "taken": (one["stage"] - alone["stage"]) / one["job"],
                "server": (one["server"] - alone["server"]) / one["job"],
                "clock": one["training"] / alone["training"],
                "end": one["end"],
            }
            for one, alone in pairs
        ]
        for way, pairs in taken.items()
    }
    about = {"row": given.row, "epochs": given.epochs, "machine": described(torch.device("cpu"))}
    path = Path(__file__).with_suffix(".json")
    workspace.write_json(path, {**about, "seconds": taken, "shares": shares})
    head = ["MLflow's server", "taken by the record", "by the server", "wait at the end"]
    lines = []
    for way, rounds in shares.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        most = max(one["taken"] for one in rounds)
        taken_by_it = f"{middle['taken']:.2%} (at most {most:.2%})"
        lines.append([way, taken_by_it, f"{max(0, middle['server']):.1%}", f"{middle['end']:.0f} s"])
    path.with_suffix(".md").write_text(table(head, lines))
    print(table(head, lines))


def train(workers: Workers, row: dict[str, Any], address: str, turn: int, server: int) -> dict[str, float]:
    """Train from nothing as a stage does, with MLflow at an address, or without a record."""
    from flows.tracking import Record

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        record, curve = None, None
        begun, before = time.perf_counter(), cpu(workers, server)
        if address:
            os.environ["MLFLOW_TRACKING_URI"] = address
            data = {"name": row["data"], "md5": "0" * 32}
            record = Record("benchmark", f"round_{turn}", folder, data, row)
            curve = record.child("job", folder / "job", row)
        pack = str(workspace.pack_folder(row["data"]))
        job = {"kind": "pretrain", "row": row, "pack": pack, "folder": str(folder / "job"), "seed": 0, "fitted": None}
        result = workers.run(job, curve.add if curve else lambda lines: None)
        trained, after = time.perf_counter(), cpu(workers, server)
        if record and curve:
            curve.finish(result)
            record.known(record.parent)
            record.end(record.parent)
        ended = time.perf_counter()
        if record:
            record.spool.thread.join()
            shutil.rmtree(workspace.home() / "spool", ignore_errors=True)  # or the next record would send it
        used = {who: after[who] - before[who] for who in after}
        return {**used, "training": trained - begun, "end": ended - trained}


def cpu(workers: Workers, server: int) -> dict[str, float]:
    """CPU-seconds so far: the workers', which do the jobs, this process's and those of MLflow's server."""
    jobs = sum(cpu_of(worker.process.pid) for worker in workers.all)
    return {"job": jobs, "stage": time.process_time(), "server": cpu_of(server)}


@contextmanager
def server(home: Path) -> Iterator[tuple[str, int]]:
    """MLflow's server: its address and process id."""
    (home / "mlflow").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as probe:
        port = probe.server_port
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
        return False

    try:
        if not wait_until(answers, 180):
            sys.exit(f"MLflow's server did not start: {(home / 'log').read_text()}")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def gate(address: str | None, delay: float) -> Iterator[str]:
    """Pass requests on to a server after a delay, or answer 500."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            status, said = 500, b"{}"
            if address:
                kind = {"Content-Type": "application/json"}
                asked = urllib.request.Request(f"{address}{self.path}", body, kind, method=self.command)
                try:
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        status, said = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, said = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as passing:
        threading.Thread(target=passing.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{passing.server_port}"
        passing.shutdown()


if __name__ == "__main__":
    main()
