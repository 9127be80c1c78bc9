"""What the stages share: the checks before work starts, a job's key, publishing, and the command line of a stage."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows import data, janitor, rows, workspace
from flows.workers import JobDiedError, Span, StoppedError
from mim_core.files import read_curve, write_atomically
from mim_core.locks import HeldError, held

_over = threading.Event()
"""This process's stage has come to its end."""
_checked: list[Stage] = []
"""What `command` has checked, until its flow begins with it."""


@dataclass(frozen=True)
class Start:
    """The weights that a run begins from: `what` they are, their `file`, and how to get them where they are missing.

    `run` is the folder below runs/ that they were published in; empty where they are others'.
    """

    what: str
    file: Path
    mend: str
    run: str = ""

    def digest(self) -> str:
        """Hash the file; raises UserError where it is missing."""
        try:
            with self.file.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise workspace.UserError(f"{self.file}: the {self.what} is missing; {self.mend}") from None


def published(what: str, run: str, name: str, stage: str) -> Start:
    """Weights that the stage `stage` publishes as `name` in runs/<run>."""
    return Start(what, workspace.root() / "runs" / run / name, f"run `dvc repro {stage}`", run)


def tokenizer_of(given: rows.Rows, section: str, params: Mapping[str, Any]) -> Start | None:
    """The tokenizer that a pretrain row's target was fitted as, where it was."""
    fitted = rows.fitted(params)
    if not fitted:
        return None
    return published("tokenizer", f"targets/{fitted}", "tokenizer.safetensors", f"fit_target@{fitted}")


def encoder_of(given: rows.Rows, section: str, params: Mapping[str, Any]) -> Start | None:
    """The file that a downstream row begins from; none from scratch, or where timm has the weights."""
    init = params["init"]
    if section == "baselines":
        return None
    if section == "supervised":
        return Start("file of weights", workspace.root() / init, f"put it there, or change {section}'s init")
    if section == "continued":
        stage = rows.JUDGED[rows.section_of(given, rows.JUDGED, init)]
        return published("model", f"downstream/{init}", "model.safetensors", f"{stage}@{init}")
    stage = "pretrain_fitted" if init in given["pretrain_fitted"] else "pretrain"
    return published("encoder", f"pretrain/{init}", "encoder.safetensors", f"{stage}@{init}")


class Stage:
    """One run of a stage on a row, after its checks."""

    def __init__(
        self,
        name: str,
        row: str,
        sections: tuple[str, ...],
        start_of: Callable[[rows.Rows, str, Mapping[str, Any]], Start | None] = lambda given, section, params: None,
    ) -> None:
        """Check rows, data and the weights to begin from before anything is done; raises UserError."""
        self.name, self.row, self.started = name, row, time.time()
        self.rows = rows.load()
        self.section = rows.section_of(self.rows, sections, row)
        self.params: dict[str, Any] = self.rows[self.section][row]
        dataset = row if name == "prepare" else self.params["data"]
        digests = data.guard()
        if dataset not in digests:
            raise workspace.UserError(
                f"data/{dataset}: the dataset's folder is missing; run `unmask data restore`, "
                f"or bring images in with `unmask data add FOLDER --name {dataset}`"
            )
        self.data = {"name": dataset, "md5": digests[dataset]}
        self.pack = workspace.pack_folder(dataset)
        if name != "prepare":
            try:
                meta = json.loads((self.pack / "meta.json").read_text())
            except FileNotFoundError:
                mend = f"run `dvc repro prepare@{dataset}`"
                raise workspace.UserError(f"packs/{dataset}: there is no pack; {mend}") from None
            # The same images make another pack under another row of params/data.yaml.
            self.data["pack"] = workspace.digest(meta)
        self.start = start_of(self.rows, self.section, self.params)
        begun_from = self.start.digest() if self.start else ""
        # What names the work: the same key means that a checkpoint of it can be gone on from, on any number of devices.
        params = {key: value for key, value in self.params.items() if key != "devices"}
        self.key = workspace.digest([name, row, params, self.data, workspace.code_fingerprint(), begun_from])
        self.state = workspace.jobs_folder() / f"{name}-{row}-{self.key[:16]}"
        self.state.mkdir(parents=True, exist_ok=True)
        self.spans: list[Span] = []

    @contextmanager
    def alone(self, *further: Path) -> Iterator[None]:
        """Hold the work, which its key names, and the row's place below runs/; `further` locks beside them.

        Raises UserError where another process has one: two would write the same files and record the same run.
        """
        # Outside the job's folder, which goes at the end; experiments have places of their own, and one home.
        locks, place = workspace.home() / "locks", workspace.digest([str(workspace.root()), self.name, self.row])
        names = (self.state.name, f"{self.name}-{self.row}-in-{place[:16]}")
        try:
            with ExitStack() as stack:
                for path in (*(locks / name for name in names), *further):
                    stack.enter_context(held(path, f"{self.name} {self.row}"))
                self.state.mkdir(parents=True, exist_ok=True)  # one that was there before may have dropped it
                yield
        except HeldError as error:
            raise workspace.UserError(str(error)) from None

    @property
    def parents(self) -> list[str]:
        """The runs that this one builds on."""
        return [self.start.run] if self.start and self.start.run else []

    def publish(self, kind: str, job: Path, products: Iterable[str]) -> Path:
        """Copy a job's products to where DVC expects the stage's outputs, `runs/<kind>/<row>`."""
        folder = workspace.run_folder(kind, self.row)
        folder.mkdir(parents=True, exist_ok=True)
        for name in products:
            (folder / name).unlink(missing_ok=True)  # what still goes to MLflow may be a link to it
            shutil.copyfile(job / name, folder / name)
        return folder

    def close(self) -> None:
        """Drop the jobs' folders, whose results are published, and note where the time went."""
        shutil.rmtree(self.state, ignore_errors=True)
        note_time(f"{self.name} {self.row}", self.spans)


def note_time(stage: str, spans: list[Span]) -> None:
    """Note a stage's time at its end: the whole process's, and the work's, which is when at least one job ran."""
    work, until = 0.0, 0.0
    for begun, ended in sorted(spans):
        work += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    now = time.time()
    line = {"stage": stage, "ended": now, "wall": now - psutil.Process().create_time(), "work": work}
    with (workspace.home() / "timings.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    _over.set()


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


def command(name: str, check: Callable[[str], Stage], run: Callable[[str], object]) -> None:
    """Run a stage from the command line: `python -m flows.<stage> ROW`.

    `check` comes before the flow begins, so that a user's error leaves no failed run behind and shows no traceback;
    so does the question whether another process runs the same row.
    """
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m flows.{name} ROW")
    with interruptible(f"{name} {sys.argv[1]}"):
        try:
            stage = check(sys.argv[1])
            with stage.alone():
                pass
            _checked.append(stage)
            with outliving_prefect(f"{name} {sys.argv[1]}"):
                run(sys.argv[1])
        except workspace.UserError as error:
            raise SystemExit(f"{name} {sys.argv[1]} cannot run:\n{error}") from None


def begun(check: Callable[[str], Stage], row: str) -> Stage:
    """A flow's stage: the one that `command` has checked, or, where Prefect runs the flow, one that is checked now."""
    janitor.begin()
    return _checked.pop() if _checked else check(row)


@contextmanager
def shown() -> Iterator[None]:
    """Show something on Prefect's pages; where its server does not answer this is left out, as they are only a view."""
    from httpx import HTTPError

    try:
        yield
    except HTTPError as error:
        print(f"Prefect's page of this run is not complete: {error}", file=sys.stderr, flush=True)


@contextmanager
def outliving_prefect(what: str) -> Iterator[None]:
    """Run a flow whose Prefect server may die: its work is done all the same, and only the end of its run is not told.

    Where it could not do its work without, the process ends with a message and exit code 75.
    """
    from httpx import HTTPError, HTTPStatusError

    try:
        yield
    except (HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, HTTPError):  # it says so at the start
            raise
        janitor.leave("completed" if _over.is_set() else "flow_run")
        if _over.is_set():
            print(f"{what}: done; the next run tells Prefect's server, which does not answer: {error}", file=sys.stderr)
            return
        # What the flow ended with, before it could not say so.
        own: BaseException | None = error
        while own and not isinstance(own, (workspace.UserError, StoppedError, InterruptError, KeyboardInterrupt)):
            own = own.__context__
        if own:
            raise own from None
        refused = isinstance(error, HTTPStatusError) and error.response.status_code in (401, 403)
        said = "lets nobody in without a password" if refused else "does not answer"
        mend = "give it as PREFECT_API_AUTH_STRING=NAME:PASSWORD" if refused else "start the server again (`unmask up`)"
        print(
            f"{what}: Prefect's server {said}: {workspace.first_line(error)}\n"
            f"what was trained is kept; {mend}, and the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(75)


class InterruptError(BaseException):
    """The process got SIGTERM; like KeyboardInterrupt, no handler of errors takes it for one."""


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """End the process with a message where it is interrupted: exit code 143 after SIGTERM, 130 after SIGINT.

    Running jobs have written a checkpoint by then: the flow ends its workers on the way out. A job that someone stopped
    by a signal to its own process counts as SIGTERM.
    """

    def interrupt(number: int, frame: object) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGTERM, interrupt)  # Prefect, which puts its own in its place, calls it at the end
    code = 0
    try:
        yield
    except (InterruptError, StoppedError):
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        print(f"{what}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(code)
