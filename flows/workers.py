"""Worker processes that train: `python -m mim_core.jobs`, fed with jobs, watched through the curves they write.

Training runs outside the orchestrator's process: its threads and fork hooks cannot reach it, a crash of either leaves
the other's files whole, and a worker imports torch while the parent still imports its own tools.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows import workspace

Span = tuple[float, float]
"""When work began and ended, in seconds of the epoch."""
Watch = Callable[[list[dict[str, float]]], None]
POLL_SECONDS = 0.5


class JobDiedError(RuntimeError):
    """A worker was killed (by the system, for memory, or by hand): the job's checkpoint is there and a retry resumes
    it."""


class JobFailedError(workspace.UserError):
    """A job ended with an error that a retry would meet again."""


class Worker:
    """One process; it ends when this one does, as its standard input then closes."""

    def __init__(self, threads: int, log: Path, spans: list[Span]) -> None:
        self.threads, self.log, self.spans = threads, log, spans
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            # Threads that wait for one another by spinning for long starve where anything else wants a core: two of
            # them trained 453 images a second alone but 77 beside one busy process; with this short spin 434 and 245.
            "GOMP_SPINCOUNT": "2000",
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(workspace.root()), os.environ.get("PYTHONPATH", "")])),
        }
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mim_core.jobs"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                # A Ctrl-C at the terminal is the parent's to handle; the worker ends with it.
                start_new_session=True,
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def run(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """Run a job to its end; `watch` gets the new lines of its curve as they come."""
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "worker.pid").write_text(str(self.process.pid))
        tail = Tail(folder / "curve.jsonl")
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({**job, "threads": self.threads}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died(folder) from None
        while True:
            try:
                answer = self.answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                watch(tail.read())
                continue
            watch(tail.read())
            if not answer:
                raise self._died(folder)
            said = json.loads(answer)
            if "error" in said:
                with self.log.open("a") as log:
                    log.write(said["traceback"])
                raise JobFailedError(f"{folder.name}: {said['error']} (details in {self.log})")
            self.spans.append((said["span"][0], said["span"][1]))
            return dict(said["result"])

    def _died(self, folder: Path) -> JobDiedError:
        code = self.process.wait()
        return JobDiedError(f"{folder.name}: the training process ended with code {code} (its log: {self.log})")

    def stop(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Workers:
    """A fixed number of workers, shared by the threads that bring jobs."""

    def __init__(self, count: int, threads: int, name: str, spans: list[Span]) -> None:
        """Start `count` workers of `threads` each; when jobs ran is noted in `spans`."""
        self.threads, self.spans = threads, spans
        self.log = workspace.home() / "logs" / f"{name}.log"
        self.idle: queue.Queue[Worker] = queue.Queue()
        self.count = count
        for _ in range(count):
            self.idle.put(Worker(threads, self.log, spans))

    def run(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """Run a job on the next idle worker; a worker that died is replaced."""
        worker = self.idle.get()
        try:
            return worker.run(job, watch)
        except JobDiedError:
            worker = Worker(self.threads, self.log, self.spans)
            raise
        finally:
            self.idle.put(worker)

    def stop(self) -> None:
        for _ in range(self.count):
            self.idle.get().stop()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots() -> int:
    """Small runs that go on at once: one a GPU, else one a core (faster than one run on all cores, by measurement)."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or cores()


class Tail:
    """Whole lines added to a JSON-lines file since the last read; one that a resume cut back is read from its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.inode = path, 0, -1

    def read(self) -> list[dict[str, float]]:
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode:
                    self.at, self.inode = 0, inode
                file.seek(self.at)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def wait_until(true: Callable[[], bool], seconds: float, every: float = 0.2) -> bool:
    """Wait for a condition; gives whether it came in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
