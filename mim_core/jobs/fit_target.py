"""Fit a tokenizer, for targets that are classes: train an autoencoder of discrete codes, or find a palette."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_core import checkpoint, devices
from mim_core import fit_target as fitting
from mim_core.data.order import Order
from mim_core.data.pack import Pack, Split
from mim_core.devices import Compute
from mim_core.files import write_atomically
from mim_core.jobs.run import Run, evaluations, player, result
from mim_core.params import TargetRow
from mim_core.spec import build
from mim_core.tokenizers import TOKENIZERS
from mim_core.train import Scalars

EVALUATIONS = 6
SHOWN = 16


def fit_target(row: TargetRow, pack: Pack, folder: Path, seed: int) -> dict[str, Any]:
    """Fit a row's tokenizer to a pack's training images; products: tokenizer, picture of reconstructions.

    Gives the final scalars on validation images: PSNR in dB, share of the codes used, perplexity. Raises ValueError
    where the codebook has collapsed: nothing should be pretrained on it.
    """
    compute = devices.choose(precision=row.precision)
    torch.manual_seed(seed)
    tokenizer = build(TOKENIZERS, row.tokenizer, pack.channels)
    compute.prepare(tokenizer)
    images, held = pack.split("train"), pack.split("validation")
    folder.mkdir(parents=True, exist_ok=True)
    if row.optim is None:
        seen = _find(tokenizer, images, held, folder, seed, compute)
    else:
        seen = _train(row, tokenizer, pack, folder, seed, compute)
    found = result(folder, seen, tokenizer, compute)
    if complaint := fitting.collapse(found, row.least_perplexity, tokenizer.advice):
        raise ValueError(complaint)
    _draw(tokenizer, held, found, folder / "gallery.png", compute)
    about = {"tokenizer": row.tokenizer.model_dump(mode="json"), "channels": pack.channels}
    checkpoint.write_weights(folder / "tokenizer.safetensors", tokenizer.state_dict(), about)
    return found


def _find(tokenizer: Any, images: Split, held: Split, folder: Path, seed: int, compute: Compute) -> int:
    """Find a palette; its curve is one line."""
    begun = time.perf_counter()
    tokenizer.cpu().fit(images.images, seed)
    tokenizer.to(compute.device)
    seconds = time.perf_counter() - begun
    scores = fitting.score(tokenizer, held, compute)
    line = {"step": 1, "steps": 1, "seconds": seconds, "time": time.time(), **scores}
    write_atomically(folder / "curve.jsonl", json.dumps(line) + "\n")
    return len(images)


def _train(row: TargetRow, tokenizer: Any, pack: Pack, folder: Path, seed: int, compute: Compute) -> int:
    assert row.optim
    images, held = pack.split("train"), pack.split("validation")
    steps, own = player(row.optim, len(images), tokenizer, row.optim.rate)
    objective = fitting.objective(tokenizer, pack, compute, steps, row.temperature, row.kl_weight)
    run = Run(folder, tokenizer, {"model": own}, steps, row.checkpoint_minutes)

    def evaluate(step: int) -> Scalars:
        return objective.evaluate(held)

    batch = min(row.optim.batch, len(images))
    order = Order(np.arange(len(images)), batch, seed, 0, steps)
    times = evaluations(steps, EVALUATIONS)
    run.train(objective, fitting.ImageFetch(images, row.augment, seed), order, evaluate, times)
    return steps * batch


@torch.no_grad()
def _draw(tokenizer: Any, held: Split, found: dict[str, Any], path: Path, compute: Compute) -> None:
    few = torch.from_numpy(np.array(held.images[:SHOWN])).to(compute.device).float() / 255
    tokenizer.eval()
    shown = tokenizer.decode(tokenizer.tokens(few))
    caption = (
        f"Validation images from their codes: PSNR {found['psnr']:.1f} dB, {found['codes_used']:.0%} of "
        f"{tokenizer.codes} codes used, perplexity {found['perplexity']:.0f}"
    )
    fitting.picture(few, shown, caption).save(path)
