"""Time the same small training while MLflow's server is healthy, slow, failing or dead, beside no record at all.

    python benchmarks/record.py simmim_vit --epochs 3 --rounds 4

Each round trains once with each, in turns, in one warm worker that has all cores; the record is the product's own, with
its curve and the machine's metrics. `training` is the time of the job, `end` what the stage then waits for: until it
knows MLflow's id, and until it has closed the record. Needs the pack of the row's dataset (`dvc repro prepare@scenes`)
and an idle machine. Writes benchmarks/record.json.
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
from machine import described

from flows import rows, workspace
from flows.workers import Workers, wait_until
from mim_core.cores import cores

SLOW_SECONDS = 5.0


def main() -> None:
    """Time all in turns and print the medians of the rounds' ratios to no record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    found = rows.find(rows.load(), ("pretrain",), given.row)
    row = {**found, "optim": {**found["optim"], "epochs": given.epochs}}
    taken: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as healthy:
        os.environ["UNMASK_HOME"] = home
        with gate(healthy, SLOW_SECONDS) as slow, gate(None, 0.0) as failing:
            ways = {"no record": "", "healthy": healthy, "slow": slow, "500": failing, "dead": "http://127.0.0.1:9"}
            workers = Workers(1, cores(), "benchmark", [])
            try:
                train(workers, row, "", 0)  # the worker imports torch meanwhile
                for turn in range(given.rounds):
                    for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                        taken.setdefault(way, []).append(train(workers, row, ways[way], turn))
                        said = taken[way][-1]
                        print(
                            f"round {turn + 1}: {way:10} {said['training']:7.2f} s, end {said['end']:6.2f} s",
                            flush=True,
                        )
                    write(given, taken)
            finally:
                workers.stop()


def write(given: argparse.Namespace, taken: dict[str, list[dict[str, float]]]) -> None:
    """Write what the whole rounds gave, and print the ratios."""
    first = [one["training"] for one in taken["no record"]]
    ratios = {way: [a["training"] / b for a, b in zip(taken[way], first, strict=True)] for way in list(taken)[1:]}
    said = {
        "row": given.row,
        "epochs": given.epochs,
        "seconds": taken,
        "ratio": {way: {"median": statistics.median(one), "rounds": one} for way, one in ratios.items()},
        "machine": described(torch.device("cpu")),
    }
    workspace.write_json(Path(__file__).with_suffix(".json"), said)
    for way, one in ratios.items():
        print(f"{way} / no record: {statistics.median(one):.3f} (rounds {', '.join(f'{r:.3f}' for r in one)})")


def train(workers: Workers, row: dict[str, Any], address: str, turn: int) -> dict[str, float]:
    """Train from nothing as a stage does, with MLflow at an address, or without a record."""
    from flows.tracking import Record

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        record, curve = None, None
        begun = time.perf_counter()
        if address:
            os.environ["MLFLOW_TRACKING_URI"] = address
            data = {"name": row["data"], "md5": "0" * 32}
            record = Record("benchmark", f"round_{turn}", folder, data, row)
            curve = record.child("job", folder / "job", row)
        pack = str(workspace.pack_folder(row["data"]))
        job = {"kind": "pretrain", "row": row, "pack": pack, "folder": str(folder / "job"), "seed": 0, "fitted": None}
        result = workers.run(job, curve.add if curve else lambda lines: None)
        trained = time.perf_counter()
        if record and curve:
            curve.finish(result)
            record.known(record.parent)
            record.end(record.parent)
        ended = time.perf_counter()
        if record:
            record.spool.thread.join()
            shutil.rmtree(workspace.home() / "spool", ignore_errors=True)  # or the next record would send it
        return {"training": trained - begun, "end": ended - trained}


@contextmanager
def server(home: Path) -> Iterator[str]:
    """MLflow's server."""
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
        yield f"http://127.0.0.1:{port}"
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
