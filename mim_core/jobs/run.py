"""What the jobs share: a run's files while it trains, its optimiser, and what it says of itself at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mim_core import checkpoint, devices
from mim_core.data.order import Order, loader
from mim_core.data.pack import Pack
from mim_core.files import read_curve, write_atomically
from mim_core.optim import SCHEDULES, Player, adamw, param_groups
from mim_core.params import FineTune
from mim_core.spec import Piece, bind
from mim_core.train import Objective, Scalars, train

REPORTS = 100


@dataclass
class Run:
    """The files of a job while it trains."""

    folder: Path
    model: nn.Module
    players: Mapping[str, Player]
    steps: int
    minutes: float
    seconds: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    saved: float = field(default_factory=time.perf_counter)

    def resume(self) -> int:
        """Load the newest checkpoint, cut the curve back to it, and give the steps done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(self.folder / "checkpoints")
        step = 0
        if found:
            about, weights, optimisers = checkpoint.load(found)
            self.model.load_state_dict(weights)
            for name, player in self.players.items():
                player.optimiser.load_state_dict(optimisers[name])
            step, self.seconds = about["step"], about["seconds"]
        curve = self.folder / "curve.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_curve(curve) if line["step"] <= step]
        write_atomically(curve, "".join(kept))
        return step

    def elapsed(self) -> float:
        """Seconds of training, over all the processes that worked on it."""
        return self.seconds + time.perf_counter() - self.begun

    def report(self, step: int, scalars: Scalars) -> None:
        line = {"step": step, "steps": self.steps, "seconds": self.elapsed(), "time": time.time(), **scalars}
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, step: int) -> None:
        """Write a checkpoint where its minutes have passed, and at the end."""
        if step < self.steps and time.perf_counter() - self.saved < self.minutes * 60:
            return
        optimisers = {name: player.optimiser.state_dict() for name, player in self.players.items()}
        about = {"seconds": self.elapsed()}
        checkpoint.save(self.folder / "checkpoints", step, self.model.state_dict(), optimisers, about)
        self.saved = time.perf_counter()

    def train(
        self,
        objective: Objective,
        fetch: Callable[..., Any],
        order: Order,
        evaluate: Callable[[int], Scalars],
        evaluations: int,
    ) -> None:
        start = self.resume()
        every = max(1, self.steps // REPORTS)
        train(
            objective,
            self.players,
            loader(fetch, Order(order.indices, order.batch, order.seed, start, self.steps)),
            seed=order.seed,
            start=start,
            steps=self.steps,
            report=self.report,
            report_every=every,
            save=self.save,
            save_every=every,
            evaluate=evaluate,
            evaluate_every=max(1, self.steps // evaluations),
        )


def player(
    optim: FineTune,
    images: int,
    model: nn.Module,
    lr: float,
    *,
    no_decay: Callable[[str], bool] = lambda name: False,
    layer: Callable[[str], int] = lambda name: 0,
    layers: int = 1,
) -> tuple[int, Player]:
    """Make the optimiser and schedule of a model; gives the steps in all too."""
    steps, warmup = optim.steps(images)
    groups = param_groups(
        model.named_parameters(),
        weight_decay=optim.weight_decay,
        no_decay=no_decay,
        layer=layer,
        layers=layers,
        layer_decay=optim.layer_decay,
    )
    schedule = bind(SCHEDULES, optim.schedule)
    start, floor = lr * optim.warmup_from, lr * optim.floor
    rate = partial(schedule, total=steps, peak=lr, warmup=warmup, floor=floor, start=start)
    return steps, Player(adamw(groups, optim.betas), rate, optim.clip)


def about(encoder: Piece, pack: Pack) -> dict[str, Any]:
    """What a file of weights says in its header: how to build the encoder and normalise its images."""
    return {
        "encoder": encoder.model_dump(mode="json"),
        "size": list(pack.size),
        "channels": pack.channels,
        "mean": pack.mean,
        "std": pack.std,
    }


def result(folder: Path, images: int, model: nn.Module, compute: devices.Compute) -> dict[str, Any]:
    """Sum a job up from its curve: the last value of each scalar, seconds, images seen."""
    last: dict[str, Any] = {}
    for line in read_curve(folder / "curve.jsonl"):
        last |= line
    drop = {"time", "images_per_s", "lr", "grad_norm", "critic_grad_norm", "step", "steps"}
    return {
        **{key: value for key, value in last.items() if key not in drop},
        "steps": last["step"],
        "images_seen": images,
        "images_per_s": images / last["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compute": devices.describe(compute),
    }
