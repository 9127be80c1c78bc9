"""Worker processes that train: `python -m mim_core.jobs`, fed with jobs, watched through the curves they write.

Training runs outside the orchestrator's process: its threads and fork hooks cannot reach it, a crash of either leaves
the other's files whole, and a worker imports torch while the parent still imports its own tools.
"""

from __future__ import annotations

import contextlib
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

from flows import limits, workspace
from mim_core.cores import cores

Span = tuple[float, float]
"""When work began and ended, in seconds of the epoch."""
Watch = Callable[[list[dict[str, float]]], bool | None]
"""Gets the new lines of a job's curve; True asks the job to stop."""
POLL_SECONDS = 0.5
STOP_SECONDS = 5.0
"""How long a job may take to write its checkpoint before its process is killed: the last checkpoint is gone on from."""


class JobDiedError(RuntimeError):
    """A worker was killed (by the system, for memory, or by hand): the job's checkpoint is there and a retry resumes
    it."""


class JobFailedError(workspace.UserError):
    """A job ended with an error that a retry would meet again."""


class StoppedError(Exception):
    """A job was asked to stop and did after `step` steps, with a checkpoint: the same job goes on from there."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command goes on from there")
        self.step = step


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
        self.busy, self.sending = False, threading.Lock()
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as answers:
            for line in answers:
                self.answers.put(line)
        self.answers.put("")

    def run(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """Run a job to its end; `watch` gets the new lines of its curve as they come.

        Raises StoppedError where the job stopped before its end. Where `watch` raises, or this process is interrupted,
        the job stops first: what is raised comes out when its checkpoint is there.
        """
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "worker.pid").write_text(str(self.process.pid))
        tail = Tail(folder / "curve.jsonl")
        self.busy = True
        try:
            self._send({**job, "threads": self.threads})
            while True:
                try:
                    answer = self.answers.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    if watch(tail.read()):
                        self.stop_job()
                    continue
                break
            self.busy = False
            watch(tail.read())
            return self._result(answer, folder)
        except BrokenPipeError:
            raise self._died(folder) from None
        finally:
            if self.busy:
                self._settle()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin
        with self.sending:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _result(self, answer: str, folder: Path) -> dict[str, Any]:
        if not answer:
            raise self._died(folder)
        said = json.loads(answer)
        if "died" in said:
            raise JobDiedError(f"{folder.name}: {said['died']} (details in {self.log})")
        if "error" in said:
            with self.log.open("a") as log:
                log.write(said["traceback"])
            raise JobFailedError(f"{folder.name}: {said['error']} (details in {self.log})")
        self.spans.append((said["span"][0], said["span"][1]))
        if "stopped" in said:
            raise StoppedError(said["stopped"])
        return dict(said["result"])

    def stop_job(self) -> None:
        """Ask the present job to stop after a checkpoint; a job that trains nothing goes on."""
        with contextlib.suppress(BrokenPipeError):
            self._send({"stop": True})

    def _settle(self) -> None:
        """Stop the present job, whose result nobody waits for any more."""
        self.stop_job()
        try:
            dead = not self.answers.get(timeout=STOP_SECONDS)
        except queue.Empty:
            self.process.kill()
            dead = True
        if dead:
            self.process.wait()
        self.busy = False

    def _died(self, folder: Path) -> JobDiedError:
        code = self.process.wait()
        return JobDiedError(f"{folder.name}: the training process ended with code {code} (its log: {self.log})")

    def close(self) -> None:
        """End the process."""
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(2 * STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Workers:
    """A fixed number of workers, shared by the threads that bring jobs."""

    def __init__(self, count: int, threads: int, name: str, spans: list[Span]) -> None:
        """Start `count` workers of `threads` each; when jobs ran is noted in `spans`.

        A job takes the worker's share of the machine's slots from Prefect's limit `gpu`, see `flows.limits`.
        """
        self.share = max(1, slots() // count)
        self.threads, self.spans = threads, spans
        self.log = workspace.home() / "logs" / f"{name}.log"
        self.all = [Worker(threads, self.log, spans) for _ in range(count)]
        self.idle: queue.Queue[Worker] = queue.Queue()
        self.stopping = False
        for worker in self.all:
            self.idle.put(worker)

    def run(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """Run a job on the next idle worker; a worker that died is replaced.

        Raises StoppedError where the job was asked to stop (by `watch`, by `stop_jobs`, or by a signal to its
        process), JobDiedError, JobFailedError.
        """
        worker = self.idle.get()
        try:
            with limits.held(self.share, lambda: self.stopping):
                if self.stopping:
                    raise StoppedError(0)
                return worker.run(job, watch)
        finally:
            if worker.process.poll() is not None and not self.stopping:
                self.all.remove(worker)
                worker.close()
                worker = Worker(self.threads, self.log, self.spans)
                self.all.append(worker)
            self.idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop_jobs(self) -> None:
        """Ask all running jobs to stop after a checkpoint; jobs that wait for a worker run."""
        for worker in self.all:
            if worker.busy:
                worker.stop_job()

    def stop(self) -> None:
        """End the workers: running jobs leave a checkpoint, and jobs that wait are not begun."""
        self.stopping = True
        self.stop_jobs()
        wait_until(lambda: not any(worker.busy for worker in self.all), STOP_SECONDS)
        for worker in self.all:
            worker.close()


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
