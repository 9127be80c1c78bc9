"""Jobs: one training run from a row to files on disk, resumed where a checkpoint lies.

A job works in its own folder: `curve.jsonl` (a line a report), `checkpoints/`, and its products. Nothing else is
needed to go on after a kill, and nothing here knows who started it. `python -m mim_core.jobs` reads jobs as JSON, a
line each, from standard input and answers each with a line, so that one process serves many jobs and ends with its
parent.

A job stops at its next step, with a checkpoint, where the process gets SIGTERM or reads the line `{"stop": true}`
(which may come before the imports are done, when the signal would still end the process); the answer is
`{"stopped": step}`, and the process serves on. An evaluation is finished first, and what trains nothing (neighbours, a
palette, the score on test images) goes on to its result. Where standard input closes, the process stops its job in the
same way and ends, after STOP_SECONDS at most.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mim_core.data.pack import open_pack
from mim_core.jobs.downstream import downstream
from mim_core.jobs.fit_target import fit_target
from mim_core.jobs.pretrain import pretrain
from mim_core.jobs.run import STOP
from mim_core.locks import held
from mim_core.params import DownstreamRow, PretrainRow, TargetRow
from mim_core.spec import check
from mim_core.train import StoppedError

__all__ = ["STOP_SECONDS", "downstream", "fit_target", "main", "perform", "pretrain"]

STOP_SECONDS = 5.0
"""How long a process whose parent is gone may take to write its job's checkpoint."""


def perform(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job as it comes over the wire: `kind`, `row`, `pack`, `folder`, `seed`; for pretrain `fitted`
    and, where it is probed, `probe`; for downstream `lr`, `init`, `test`.

    Raises StoppedError where it was asked to stop, HeldError where another process does not leave its folder: one whose
    parent was killed may still be writing its last checkpoint there.
    """
    pack, folder, seed = open_pack(Path(job["pack"])), Path(job["folder"]), job["seed"]
    torch.set_num_threads(job["threads"])
    end = time.monotonic() + 2 * STOP_SECONDS
    with held(folder / "worker.lock", f"{folder}: this job", lambda: time.monotonic() > end):
        if job["kind"] == "fit_target":
            return fit_target(check(TargetRow, job["row"], "row"), pack, folder, seed)
        if job["kind"] == "pretrain":
            fitted = Path(job["fitted"]) if job["fitted"] else None
            return pretrain(check(PretrainRow, job["row"], "row"), pack, folder, seed, fitted, job.get("probe"))
        row = check(DownstreamRow, job["row"], "row")
        return downstream(row, pack, folder, seed, job["lr"], job["init"], job["test"])


def main() -> None:
    """Serve jobs from standard input until it closes, which it does when the parent dies, also in the middle of a
    job."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not lie between the answers
    waiting: queue.Queue[str] = queue.Queue()
    closed = threading.Event()

    def stop(*_: object) -> None:
        STOP.asked = True

    def read() -> None:
        for line in sys.stdin:
            if json.loads(line) == {"stop": True}:
                stop()
                continue
            if not waiting.unfinished_tasks:
                STOP.asked = False  # one that came when there was nothing to stop
            waiting.put(line)
        closed.set()
        if waiting.unfinished_tasks:
            stop()
            time.sleep(STOP_SECONDS)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=read, daemon=True).start()
    while True:
        line = waiting.get()
        begun = time.time()
        try:
            answer: dict[str, Any] = {"result": perform(json.loads(line))}
        except StoppedError as stopped:
            answer = {"stopped": stopped.step}
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}", "traceback": traceback.format_exc()}
        answer["span"] = [begun, time.time()]
        if closed.is_set():
            os._exit(0)
        STOP.asked = False
        waiting.task_done()  # before the answer: what comes after it is for the next job
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
