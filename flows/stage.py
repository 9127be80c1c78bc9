"""What the stages share: the checks before work starts, a job's key, publishing, and the command line of a stage."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from flows import data, rows, workspace
from flows.workers import JobDiedError, Span
from mim_core.files import read_curve, write_atomically


class Stage:
    """One run of a stage on a row, after its checks."""

    def __init__(self, name: str, row: str, sections: tuple[str, ...]) -> None:
        """Check rows and data before anything is done; raises UserError."""
        self.name, self.row, self.started = name, row, time.time()
        self.rows = rows.load()
        self.params: dict[str, Any] = rows.find(self.rows, sections, row)
        dataset = row if name == "prepare" else self.params["data"]
        digests = data.guard()
        if dataset not in digests:
            raise workspace.UserError(
                f"data/{dataset}: the dataset's folder is missing; run `unmask data restore`, "
                f"or bring images in with `unmask data add FOLDER --name {dataset}`"
            )
        self.data = {"name": dataset, "md5": digests[dataset]}
        self.pack = workspace.pack_folder(dataset)
        if name != "prepare" and not (self.pack / "meta.json").exists():
            raise workspace.UserError(f"packs/{dataset}: there is no pack; run `dvc repro prepare@{dataset}`")
        # What names the work: the same key means that a checkpoint of it can be gone on from.
        self.key = workspace.digest([name, row, self.params, self.data, workspace.code_fingerprint()])
        self.state = workspace.jobs_folder() / f"{name}-{row}-{self.key[:16]}"
        self.state.mkdir(parents=True, exist_ok=True)
        self.spans: list[Span] = []

    def publish(self, stage: str, job: Path, products: Iterable[str]) -> Path:
        """Copy a job's products to where DVC expects the stage's outputs."""
        folder = workspace.run_folder(stage, self.row)
        folder.mkdir(parents=True, exist_ok=True)
        for name in products:
            shutil.copyfile(job / name, folder / name)
        return folder

    def close(self) -> None:
        """Drop the jobs' folders, whose results are published, and note where the time went."""
        shutil.rmtree(self.state, ignore_errors=True)
        note_time(f"{self.name} {self.row}", self.spans)


def note_time(stage: str, spans: list[Span]) -> None:
    """Note a stage's time: the whole process's, and the work's, which is when at least one job ran."""
    work, until = 0.0, 0.0
    for begun, ended in sorted(spans):
        work += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    now = time.time()
    line = {"stage": stage, "ended": now, "wall": now - psutil.Process().create_time(), "work": work}
    with (workspace.home() / "timings.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_curves(target: Path, curves: Mapping[tuple[Any, ...], Path], names: tuple[str, ...]) -> None:
    """Join curves into one CSV: a line a step, `names` for the values of the mapping's keys."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values, path in curves.items():
        for line in read_curve(path):
            lines.setdefault((*values, line["step"]), dict(zip(names, values, strict=True))).update(line)
    columns = dict.fromkeys((*names, "step", "seconds"))
    columns |= dict.fromkeys(key for line in lines.values() for key in line)
    for hidden in ("steps", "time"):
        columns.pop(hidden, None)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    write_atomically(target, text.getvalue())


def artifact_key(name: str, row: str) -> str:
    """Name a row's artifact as Prefect allows: lower-case letters, digits and dashes."""
    return f"{name}-{row.replace('_', '-')}"


def picture_address(path: Path) -> str:
    """A picture as a data address, for pages that must hold it themselves."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def died(task: Any, run: Any, state: Any) -> bool:
    """Whether a task's failure is one that a retry mends: its training process was killed."""
    try:
        state.result()
    except JobDiedError:
        return True
    except BaseException:
        return False
    return False


def command(name: str, check: Callable[[str], object], run: Callable[[str], object]) -> None:
    """Run a stage from the command line: `python -m flows.<stage> ROW`.

    `check` comes before the flow begins, so that a user's error leaves no failed run behind and shows no traceback.
    """
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m flows.{name} ROW")
    try:
        check(sys.argv[1])
        run(sys.argv[1])
    except workspace.UserError as error:
        raise SystemExit(f"{name} {sys.argv[1]} cannot run:\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            f"{name} {sys.argv[1]}: interrupted; the same command goes on from the last checkpoint"
        ) from None
