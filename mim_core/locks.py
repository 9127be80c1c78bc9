"""Locks between processes: files that one holds at a time, with a note of which process, on which host, since when.

The system lets go of a lock when its holder ends, however it ends. So a note that is left is of a process that died,
and is passed over, where it was made under this kernel or this host's name. One of another host may be of a machine
that works here still, over a network file system that keeps no locks between machines: it stands until it is deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class HeldError(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def held(path: Path, what: str, give_up: Callable[[], bool] = lambda: True, every: float = 0.1) -> Iterator[None]:
    """Hold the lock `path` alone; threads of one process are kept apart too.

    While another holds it, `give_up` is asked each `every` seconds whether to wait no longer. Raises HeldError then,
    and at once where a note of another host stands; it says who has `what` and what to do.
    """
    while (got := _take(path)) is None or isinstance(got, dict):
        if got or give_up():
            raise HeldError(f"{what}: {_told(path, got)}")
        time.sleep(every)
    with got:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": time.time()}
        _write(got, json.dumps(about))
        try:
            yield
        finally:
            _write(got, "")


def _take(path: Path) -> IO[str] | dict[str, Any] | None:
    """Open the file and lock it; gives another host's note, or None, where it is taken."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed it with its folder since: then another one's lock lies in its place, or none.
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()
    note = _note(file)
    if note and note["host"] != socket.gethostname() and note["boot"] != _boot():
        file.close()
        return note
    return file


def _told(path: Path, note: dict[str, Any] | None) -> str:
    """Say who holds a lock."""
    mend = f"this machine cannot see whether it still runs; if it does not, delete {path}"
    if note is None:
        mend = "wait for its end, or stop it"
        with suppress(FileNotFoundError), path.open() as file:
            note = _note(file)
    if note is None:  # it has just been taken, or let go
        return f"another process has it; {mend}"
    return f"process {note['pid']} on host {note['host']} has it since {note['since']}; {mend}"


def _note(file: IO[str]) -> dict[str, Any] | None:
    """The note in a lock's file, its time as text; None where there is none, or a kill cut it short."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "boot": found["boot"], "since": since}
    except (ValueError, TypeError, LookupError, OverflowError, OSError):
        return None


def _write(file: IO[str], text: str) -> None:
    with suppress(OSError):  # a full disk: the lock holds without its note
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()


def _boot() -> str:
    """Name the running kernel, which containers share whatever their hosts are called; empty where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
