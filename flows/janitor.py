"""Runs whose process was killed: nothing else tells Prefect that they are over (MLflow is told by `flows.spool`).

A process that runs a flow has a file in .unmask/processes/ while it lives: which process it is, the flow run, the
leases it holds. The next flow to begin, or `unmask up`, marks the runs of dead ones as Crashed and gives their leases
back. Processes of other machines that share the folder are let be.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from flows import workspace

MESSAGE = "the process was killed; the same command goes on from the last checkpoint"
LATE = "completed while this server did not answer"
_lock = threading.RLock()
_left = threading.Event()


def begin() -> None:
    """Note this process's flow run, where it is in one, and sweep."""
    from prefect import runtime

    if run := runtime.flow_run.id:
        _note("flow_run", str(run))
        sweep()


def note_lease(lease: UUID, held: bool) -> None:
    """Note that a lease of the concurrency limit is held, or not any more."""
    with _lock:
        leases = [one for one in _own().get("leases", []) if one != str(lease)]
        _note("leases", [*leases, str(lease)] if held else leases)


def leave(key: str) -> None:
    """Leave it to a later process to tell Prefect of this one's end: as `completed`, else as `flow_run`."""
    with _lock:
        own = _own()
        if run := own.pop("flow_run", None):
            workspace.write_json(_path(), {**own, key: run})
            _left.set()


def left() -> bool:
    """Whether a dead process left something; cheap, as the tools are not imported for it."""
    return any((said := _read(path)) and _dead(said) for path in _folder().glob("*.json"))


def sweep() -> None:
    """Mark what dead processes of this machine left open; what a server that does not answer has waits for the next
    time."""
    files = {path: _read(path) for path in _folder().glob("*.json")}
    living = [said for said in files.values() if said and not _dead(said)]
    busy = [said["flow_run"] for said in living if "flow_run" in said]
    for path, said in files.items():
        if not said or not _dead(said):
            continue
        for key, mend in MENDS.items():
            # A retry that runs by now has the run of the process that died: that is not over.
            if key in said and (said[key] in busy or mend(said[key])):
                del said[key]
        if MENDS.keys() & said.keys():
            workspace.write_json(path, said)
        else:
            path.unlink(missing_ok=True)


def _end(run: str, completed: bool) -> bool:
    """Set a flow run and its task runs to Crashed or Completed; gives whether there is nothing more to do."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Completed, Crashed

    over: Any = Completed(message=LATE) if completed else Crashed(message=MESSAGE)

    with _client() as client:
        if not client:
            return False
        try:
            state = client.read_flow_run(UUID(run)).state
            if state and (state.is_running() or state.is_cancelling()):
                end = Cancelled(message=MESSAGE) if state.is_cancelling() else over
                client.set_flow_run_state(UUID(run), end, force=True)
            open_ones = TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
            of_run = FlowRunFilter.model_validate({"id": {"any_": [run]}})
            for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=open_ones):
                client.set_task_run_state(task.id, over, force=True)
        except ObjectNotFound:  # the history was cleared
            return True
        except Exception:
            return False
    return True


def _release(leases: list[str]) -> bool:
    with _client() as client:
        if not client:
            return False
        for lease in leases:
            try:
                client.release_concurrency_slots_with_lease(UUID(lease))
            except Exception:  # it has run out
                continue
    return True


MENDS: dict[str, Callable[[Any], bool]] = {"leases": _release, "flow_run": lambda run: _end(run, False)}
MENDS["completed"] = lambda run: _end(run, True)


def _client() -> Any:
    from prefect import get_client
    from prefect.settings import get_current_settings

    # Without a server Prefect would start one for this alone.
    return get_client(sync_client=True) if get_current_settings().api.url else nullcontext()


def _dead(said: Mapping[str, Any]) -> bool:
    if said["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(said["pid"]).create_time() - said["started"]) > 1)
    except psutil.NoSuchProcess:
        return True


def _note(key: str, value: Any) -> None:
    with _lock:
        _register()
        workspace.write_json(_path(), {**_own(), key: value})


@cache
def _register() -> None:
    _folder().mkdir(parents=True, exist_ok=True)
    path, pid = _path(), os.getpid()
    # A fork that ends is not the end.
    atexit.register(lambda: path.unlink(missing_ok=True) if os.getpid() == pid and not _left.is_set() else None)


def _own() -> dict[str, Any]:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
    found = _read(_path())
    return found if found and {key: found[key] for key in about} == about else about


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _path() -> Path:
    return _folder() / f"{socket.gethostname()}-{os.getpid()}.json"


def _folder() -> Path:
    return workspace.home() / "processes"
