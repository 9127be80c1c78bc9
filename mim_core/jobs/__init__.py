"""Jobs: one training run from a row to files on disk, resumed where a checkpoint lies.

A job works in its own folder: `curve.jsonl` (a line a report), `checkpoints/`, and its products. Nothing else is
needed to go on after a kill, and nothing here knows who started it. `python -m mim_core.jobs` reads jobs as JSON, a
line each, from standard input and answers each with a line, so that one process serves many jobs and ends with its
parent.
"""

from __future__ import annotations

import json
import os
import queue
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
from mim_core.params import DownstreamRow, PretrainRow, TargetRow
from mim_core.spec import check

__all__ = ["downstream", "fit_target", "main", "perform", "pretrain"]


def perform(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job as it comes over the wire: `kind`, `row`, `pack`, `folder`, `seed`; for pretrain `fitted`; for
    downstream `lr`, `init`, `test`."""
    pack, folder, seed = open_pack(Path(job["pack"])), Path(job["folder"]), job["seed"]
    torch.set_num_threads(job["threads"])
    if job["kind"] == "fit_target":
        return fit_target(check(TargetRow, job["row"], "row"), pack, folder, seed)
    if job["kind"] == "pretrain":
        fitted = job["fitted"]
        return pretrain(check(PretrainRow, job["row"], "row"), pack, folder, seed, Path(fitted) if fitted else None)
    row = check(DownstreamRow, job["row"], "row")
    return downstream(row, pack, folder, seed, job["lr"], job["init"], job["test"])


def main() -> None:
    """Serve jobs from standard input until it closes, which it does when the parent dies, also in the middle of a
    job."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not lie between the answers
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        line = waiting.get()
        begun = time.time()
        try:
            answer = {"result": perform(json.loads(line)), "span": [begun, time.time()]}
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
