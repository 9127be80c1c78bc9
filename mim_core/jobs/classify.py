"""Fine-tune a row for classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mim_core import checkpoint, devices
from mim_core.data.order import Order
from mim_core.data.pack import Pack, label_budget
from mim_core.encoders import ENCODERS
from mim_core.encoders.interpolate import adapt
from mim_core.jobs.run import Run, about, player, result
from mim_core.params import DownstreamRow, EncoderOf
from mim_core.spec import Piece, build, check
from mim_core.tasks.classify import Classification, Classifier, LabelledFetch
from mim_core.train import Scalars

EVALUATIONS = 4


def classify(
    row: DownstreamRow, pack: Pack, folder: Path, seed: int, lr: float, init: Path | None, test: bool
) -> dict[str, Any]:
    """Fine-tune a row with one seed and learning rate; test images are read only where `test` asks for the last score.

    A finished job that is run again with `test` is not trained again: its weights are there.
    """
    compute = devices.choose(precision=row.precision)
    torch.manual_seed(seed)
    piece, weights, before = row.encoder, None, None
    if init:
        weights, said = checkpoint.read_weights(init)
        piece = check(EncoderOf, {"encoder": said.get("encoder")}, str(init)).encoder
        before = tuple(said["size"])
    assert piece is not None, "params.load holds that a row from scratch names its encoder"
    piece = tuned(piece, row.drop_path)
    encoder = build(ENCODERS, piece, pack.size, pack.channels)
    if weights is not None:
        encoder.load_state_dict(adapt(weights, encoder, before))
    model = Classifier(encoder, len(pack.classes))
    compute.prepare(model)
    objective = Classification(model, pack, compute, row.smoothing)
    images, held = pack.split("train"), pack.split("validation")
    chosen = label_budget(images.labels, row.labels, seed)

    def layer(name: str) -> int:
        inner = name.removeprefix("encoder.")
        return int(encoder.layer(inner)) if inner != name else encoder.depth + 1

    def no_decay(name: str) -> bool:
        return name.removeprefix("encoder.") in encoder.no_weight_decay()

    layers = encoder.depth + 2
    steps, own = player(row.optim, len(chosen), model, lr, no_decay=no_decay, layer=layer, layers=layers)
    run = Run(folder, model, {"model": own}, steps, row.checkpoint_minutes)

    def evaluate(step: int) -> Scalars:
        return {f"validation_{key}": value for key, value in objective.evaluate(held).items()}

    batch = min(row.optim.batch, len(chosen))
    order = Order(chosen, batch, seed, 0, steps)
    run.train(objective, LabelledFetch(images, row.augment, seed), order, evaluate, EVALUATIONS)
    found = result(folder, steps * batch, model, compute)
    if test:
        head = {**about(piece, pack), "classes": pack.classes}
        checkpoint.write_weights(folder / "classifier.safetensors", model.state_dict(), head)
        found |= {f"test_{key}": value for key, value in objective.evaluate(pack.split("test")).items()}
    return found


def tuned(encoder: Piece, drop_path: float) -> Piece:
    """Give the form in which an encoder is fine-tuned: with the row's drop path, and a relative bias of each block's
    own, which begins as the one that all blocks shared (BEiT's published fine-tuning)."""
    changes: dict[str, Any] = {"drop_path": drop_path} if "drop_path" in encoder.params() else {}
    if encoder.params().get("positions") == "relative":
        changes["positions"] = "relative_per_block"
    return encoder.model_copy(update=changes)
