"""Work on many images in pieces: by several processes, and noted on disk, so that what was done outlives a kill.

A process is this module run as a program: it answers calls on its standard input until that ends, so none outlives the
process that it works for, however that ends.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mim_core.files import write_atomically

Arrays = dict[str, np.ndarray]
"""What a piece of work comes to; it is noted as an .npz file."""
Progress = Callable[[int, int, int, str], None]
"""Told how many images are done, how many there are, how many are done since this began, and the work's name."""
WORTH_SECONDS = 3.0
"""What remains of some work must take longer than this for further processes, which take a second to start."""


class Work:
    """How work is done: a context, within which sources and packs use it.

    Without a folder nothing is noted. With one, what was done under the same `key` is not done again, and what is there
    of another key is dropped; without a key all begins afresh. The key has to name all that the work follows from.
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: str = "",
        processes: int = 1,
        progress: Progress = lambda done, total, here, name: None,
        worth_s: float = WORTH_SECONDS,
    ) -> None:
        self.folder, self.processes, self.progress, self.worth_s = folder, processes, progress, worth_s
        self._pool: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._before: list[Token[Work]] = []
        if folder:
            noted = folder / "key"
            if not key or not noted.is_file() or noted.read_text() != key:
                shutil.rmtree(folder, ignore_errors=True)
                write_atomically(noted, key)

    def __enter__(self) -> Work:
        self._before.append(_current.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._before.pop())
        for process in self._started:  # a thread that waits for its answer goes on
            process.kill()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        for process in self._started:
            process.communicate()

    def forget(self) -> None:
        """Let what is noted not be gone on from: what it tells of is about to move away."""
        if self.folder:
            (self.folder / "key").unlink()

    def map(
        self, name: str, function: Callable[..., Arrays], pieces: Iterable[Sequence[Any]], counts: Sequence[int]
    ) -> Iterator[Arrays]:
        """Call `function` with each piece's arguments; gives what comes out in the pieces' order.

        `counts` says how many images each piece has. Arguments and function must pickle. The first piece that fails, in
        the pieces' order, raises its error.
        """
        total, done, here = sum(counts), 0, 0
        waiting: deque[tuple[int, bool, Future[Arrays]]] = deque()

        def oldest() -> Arrays:
            nonlocal done, here
            count, new, future = waiting.popleft()
            arrays = future.result()
            done, here = done + count, here + count * new
            self.progress(done, total, here, name)
            return arrays

        begun = time.monotonic()
        for index, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            note = self.folder / "done" / f"{name}-{index:07}.npz" if self.folder else None
            noted = _read(note)
            if noted is not None:
                waiting.append((count, False, _finished(noted)))
            elif self._shared(time.monotonic() - begun, here, total - done):
                waiting.append((count, True, self._submit(function, piece, note)))
            else:
                waiting.append((count, True, _finished(_do(function, piece, note))))
            while len(waiting) > (2 * self.processes if self._pool else 0):
                yield oldest()
        while waiting:
            yield oldest()

    def _shared(self, spent_s: float, here: int, remaining: int) -> bool:
        """Whether to use further processes: once it was worth it, always."""
        if self._pool or self.processes < 2:
            return self._pool is not None
        return spent_s / here * remaining > self.worth_s if here else self.worth_s <= 0

    def _submit(self, function: Callable[..., Arrays], piece: Sequence[Any], note: Path | None) -> Future[Arrays]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.processes)
            for _ in range(self.processes):
                # The same modules are found there, also where this process was given others than the installed ones.
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", "mim_core.data.work"]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=1 << 16
                )
                self._started.append(process)
                self._idle.put(process)
        return self._pool.submit(self._ask, function, piece, note)

    def _ask(self, function: Callable[..., Arrays], piece: Sequence[Any], note: Path | None) -> Arrays:
        call = pickle.dumps((function, piece, note))
        process = self._idle.get()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(call)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise OSError(
                f"a process that reads images died (exit code {process.wait()}; a negative one is a signal's number, "
                "-9 often means too little memory); run it again, what is done is kept"
            ) from None
        finally:
            self._idle.put(process)  # one that died fails again, so that nobody waits for it
        if isinstance(answer, Exception):
            raise answer
        found: Arrays = answer
        return found


_current: ContextVar[Work] = ContextVar("work")


def current() -> Work:
    """The work that goes on; in this process and unnoted where there is none."""
    return _current.get(None) or Work()


def _read(note: Path | None) -> Arrays | None:
    if note is None:
        return None
    try:
        with np.load(note) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile):  # not there, or damaged: it is done again
        return None


def _do(function: Callable[..., Arrays], piece: Sequence[Any], note: Path | None) -> Arrays:
    """Do a piece, and note it once all that it wrote is on disk (which is for the function to see to)."""
    arrays = function(*piece)
    if note:
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_atomically(note, content.getvalue())
    return arrays


def _finished(arrays: Arrays) -> Future[Arrays]:
    future: Future[Arrays] = Future()
    future.set_result(arrays)
    return future


def _serve() -> None:
    """Answer calls until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # comes to all of a terminal; the process that asks decides
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            answer: Arrays | Exception
            try:
                answer = _do(*pickle.load(calls))
            except EOFError:
                return
            except Exception as error:
                if not isinstance(error, (OSError, ValueError)):
                    error.add_note(traceback.format_exc())
                answer = error
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
