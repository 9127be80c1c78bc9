"""A job on several ranks: PyTorch's elastic launcher starts them, rank 0 answers, and one that dies ends them all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mim_core.jobs.run import STOP
from mim_core.train import StoppedError

POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 5
"""How long ranks that outlive another may take to end before they are killed."""


class LostRankError(RuntimeError):
    """A rank was killed or broke down; the same job goes on from its last checkpoint."""


def launch(job: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """Run a job on `devices` ranks: a GPU each, or on a machine without any an equal share of the threads.

    They end with this process, whose job's stop is theirs. Raises ValueError where GPUs are too few, StoppedError,
    LostRankError, RuntimeError with what a rank says of an error of its own.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else devices
    if found < devices:
        raise ValueError(
            f"devices: found {devices}; each rank needs a GPU of its own, and this machine has {found}; "
            f"choose {found} or fewer"
        )
    threads = max(1, job["threads"] // devices)
    with tempfile.TemporaryDirectory(prefix="unmask-ranks-") as folder:
        # Ranks and launcher meet through files: PyTorch's store would listen on every network, without a password.
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={devices}"),
            *("--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/rendezvous"),
            *("--rdzv-conf=store_type=file", "--local-addr=127.0.0.1", f"--log-dir={folder}/logs"),
            *(f"--shutdown-timeout={SHUTDOWN_SECONDS}", "-m", "mim_core.jobs"),
            *(json.dumps({**job, "threads": threads}), f"{folder}/store"),
        ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=_environment(threads)) as process:
            answers = _follow(process)
    said: dict[str, Any] = {}
    for line in answers.splitlines():
        said = {**json.loads(line), **said}  # the first word counts: the others' errors follow from it
    if "result" in said:
        return dict(said["result"])
    if "stopped" in said and STOP.asked:
        raise StoppedError(said["stopped"])
    if "error" in said:
        raise RuntimeError(said["error"])
    raise LostRankError(
        f"one of the {devices} ranks was killed or broke down; the same job goes on from its last checkpoint"
    )


def _follow(process: subprocess.Popen[str]) -> str:
    """Wait for the launcher's end, passing a stop on; gives what the ranks answered."""
    assert process.stdin
    assert process.stdout
    told = False
    try:
        while process.poll() is None:
            if STOP.asked and not told:
                told = True
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("stop\n")
                    process.stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # ranks that outlive their launcher end by it
    return process.stdout.read()


def _environment(threads: int) -> dict[str, str]:
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    talk = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} if loopback else {}
    return {
        **talk,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
