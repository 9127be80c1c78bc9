"""Jobs: one training run from a row to files on disk, resumed where a checkpoint lies.

A job works in its own folder: `curve.jsonl` (a line a report), `checkpoints/`, and its products. Nothing else is
needed to go on after a kill, and nothing here knows who started it. `python -m mim_core.jobs` reads jobs as JSON, a
line each, from standard input and answers each with a line, so that one process serves many jobs and ends with its
parent.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mim_core import checkpoint, devices, gallery
from mim_core.data.order import Order, loader
from mim_core.data.pack import Pack, label_budget, open_pack
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve, write_atomically
from mim_core.fills import FILLS
from mim_core.heads import HEADS
from mim_core.losses import LOSSES
from mim_core.masks import MASKS
from mim_core.metrics import hole_psnr
from mim_core.optim import Player, adamw, cosine, param_groups
from mim_core.params import DownstreamRow, EncoderOf, FineTune, PretrainRow
from mim_core.pretext import MaskedFetch, MaskedModel, Pretext
from mim_core.spec import Piece, bind, build, check
from mim_core.targets import TARGETS
from mim_core.tasks.classify import Classification, Classifier, LabelledFetch
from mim_core.train import Objective, Scalars, train

REPORTS, EVALUATIONS = 100, 8
VALIDATED, SHOWN = 512, 8


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


def pretrain(row: PretrainRow, pack: Pack, folder: Path, seed: int) -> dict[str, Any]:
    """Pretrain a row on a pack's training images; products: encoder, whole model, gallery.

    Gives the final scalars: losses, hole-only PSNR in dB on validation images, seconds, images seen.
    """
    compute = devices.choose(precision=row.precision)
    torch.manual_seed(seed)
    encoder = build(ENCODERS, row.encoder, pack.size, pack.channels)
    target = build(TARGETS, row.target, encoder.grid, pack.mean, pack.std)
    model = MaskedModel(
        encoder, build(FILLS, row.fill, encoder.width), build(HEADS, row.head, encoder.width, target.values)
    )
    compute.prepare(model)
    mask, loss = bind(MASKS, row.mask), bind(LOSSES, row.loss)
    objective = Pretext(model, target.to(compute.device), loss, row.loss.scope, pack, compute)  # type: ignore[attr-defined]
    images = pack.split("train")
    steps, player = _player(row.optim, len(images), model, lambda name: _undecayed(encoder, name), row.optim.lr)
    run = Run(folder, model, {"model": player}, steps, row.checkpoint_minutes)
    # Validation masks are those of epoch 0 under the row's seed: the same at every evaluation.
    held = pack.split("validation")
    seen = MaskedFetch(held, encoder.grid, mask, None, seed)([(0, i) for i in range(min(VALIDATED, len(held)))])

    def evaluate(step: int) -> Scalars:
        model.eval()
        with torch.no_grad():
            (_, value), *_ = objective.losses(seen)
        pictures = objective.recover(seen)
        model.train()
        psnr = hole_psnr(pictures["composites"], pictures["originals"], pictures["hidden"])
        if step == steps:
            few = {name: images[:SHOWN] for name, images in pictures.items()}
            share = seen.hidden.float().mean().item()
            caption = f"Reconstructions of validation images, {share:.0%} hidden, mean hole PSNR {psnr:.1f} dB"
            notes = [f"Borrowed: {target.borrows}."] if target.borrows else []
            if row.loss.scope == "hidden":  # type: ignore[attr-defined]
                notes.append("Predictions of visible patches are not trained.")
            gallery.draw(few, caption, " ".join(notes)).save(folder / "gallery.png")
        return {"validation_loss": value.item(), "hole_psnr": psnr}

    batch = min(row.optim.batch, len(images))
    order = Order(np.arange(len(images)), batch, seed, 0, steps)
    run.train(objective, MaskedFetch(images, encoder.grid, mask, row.augment, seed), order, evaluate, EVALUATIONS)
    about = _about(row.encoder, pack)
    checkpoint.write_weights(folder / "encoder.safetensors", encoder.state_dict(), about)
    checkpoint.write_weights(folder / "model.safetensors", model.state_dict(), {"row": row.model_dump(mode="json")})
    return {**_result(folder, steps * batch, model, compute), "about": about}


def classify(
    row: DownstreamRow, pack: Pack, folder: Path, seed: int, lr: float, init: Path | None, test: bool
) -> dict[str, Any]:
    """Fine-tune a row with one seed and learning rate; test images are read only where `test` asks for the last score.

    A finished job that is run again with `test` is not trained again: its weights are there.
    """
    compute = devices.choose(precision=row.precision)
    torch.manual_seed(seed)
    piece, weights = row.encoder, None
    if init:
        weights, about = checkpoint.read_weights(init)
        piece = check(EncoderOf, {"encoder": about.get("encoder")}, str(init)).encoder
    assert piece is not None, "params.load holds that a row from scratch names its encoder"
    encoder = build(ENCODERS, piece.model_copy(update={"drop_path": row.drop_path}), pack.size, pack.channels)
    if weights is not None:
        encoder.load_state_dict(weights)
    model = Classifier(encoder, len(pack.classes))
    compute.prepare(model)
    objective = Classification(model, pack, compute, row.smoothing)
    images, held = pack.split("train"), pack.split("validation")
    chosen = label_budget(images.labels, row.labels, seed)

    def layer(name: str) -> int:
        inner = name.removeprefix("encoder.")
        return int(encoder.layer(inner)) if inner != name else encoder.depth + 1

    steps, player = _player(
        row.optim, len(chosen), model, lambda name: _undecayed(encoder, name), lr, layer, encoder.depth + 2
    )
    run = Run(folder, model, {"model": player}, steps, row.checkpoint_minutes)

    def evaluate(step: int) -> Scalars:
        return {f"validation_{key}": value for key, value in objective.evaluate(held).items()}

    batch = min(row.optim.batch, len(chosen))
    order = Order(chosen, batch, seed, 0, steps)
    run.train(objective, LabelledFetch(images, row.augment, seed), order, evaluate, EVALUATIONS // 2)
    result = _result(folder, steps * batch, model, compute)
    if test:
        about = {**_about(piece, pack), "classes": pack.classes}
        checkpoint.write_weights(folder / "classifier.safetensors", model.state_dict(), about)
        result |= {f"test_{key}": value for key, value in objective.evaluate(pack.split("test")).items()}
    return result


def _undecayed(encoder: Any, name: str) -> bool:
    return name.removeprefix("encoder.") in encoder.no_weight_decay()


def _player(
    optim: FineTune,
    images: int,
    model: nn.Module,
    no_decay: Callable[[str], bool],
    lr: float,
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
    rate = partial(cosine, total=steps, peak=lr, warmup=warmup, floor=lr * optim.floor)
    return steps, Player(adamw(groups, optim.betas), rate, optim.clip)


def _about(encoder: Piece, pack: Pack) -> dict[str, Any]:
    return {
        "encoder": encoder.model_dump(mode="json"),
        "size": list(pack.size),
        "channels": pack.channels,
        "mean": pack.mean,
        "std": pack.std,
    }


def _result(folder: Path, images: int, model: nn.Module, compute: devices.Compute) -> dict[str, Any]:
    """Sum a job up from its curve: the last value of each scalar, seconds, images seen."""
    last: dict[str, Any] = {}
    for line in read_curve(folder / "curve.jsonl"):
        last |= line
    drop = {"time", "images_per_s", "lr", "grad_norm", "step", "steps"}
    return {
        **{key: value for key, value in last.items() if key not in drop},
        "steps": last["step"],
        "images_seen": images,
        "images_per_s": images / last["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compute": devices.describe(compute),
    }


def perform(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job as it comes over the wire: `kind`, `row`, `pack`, `folder`, `seed`, and for classify `lr`, `init`,
    `test`."""
    pack, folder, seed = open_pack(Path(job["pack"])), Path(job["folder"]), job["seed"]
    torch.set_num_threads(job["threads"])
    if job["kind"] == "pretrain":
        return pretrain(check(PretrainRow, job["row"], "row"), pack, folder, seed)
    row, init = check(DownstreamRow, job["row"], "row"), job["init"]
    return classify(row, pack, folder, seed, job["lr"], Path(init) if init else None, job["test"])


def main() -> None:
    """Serve jobs from standard input until it closes, which it does when the parent dies, also in the middle of a
    job."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not lie between the answers
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        line = waiting.get()
        begun = time.time()
        try:
            answer = {"result": perform(json.loads(line)), "span": [begun, time.time()]}
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
