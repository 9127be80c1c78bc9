"""Train and judge a row of a downstream task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mim_core import checkpoint, devices, inference, published
from mim_core.data.order import Order
from mim_core.data.pack import Pack, label_budget
from mim_core.encoders import ENCODERS
from mim_core.encoders.interpolate import adapt
from mim_core.jobs.run import Run, about, evaluations, player, result
from mim_core.params import DownstreamRow, EncoderOf
from mim_core.spec import Pair, Piece, Strict, build, check
from mim_core.tasks import TASKS
from mim_core.tasks.task import Facts, sight, tuned
from mim_core.train import Scalars

Colours = tuple[tuple[float, ...], tuple[float, ...]]
EVALUATIONS = 4
WEIGHTS, PICTURE = "model.safetensors", "predictions.png"


@dataclass(frozen=True)
class Begin:
    """The encoder that a file holds: its piece, its weights and the (height, width) in px that they were trained at.

    `colours`: mean and deviation of each channel that its images were normalised by; they stay its own, as in the
    papers, whatever it is judged on. `notes`: what is to be known of published weights.
    """

    encoder: Piece
    weights: dict[str, Tensor]
    size: tuple[int, int] | None
    colours: Colours | None
    notes: tuple[str, ...] = ()


def downstream(
    row: DownstreamRow, pack: Pack, folder: Path, seed: int, lr: float, init: Path | str | None, test: bool
) -> dict[str, Any]:
    """Train a row with one seed and learning rate; test images are read only where `test` asks for the last score.

    `init` is the file of weights to begin from. A finished job that is run again with `test` is not trained again: its
    weights are there. Gives the final scalars; `validation_score` and `test_score` are the task's own metric. With
    `test` also an `example` of what the model answers, see `inference.example`.
    """
    compute = devices.choose(precision=row.precision)
    torch.manual_seed(seed)
    begun = begin(Path(init)) if init else None
    piece = begun.encoder if begun else row.encoder
    assert piece is not None, "params.load holds that a row from scratch names its encoder"
    piece = tuned(piece, row.drop_path, row.window)
    sees = sight(row.task, pack.size)
    encoder = build(ENCODERS, piece, sees, pack.channels)
    if begun:
        encoder.load_state_dict(adapt(begun.weights, encoder, begun.size))
    facts = Facts.of(pack)
    if begun and begun.colours:
        mean, std = begun.colours
        facts = replace(facts, mean=mean, std=std)
    task = build(TASKS, row.task, encoder, facts, compute)
    model = task.model
    compute.prepare(model)
    images = pack.split("train")
    labelled = task.labelled(images)
    classes = np.full(len(images), -1)
    # Images without a class are as good as one another for a budget of labels.
    classes[labelled] = np.maximum(images.labels[labelled], 0)
    chosen = label_budget(classes, row.labels, seed)
    task.begin(images, chosen)

    def layer(name: str) -> int:
        inner = name.removeprefix("encoder.")
        return int(encoder.layer(inner)) if inner != name else encoder.depth + 1

    def no_decay(name: str) -> bool:
        return name.removeprefix("encoder.") in encoder.no_weight_decay()

    def judge(split: str) -> Scalars:
        found: Scalars = task.evaluate(pack.split(split))
        return {f"{split}_score": found[task.score], **{f"{split}_{key}": value for key, value in found.items()}}

    if row.optim is None:
        run = Run(folder, model, {}, 1, row.checkpoint_minutes)
        run.resume()
        run.report(1, judge("validation"))
        seen = len(chosen)
    else:
        layers = encoder.depth + 2
        own_rate = getattr(task, "factor", lambda name: 1.0)  # most tasks' own layers learn at the full rate
        steps, own = player(
            row.optim, len(chosen), model, lr, no_decay=no_decay, layer=layer, layers=layers, factor=own_rate
        )
        run = Run(folder, model, {"model": own}, steps, row.checkpoint_minutes)
        batch = min(row.optim.batch, len(chosen))
        order = Order(chosen, batch, seed, 0, steps)
        fetch, times = task.fetch(images, row.augment, seed), evaluations(steps, EVALUATIONS)
        run.train(task, fetch, order, lambda step: judge("validation"), times)
        seen = steps * batch
    found = {**result(folder, seen, model, compute), "metric": task.score, "encoder": piece.model_dump(mode="json")}
    if begun and begun.notes:
        found["notes"] = list(begun.notes)
    if test:
        head = {**about(piece, pack), "sees": sees, "task": row.task.model_dump(mode="json"), "classes": pack.classes}
        head |= {"segments": pack.meta.get("segments", []), "annotations": pack.meta["annotations"]}
        head |= {"precision": row.precision, "mean": facts.mean, "std": facts.std}
        checkpoint.write_weights(folder / WEIGHTS, model.state_dict(), head)
        found |= judge("test")
        task.draw(pack.split("test"), folder / PICTURE)
        found["example"] = inference.example(folder / WEIGHTS, np.array(pack.split("test").images[0]))
    return found


def begin(file: Path) -> Begin:
    """Read the encoder of a file: of our own runs (pretraining or a task), or published weights; or `timm:NAME`.

    Raises ValueError, SpecError where there is none.
    """
    if file.suffix == ".safetensors":
        weights, said = checkpoint.read_weights(file)
        if "encoder" in said:
            piece = check(EncoderOf, {"encoder": said["encoder"]}, str(file)).encoder
            inner = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
            return _own(file, piece, inner or weights, said)
    name = str(file)
    if name.startswith(published.PREFIX):
        found = published.from_timm(name.removeprefix(published.PREFIX))
    else:
        found = published.convert(published.read_state(file))
    if found.pieces.encoder is None:
        raise ValueError(f"{file}: found {found.family}; it has no encoder; a task begins from an encoder")
    return Begin(found.pieces.encoder, dict(found.weights["encoder"]), found.size, found.colours, found.notes)


class _Said(Strict):
    """What the header of a file of an encoder says of the images that it was trained on."""

    size: Pair
    channels: Annotated[int, Field(gt=0, le=1024)]
    mean: list[float]
    std: list[float]


def _own(file: Path, piece: Piece, weights: dict[str, Tensor], said: Mapping[str, Any]) -> Begin:
    """Take the encoder of a file of ours; raises ValueError where its header does not fit its weights."""
    about = {key: said.get(key) for key in ("channels", "mean", "std")}
    seen = check(_Said, {**about, "size": said.get("sees", said.get("size"))}, f"{file}: header")
    try:
        # A header may name something that takes all memory.
        with devices.unreal():
            shapes = {
                name: one.shape for name, one in build(ENCODERS, piece, seen.size, seen.channels).named_parameters()
            }
    except ValueError as error:
        raise ValueError(f"{file}: encoder: {error}") from None
    if wrong := [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]:
        raise ValueError(
            f"{file}: its header says the encoder '{piece.name}', and {wrong[0]} is another's; run it again"
        )
    return Begin(piece, weights, seen.size, (tuple(seen.mean), tuple(seen.std)))
