"""Workers: how a job is stopped from the parent's side, with real processes and no server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_pieces import OPTIM, PRETRAIN

from flows import workspace
from flows.workers import JobDiedError, StoppedError, Workers
from mim_core import checkpoint
from mim_core.data.pack import Pack
from mim_core.files import read_curve


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(2, 1, "workers", []) as started:
        yield started


def job(pack: Pack, folder: Path, epochs: float = 2000) -> dict[str, Any]:
    row = {**PRETRAIN, "optim": {**OPTIM, "epochs": epochs}}
    return {"kind": "pretrain", "row": row, "pack": str(pack.folder), "folder": str(folder), "seed": 0, "fitted": None}


def saved(folder: Path) -> int:
    """The step of the newest checkpoint, which is the last of the curve or later."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found
    step = int(checkpoint.load(found)[0]["step"])
    assert step >= read_curve(folder / "curve.jsonl")[-1]["step"]
    return step


def test_a_watch_stops_its_job_and_the_same_job_goes_on(tmp_path: Path, pack: Pack, workers: Workers) -> None:
    seen: list[dict[str, float]] = []

    def watch(lines: list[dict[str, float]]) -> bool:
        seen.extend(lines)
        return bool(seen)

    with pytest.raises(StoppedError) as first:
        workers.run(job(pack, tmp_path), watch)
    assert first.value.step == saved(tmp_path)
    seen.clear()
    with pytest.raises(StoppedError) as second:
        workers.run(job(pack, tmp_path), watch)
    assert second.value.step == saved(tmp_path) > first.value.step
    assert workers.run(job(pack, tmp_path / "short", epochs=1), lambda lines: None)["steps"] == 4


def test_what_a_watch_raises_comes_out_after_the_checkpoint(tmp_path: Path, pack: Pack, workers: Workers) -> None:
    def watch(lines: list[dict[str, float]]) -> None:
        if lines:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run(job(pack, tmp_path), watch)
    assert saved(tmp_path) > 0
    assert not any(worker.busy for worker in workers.all)


def start(workers: Workers, pack: Pack, folder: Path, ended: dict[str, Any]) -> threading.Thread:
    """Run a job in a thread; what it raises or gives is put under its folder's name."""

    def run() -> None:
        try:
            ended[folder.name] = workers.run(job(pack, folder), lambda lines: None)
        except Exception as error:
            ended[folder.name] = error

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def trained(folder: Path) -> None:
    end = time.monotonic() + 60
    while not read_curve(folder / "curve.jsonl"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_all_jobs_can_be_stopped_a_killed_one_is_not_stopped_and_none_begins_after_the_end(
    tmp_path: Path, pack: Pack
) -> None:
    ended: dict[str, Any] = {}
    with Workers(2, 1, "workers", []) as own:
        threads = [start(own, pack, tmp_path / name, ended) for name in ("one", "two", "three")]
        running = [tmp_path / name for name in ("one", "two", "three")]
        while len([folder for folder in running if read_curve(folder / "curve.jsonl")]) < 2:
            time.sleep(0.05)
        own.stop_jobs()
        waiting = next(folder for folder in running if not read_curve(folder / "curve.jsonl"))
        trained(waiting)  # the one that waited for a worker runs
        assert {type(one) for one in ended.values()} == {StoppedError}
        worker = next(one for one in own.all if one.busy)
        worker.process.kill()
        threads[0].join(30)
        while waiting.name not in ended:
            time.sleep(0.05)
        assert isinstance(ended[waiting.name], JobDiedError)
        last = start(own, pack, tmp_path / "last", ended)
        trained(tmp_path / "last")
    last.join(30)
    assert ended["last"].step == saved(tmp_path / "last")
    with pytest.raises(StoppedError):
        own.run(job(pack, tmp_path / "late"), lambda lines: None)
    assert not (tmp_path / "late").exists()
    assert all(worker.process.poll() is not None for worker in own.all)
    assert (workspace.home() / "logs" / "workers.log").exists()
