"""Live progress of a stage: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 10.0


class Bar:
    """Progress of the jobs of a stage, fed with the lines of their curves."""

    def __init__(self, title: str, jobs: int) -> None:
        self.title, self.jobs = title, jobs
        self.lock = threading.Lock()
        self.latest: dict[str, Mapping[str, float]] = {}
        self.first: dict[str, float] = {}
        self.begun = self.told = time.monotonic()
        self.counted = "", self.begun, self.begun
        """What is counted, since when, and when it was last."""
        self.console = Console(file=sys.stdout)
        self.bar: Progress | None = None

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[said]}"))
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=1.0, said="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif self.latest:
            self._say()

    def update(self, job: str, lines: Sequence[Mapping[str, float]]) -> None:
        """Take new lines of a job's curve."""
        if not lines:
            return
        with self.lock:
            self.first.setdefault(job, lines[0]["step"] / lines[0]["steps"])
            self.latest[job] = {**self.latest.get(job, {}), **{k: v for line in lines for k, v in line.items()}}
            if self.bar:
                self.bar.update(self.task, completed=self._done(), said=self._text())
            elif time.monotonic() - self.told > LINE_SECONDS:
                self._say()

    def _say(self) -> None:
        self.told = time.monotonic()
        print(f"  {self.title}  {self._text()}", flush=True)

    def _done(self) -> float:
        return sum(line["step"] / line["steps"] for line in self.latest.values()) / self.jobs

    def _text(self) -> str:
        running = [line for line in self.latest.values() if line["step"] < line["steps"]]
        shown = running or list(self.latest.values())
        speed = sum(line.get("images_per_s", 0.0) for line in shown)
        loss = sum(line.get("loss", 0.0) for line in shown) / len(shown)
        done = self._done()
        if self.jobs == 1:
            steps = f"step {shown[0]['step']:.0f}/{shown[0]['steps']:.0f}"
        else:
            over = sum(line["step"] >= line["steps"] for line in self.latest.values())
            steps = f"{over}/{self.jobs} runs, {done:4.0%}"
        # What was done before this process began (a resume) says nothing about its pace.
        new = done - sum(self.first.values()) / self.jobs
        spent = time.monotonic() - self.begun
        left = f"{spent / new * (1 - done):.0f} s left" if new > 0 else ""
        return f"{steps}  loss {loss:.4f}  {speed:.0f} images/s  {left}"

    def count(self, done: int, total: int, here: int | None = None, name: str = "") -> None:
        """Take the number of images done, for a stage that counts images instead of steps.

        `here` leaves out those that a process before this one has done, and `name` says which of a stage's works it is.
        """
        now = time.monotonic()
        if name != self.counted[0]:
            self.counted = name, self.counted[2], now
        begun = self.counted[1]
        pace = (done if here is None else here) / max(now - begun, 1e-3)
        left = f"  {(total - done) / pace:.0f} s left" if pace else ""
        said = f"{name} {done}/{total}  {pace:.0f} images/s{left}".lstrip()
        self.counted = name, begun, now
        if self.bar:
            self.bar.update(self.task, completed=done / total, said=said)
        elif now - self.told > LINE_SECONDS:
            self.told = now
            print(f"  {self.title}  {said}", flush=True)
