"""MLflow's record on its way: what stages say of their runs is written to `.unmask/spool/`, and a thread sends it.

So no run waits for MLflow's server, and none loses its record with it. A record has a file there,
`<time>-<stage>-<row>.jsonl`, an operation a line, which its process holds locked until all is sent; copies of files to
upload lie in the folder of the same name. Beside it `.at` holds how many bytes are sent. What a dead process has left,
or one whose server was dead, is sent by the next record or by `unmask sync`: once, see `flows.sender`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

from flows import workspace
from flows.sender import Sender, refused
from flows.workers import wait_until
from mim_core.files import write_atomically

AGAIN_SECONDS = 10.0
"""Between two tries of a server that failed."""
Operation = dict[str, Any]


class Tape:
    """A record's file, read while it grows; `at` is how many bytes of it are sent."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.at = 0
        with contextlib.suppress(FileNotFoundError):
            self.at = int(path.with_suffix(".at").read_text())
        self.file.seek(self.at)
        self.waiting: deque[tuple[int, Operation]] = deque()
        self.opens: deque[Operation] = deque()

    def read(self) -> None:
        """Take what has been added: whole lines."""
        at = self.file.tell()
        for line in self.file.readlines():
            if not line.endswith(b"\n"):  # still being written, or cut short by a kill
                break
            at += len(line)
            try:
                operation = json.loads(line)
            except json.JSONDecodeError:  # the disk was full
                operation = {"op": "broken"}
            self.waiting.append((at, operation))
            if operation["op"] == "open":
                self.opens.append(operation)
        self.file.seek(at)

    def send(self, sender: Sender) -> Iterator[Operation]:
        """Send what waits, in its order but that runs are created before all else; gives what is sent and noted.

        Raises what MLflow's client does where it does not answer. What it refuses for good goes to `.refused`.
        """
        while True:
            self.read()
            while self.opens:
                try:
                    sender.create(self.opens[0])
                except Exception as error:
                    if not refused(error):  # the operation itself meets a refusal again, and tells it
                        raise
                self.opens.popleft()
            if not self.waiting:
                return
            at, operation = self.waiting[0]
            try:
                sender.send(operation)
            except Exception as error:
                if not refused(error):
                    raise
                operation["refused"] = workspace.first_line(error)
                with self.path.with_suffix(".refused").open("a") as file:
                    file.write(json.dumps(operation) + "\n")
            write_atomically(self.path.with_suffix(".at"), str(at))
            self.at = at
            self.waiting.popleft()
            yield operation


class Spool:
    """A record's way to MLflow. Nothing here raises, and only `settle` and `close` wait."""

    def __init__(self, name: str) -> None:
        self.path = folder() / f"{time.time_ns()}-{name}.jsonl"
        self.sender, self.fault = Sender(), ""
        self.wake, self.ended, self.late = threading.Event(), False, False
        self.lock = threading.Lock()
        self.idle = True  # nothing waits
        self.told: set[str] = set()
        self.files = 0
        self.thread = threading.Thread(target=self._serve, daemon=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            self.file: IO[bytes] | None = new.open("ab")
            fcntl.flock(self.file, fcntl.LOCK_EX)
            new.rename(self.path)  # nobody may take it for a dead process's before it is held
            self.thread.start()
        except OSError as error:
            self.file = None
            self.tell(f"MLflow gets no record of this run: {error}")

    def do(self, operation: Operation) -> None:
        """Keep an operation, to be sent soon."""
        if self.ended or not self.file:
            return
        try:
            with self.lock:
                if "path" in operation:
                    operation = {**operation, "path": str(self._copied(operation))}
                line = {**operation, "time": int(time.time() * 1000)}
                self.file.write(json.dumps(line, default=str).encode() + b"\n")
                self.file.flush()
            self.idle = False
        except (OSError, ValueError) as error:  # a full disk must not end the training
            self.tell(f"a part of MLflow's record is lost: {error}")
        if not self.fault:
            self.wake.set()

    def settle(self, true: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition while MLflow goes on answering; one that failed is tried once more."""
        if not true():
            self.fault = ""
            self.wake.set()
            wait_until(lambda: true() or bool(self.fault) or not self.thread.is_alive(), seconds, 0.02)

    def close(self, seconds: float) -> None:
        """Send what waits within `seconds`, or while MLflow answers; the rest stays for `unmask sync`."""
        if not self.file:
            return
        self.fault, self.ended = "", True
        self.wake.set()
        self.thread.join(seconds)
        self.late = True
        self.wake.set()
        if self.path.exists():
            self.tell(f"a part of MLflow's record waits in {folder()}; `unmask sync` sends it")

    def _copied(self, operation: Operation) -> Path:
        """Keep a file as it is now: weights by a link, as they are never written in place."""
        source, self.files = Path(operation["path"]), self.files + 1
        target = self.path.with_suffix("") / str(self.files) / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if operation["op"] in ("register", "compete"):
            with contextlib.suppress(OSError):  # another file system
                target.hardlink_to(source)
                return target
        shutil.copyfile(source, target)
        return target

    def _serve(self) -> None:
        """Send until the record is closed; runs in a thread, which lets go of the file."""
        assert self.file
        tape = Tape(self.path)
        with self.file, tape.file:
            while True:
                try:
                    for operation in self._work(tape):
                        if "refused" in operation:
                            self.tell(f"MLflow refused '{operation['op']}': {operation['refused']}")
                        if self.late:
                            return
                    self.fault, self.idle = "", True
                except Exception as error:
                    self.fault = workspace.first_line(error)
                    self.tell("MLflow does not answer, its record is kept on disk meanwhile", self.fault)
                if self.late or (self.ended and (self.fault or tape.at == os.fstat(self.file.fileno()).st_size)):
                    break
                self.wake.wait(AGAIN_SECONDS if self.fault else None)
                self.wake.clear()
            if tape.at == os.fstat(self.file.fileno()).st_size:
                remove(self.path)

    def _work(self, tape: Tape) -> Iterator[Operation]:
        """What is to be sent now: what earlier processes left of the same runs, our own, and what others left."""
        name = name_of(self.path)
        for path in left():
            if name_of(path) == name and path < self.path:
                while not (yield from rest(path, self.sender)):
                    time.sleep(0.2)  # another process sends it
                    yield {"op": "wait"}
        yield from tape.send(self.sender)
        for path in left() if not self.ended else []:
            if path != self.path:
                for operation in rest(path, self.sender):
                    yield operation
                    yield from tape.send(self.sender)

    def tell(self, what: str, why: str = "") -> None:
        """Say something to whoever watches, once."""
        if what not in self.told:
            self.told.add(what)
            print(f"{what}: {why}" if why else what, file=sys.stderr, flush=True)


def folder() -> Path:
    return workspace.home() / "spool"


def left() -> list[Path]:
    """The records' files, the oldest first: those of living processes, too."""
    return sorted(folder().glob("*.jsonl"))


def name_of(path: Path) -> str:
    """The stage and row that a record is of."""
    return path.stem.partition("-")[2]


def count(path: Path) -> int:
    """Count the operations of a file that are not sent."""
    tape = Tape(path)
    with tape.file:
        tape.read()
    return len(tape.waiting)


def rest(path: Path, sender: Sender) -> Generator[Operation, None, bool]:
    """Send what a dead process has left, and end the runs that it did not end; gives what is sent.

    Returns whether the file is done with: one that another process holds is left to it.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:  # sent by another process meanwhile
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not path.exists():
            return True
        tape = Tape(path)
        with tape.file:
            yield from tape.send(sender)
        running: set[str] = set()
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(line)
                if said["op"] in ("open", "end"):
                    (running.add if said["op"] == "open" else running.discard)(said["run"])
        for run in sorted(running):
            ended = {"op": "end", "run": run, "status": "KILLED", "time": int(path.stat().st_mtime * 1000)}
            try:
                sender.send(ended)
            except Exception as error:
                if not refused(error):  # the record was cleared
                    raise
        remove(path)
    return True


def remove(path: Path) -> None:
    """Take away a file that is sent; the operations first, so that no kill leaves them without how far they are."""
    path.unlink(missing_ok=True)
    path.with_suffix(".at").unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
