"""Reproduce what is stale and report, as `dvc repro` does: the deployment `nightly` of prefect.yaml."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from prefect import flow, get_run_logger

from flows import janitor, workspace

REPRODUCE = ("-m", "dvc", "repro")
GRACE_SECONDS = 20.0
"""How long an interrupted stage may take to end; Prefect kills what goes on for 30 s."""


@flow(name="nightly", flow_run_name="nightly")
def nightly() -> None:
    """Run all stages that are stale, one after the other, the report last. Raises UserError where one fails."""
    janitor.begin()
    log = get_run_logger()
    process = subprocess.Popen(
        [sys.executable, *REPRODUCE],
        cwd=workspace.root(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A group of its own, so that an interrupt reaches the stage that runs, and DVC waits for its checkpoint.
        start_new_session=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            log.info(line.rstrip())
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.wait():
        raise workspace.UserError("a stage failed, see the last lines; `dvc repro` goes on from there")


if __name__ == "__main__":
    nightly()
