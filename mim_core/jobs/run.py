"""What the jobs share: a run's files while it trains, its optimiser, and what it says of itself at the end."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim_core import checkpoint, devices, ranks
from mim_core.cores import cores
from mim_core.data.order import Order, loader
from mim_core.data.pack import Pack
from mim_core.files import read_curve, write_atomically
from mim_core.optim import OPTIMISERS, SCHEDULES, WITH_BETAS, Average, Player, param_groups
from mim_core.params import FineTune
from mim_core.spec import Piece, bind, build
from mim_core.train import NonFiniteLossError, Objective, Scalars, train

REPORTS = 100
APART = 150
"""Least steps from one evaluation to the next: each costs as much as some ten steps."""
TRIES = 3
"""How often the steps between two reports are tried again, each time at half the rate, where they end in NaN."""
NONFINITE = "nonfinite.json"
READERS = 4
"""Processes that read for a GPU, at most: a GPU is quicker than one that reads and trains."""
WINDOW = "window"
"""The name among a checkpoint's players of the sums since the last report."""


@dataclass
class Stop:
    """Whether the job that this process has at present is asked to stop; a process has one job at a time."""

    asked: bool = False


STOP = Stop()


class MemoryFullError(RuntimeError):
    """A device's memory, or the machine's, does not hold what a row asks for."""


@dataclass
class Run:
    """The files of a job while it trains; of several ranks, rank 0 writes them and all read them."""

    folder: Path
    model: nn.Module
    players: Mapping[str, Player]
    steps: int
    minutes: float
    seconds: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)
    window: dict[str, Tensor] = field(default_factory=dict)
    slowed: dict[int, int] = field(default_factory=dict)
    """How often the rate is halved in the steps from one report (the key: steps done) to the next."""
    first: dict[str, Tensor] = field(default_factory=dict)
    """What the weights were before any step, until there is a checkpoint to go back to."""
    judging: bool = False
    """Whether the run is in an evaluation at present."""

    def resume(self) -> int:
        """Load the newest whole checkpoint, cut the curve back to it, and give the steps done."""
        if ranks.number():
            ranks.agreed(True)  # rank 0 sets damaged checkpoints aside first
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.newest(self.folder / "checkpoints")
        step = 0
        for player in self.players.values():
            if player.average:
                player.average.begin()
        if found:
            about, weights, players = found
            self.model.load_state_dict({**self._frozen(), **weights})
            for name, player in self.players.items():
                player.load_state_dict(players[name])
            self.window = {name: one.to(_device(self.model)) for name, one in players[WINDOW].items()}
            step, self.seconds = about["step"], about["seconds"]
            self.slowed = {int(key): tries for key, tries in about["slowed"].items()} | self.slowed
        if ranks.number():
            return step
        curve = self.folder / "curve.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_curve(curve) if line["step"] <= step]
        write_atomically(curve, "".join(kept))
        ranks.agreed(True)
        return step

    def _frozen(self) -> dict[str, Tensor]:
        """Parameters that no optimiser moves."""
        return {name: one.data for name, one in self.model.named_parameters() if not one.requires_grad}

    def elapsed(self) -> float:
        """Seconds of training, over all the processes that worked on it."""
        return self.seconds + time.perf_counter() - self.begun

    def report(self, step: int, scalars: Scalars) -> None:
        if ranks.number():
            return
        line = {"step": step, "steps": self.steps, "seconds": self.elapsed(), "time": time.time(), **scalars}
        text, curve = json.dumps(line) + "\n", self.folder / "curve.jsonl"
        with checkpoint.written(curve, len(text)), curve.open("a") as file:
            file.write(text)

    def save(self, step: int, now: bool = False) -> None:
        """Write a checkpoint where its minutes have passed, at the end, and `now` where that is asked for.

        Frozen parameters are not written: they are there before a resume as they were at the start.
        """
        window = {name: ranks.mean(one) for name, one in self.window.items()}
        if ranks.number():
            return
        if not now and step < self.steps and time.perf_counter() - self.saved < self.minutes * 60:
            return
        frozen = self._frozen()
        weights = {name: one for name, one in self.model.state_dict().items() if name not in frozen}
        players = {name: player.state_dict() for name, player in self.players.items()}
        players[WINDOW] = {name: one.cpu() for name, one in window.items()}
        about = {"seconds": self.elapsed(), "slowed": self.slowed}
        checkpoint.save(self.folder / "checkpoints", step, weights, players, about)
        self.first, self.saved = {}, time.perf_counter()

    def train(
        self,
        objective: Objective,
        fetch: Callable[..., Any],
        order: Order,
        evaluate: Callable[[int], Scalars],
        evaluations: int,
    ) -> None:
        """Train from the newest checkpoint to the end; averaged weights are evaluated, and stay in the model.

        Where a loss, a gradient or a weight is not finite, the run goes back to a checkpoint and takes the steps since
        the last report at half the rate; then at a quarter, with those since the report before, as the harm may lie
        there; and so on, TRIES times at most. Which steps are slow depends on neither checkpoints nor the clock.

        Raises StoppedError where `STOP` asks for it, after a checkpoint; NonFiniteLossError after the last try;
        MemoryFullError, which says which keys to set.
        """
        start = self.resume()
        if not start:
            frozen = self._frozen()
            state = self.model.state_dict()
            self.first = {name: one.to("cpu", copy=True) for name, one in state.items() if name not in frozen}
        every = max(1, self.steps // REPORTS)
        for player in self.players.values():
            player.rate = partial(self._rate, player.rate, every)
        while True:
            try:
                self._train(objective, fetch, order, start, evaluate, evaluations)
                return
            except NonFiniteLossError as error:
                start = self._back(error, order, every)
            except (RuntimeError, MemoryError) as error:
                if not devices.out_of_memory(error):
                    raise
                raise MemoryFullError(self._full(str(error), order.batch)) from error

    def _full(self, said: str, batch: int) -> str:
        """Say what was too much for the memory, and what to set."""
        # Halving the batch here would not be the same training: losses are means over what a whole batch hides, and
        # batch norms, mixing and critics see the batch at once. So it is the row's to say.
        first = (said.strip().splitlines() or ["full"])[0]
        mend = (
            "set precision: bf16 where the device has it, or take a smaller encoder, larger patches or smaller images"
        )
        if self.judging:
            found = "an evaluation"
        else:
            found = f"a step of {batch} images"
            mend = f"lower optim.batch (a rate given as base_lr goes with it, one given as lr does not), {mend}"
        other = "where something else fills it, end that, and the same command goes on from the last checkpoint"
        return f"{self.folder}: the memory does not hold {found} ({first}); {mend}; {other}"

    def _rate(self, rate: Callable[[int], float], every: int, step: int) -> float:
        tries = self.slowed.get(step - step % every, 0)
        return rate(step) / 2**tries if tries else rate(step)

    def _back(self, error: NonFiniteLossError, order: Order, every: int) -> int:
        """Go back to a checkpoint, or to the beginning, and note to be slower; gives the steps done.

        Raises the error, with what was tried and seen, where it was tried often enough.
        """
        tries = self.slowed.get(error.since, 0)
        if tries == TRIES:
            until = min(error.since + every, self.steps)
            batches = list(Order(order.indices, order.batch, order.seed, error.since, until))
            images = [[index for _, index in batch] for batch in batches]
            note = {
                "error": str(error),
                "after_step": error.since,
                "seed": order.seed,
                "tries": tries,
                "images": images,
            }
            if not ranks.number():
                write_atomically(self.folder / NONFINITE, json.dumps(note))
            seen = ", ".join(str(index) for index in images[0][:8])
            error.args = (
                f"{error}. Tried {tries} times more from a checkpoint, at down to 1/{2**tries} of the rate. "
                f"The batches hold the training images {seen}, ...: all are in {self.folder / NONFINITE}",
            )
            raise error
        slow = [error.since - every * back for back in range(tries + 1)]
        self.slowed |= {since: max(tries + 1, self.slowed.get(since, 0)) for since in slow}
        if not ranks.number():
            checkpoint.drop_after(self.folder / "checkpoints", slow[-1])
        spent = self.elapsed()
        step = self.resume()
        if not step:
            self.model.load_state_dict({**self._frozen(), **self.first})
            self.window = {}
            for player in self.players.values():
                player.optimiser.state.clear()
                if player.average:
                    player.average.begin()
        self.seconds, self.begun = spent, time.perf_counter()
        warnings.warn(
            f"{self.folder}: {error}: again from step {step}, at 1/{2 ** (tries + 1)} of the rate", stacklevel=2
        )
        return step

    def _train(
        self,
        objective: Objective,
        fetch: Callable[..., Any],
        order: Order,
        start: int,
        evaluate: Callable[[int], Scalars],
        evaluations: int,
    ) -> None:
        every, device = max(1, self.steps // REPORTS), _device(self.model)
        readers = min(READERS, cores() - 1) if devices.pays(device, self.steps) else 0
        self.judging = False  # an evaluation may have been what it went back from
        averages = [player.average for player in self.players.values() if player.average]

        def judge(step: int) -> Scalars:
            if ranks.number():
                return {}
            with ExitStack() as stack:
                for average in averages:
                    stack.enter_context(average.worn())
                stack.enter_context(devices.uncompiled(device))
                self.judging = True
                scalars = evaluate(step)
                self.judging = False
                return scalars

        train(
            objective,
            self.players,
            loader(
                fetch,
                replace(order, start=start, rank=ranks.number(), ranks=ranks.count()),
                readers,
                device.type == "cuda",
            ),
            seed=order.seed,
            start=start,
            steps=self.steps,
            report=self.report,
            report_every=every,
            save=self.save,
            save_every=every,
            evaluate=judge,
            evaluate_every=max(1, self.steps // evaluations),
            stop=lambda: STOP.asked,
            window=self.window,
        )
        for average in averages:
            average.wear()


def evaluations(steps: int, most: int) -> int:
    """How often a run is evaluated: `most` times, unless that were less than `APART` steps apart."""
    return min(most, max(1, steps // APART))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def player(
    optim: FineTune,
    images: int,
    model: nn.Module,
    lr: float,
    *,
    no_decay: Callable[[str], bool] = lambda name: False,
    layer: Callable[[str], int] = lambda name: 0,
    layers: int = 1,
    factor: Callable[[str], float] = lambda name: 1.0,
) -> tuple[int, Player]:
    """Make the optimiser and schedule of a model; gives the steps in all too. See `param_groups` for the functions."""
    steps, warmup = optim.steps(images)
    groups = param_groups(
        model.named_parameters(),
        weight_decay=optim.weight_decay,
        no_decay=no_decay,
        layer=layer,
        layers=layers,
        layer_decay=optim.layer_decay,
        factor=factor,
    )
    schedule = bind(SCHEDULES, optim.schedule)
    start, floor = lr * optim.warmup_from, lr * optim.floor
    rate = partial(schedule, total=steps, peak=lr, warmup=warmup, floor=floor, start=start)
    given = (groups, optim.betas) if optim.optimiser.name in WITH_BETAS else (groups,)
    average = Average(model, optim.ema) if optim.ema else None
    return steps, Player(build(OPTIMISERS, optim.optimiser, *given), rate, optim.clip, average)


def about(encoder: Piece, pack: Pack) -> dict[str, Any]:
    """What a file of weights says in its header: how to build the encoder, and to read and normalise its images."""
    source = pack.meta.get("row", {}).get("source", {})
    return {
        "encoder": encoder.model_dump(mode="json"),
        "size": list(pack.size),
        "channels": pack.channels,
        "mean": pack.mean,
        "std": pack.std,
        "reading": {"channels": source.get("channels", "rgb"), "fit": source.get("fit", "cover")},
    }


def result(folder: Path, images: int, model: nn.Module, compute: devices.Compute) -> dict[str, Any]:
    """Sum a job up from its curve: the last value of each scalar, seconds, images seen."""
    last: dict[str, Any] = {}
    for line in read_curve(folder / "curve.jsonl"):
        last |= line
    described = devices.describe(compute)
    if described["type"] == "cuda" and ranks.count() > 1:
        described["devices"] = ranks.count()
    drop = {"time", "images_per_s", "lr", "grad_norm", "critic_grad_norm", "step", "steps"}
    return {
        **{key: value for key, value in last.items() if key not in drop},
        "steps": last["step"],
        "images_seen": images,
        "images_per_s": images / last["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compute": described,
    }
