"""Measure points: pretrain a row with a seed, judge its encoder, and keep both where any ablation or search finds them.

A measurement is named by all that its numbers follow from: row, seed, data, code, and what it begins from. One that is
finished is read, and one that was cut off goes on from its checkpoint, whoever asks. Two who want the same at once get
it from one run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import rows, workspace
from flows.stage import Stage, published
from flows.workers import POLL_SECONDS, JobFailedError, StoppedError, Watch, Workers
from mim_core.locks import HeldError, held

WEIGHTS, PICTURE, PIXELS = "encoder.safetensors", "recovery.png", "recovered.npz"
KEPT = frozenset({"result.json", "curve.jsonl", "lock"})


@dataclass(frozen=True)
class Measured:
    """A finished measurement: its folder below .unmask/points/, and what the job gave.

    `new` is False where an earlier run had made it; `seconds` are the job's own, whenever it ran.
    """

    folder: Path
    result: Mapping[str, Any]
    new: bool

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def seconds(self) -> float:
        return float(self.result["seconds"])


def ignore(lines: list[dict[str, float]]) -> None:
    """Watch nothing."""


class Laboratory:
    """Measures points of a stage's dataset with its workers."""

    def __init__(self, stage: Stage, workers: Workers) -> None:
        self.stage, self.workers = stage, workers
        self.code = workspace.code_fingerprint()

    def pretrained(
        self, row: Mapping[str, Any], seed: int, watch: Watch = ignore, probe: Mapping[str, Any] | None = None
    ) -> Measured:
        """Pretrain a row; its folder has the encoder, the picture of recoveries and the curve.

        With `probe` (`labels`, `evaluations`) the curve has the probe's accuracy while it trains. Raises UserError
        where the tokenizer that the target needs is not fitted, JobFailedError, JobDiedError, StoppedError.
        """
        job, folder = self._pretraining(row, seed, probe)
        return self._measure(job, folder, (WEIGHTS, PICTURE, PIXELS), watch)

    def abandoned(self, row: Mapping[str, Any], seed: int, probe: Mapping[str, Any] | None = None) -> None:
        """Drop the checkpoints of a pretraining that was stopped for good; its curve stays."""
        _, folder = self._pretraining(row, seed, probe)
        # Whoever else goes on with it holds the folder, and keeps them.
        with contextlib.suppress(HeldError), held(folder / "lock", folder.name):
            if not (folder / "result.json").exists():
                self._tidy(folder, KEPT)

    def _pretraining(
        self, row: Mapping[str, Any], seed: int, probe: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], Path]:
        file, made_of = None, ""
        row = {**row, "devices": 1}  # runs go side by side instead
        if fitted := rows.fitted(row):
            start = published("tokenizer", f"targets/{fitted}", "tokenizer.safetensors", f"fit_target@{fitted}")
            file, made_of = str(start.file), start.digest()
        # What is trained is the same with a probe and without, but its curve is another.
        job = {"kind": "pretrain", "row": {**row, "seed": 0}, "seed": seed, "fitted": file}
        job |= {"probe": dict(probe)} if probe else {}
        return job, self._folder("pretrain", [{**row, "seed": seed}, made_of, probe])

    def judged(
        self, judge: Mapping[str, Any], seed: int, begun: Measured | None, test: bool, watch: Watch = ignore
    ) -> Measured:
        """Judge an encoder, or one from scratch (`begun` None, and `judge` names the encoder).

        Every rate of the judge's grid is tried, and the best one on validation images is taken; with `test` its model
        is scored on test images too.
        """
        about = {key: one for key, one in judge.items() if key not in ("init", "seeds", "lr_grid")}
        init = str(begun.folder / WEIGHTS) if begun else None

        def at(rate: float, scored: bool) -> Measured:
            job = {"kind": "downstream", "row": {**judge, "seeds": [0]}, "seed": seed, "lr": rate, "init": init}
            named = [about, seed, rate, begun.key if begun else None, scored]
            return self._measure({**job, "test": scored}, self._folder("downstream", named), (), watch)

        rates = judge["lr_grid"] or [0.0]
        runs = [at(rate, test and len(rates) == 1) for rate in rates]
        best = max(range(len(rates)), key=lambda index: float(runs[index].result["validation_score"]))
        chosen = runs[best]
        if test and len(rates) > 1:
            chosen = at(rates[best], True)
            runs.append(chosen)
        result = {**chosen.result, "lr": rates[best], "seconds": sum(one.seconds for one in runs)}
        return Measured(chosen.folder, result, any(one.new for one in runs))

    def _folder(self, kind: str, named: Any) -> Path:
        key = workspace.digest([kind, named, self.stage.data, self.code])
        return workspace.home() / "points" / f"{kind}-{key[:20]}"

    def _measure(self, job: dict[str, Any], folder: Path, kept: tuple[str, ...], watch: Watch) -> Measured:
        done = folder / "result.json"
        if not done.exists():
            with self._alone(folder):
                if not done.exists():
                    work = {**job, "pack": str(self.stage.pack), "folder": str(folder)}
                    result = self.workers.run(work, watch)
                    workspace.write_json(done, result)
                    self._tidy(folder, {*KEPT, *kept})
                    return Measured(folder, result, True)
        return Measured(folder, json.loads(done.read_text()), False)

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Hold a measurement, or wait for it; raises StoppedError where the wait has to end, JobFailedError where it
        would not end by itself."""
        try:
            with held(folder / "lock", f"the measurement {folder.name}", lambda: self.workers.stopping, POLL_SECONDS):
                yield
        except HeldError as error:
            raise (StoppedError(0) if self.workers.stopping else JobFailedError(str(error))) from None

    @staticmethod
    def _tidy(folder: Path, kept: Set[str]) -> None:
        """Drop what nobody reads again: checkpoints are several times as large as the encoder."""
        for path in folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def each(watched: Watch, prefix: str) -> Watch:
    """Watch a curve with the names of its values prefixed, for a run that holds several."""

    def watch(new: list[dict[str, float]]) -> bool | None:
        own = ("step", "steps", "time", "seconds")
        return watched([{key if key in own else f"{prefix}{key}": one for key, one in line.items()} for line in new])

    return watch
