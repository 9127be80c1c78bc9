"""What is spared is not needed: shorter ways to a loss give the loss and gradients of the long ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_pieces import ENCODER, PRETRAIN, pretrain_row
from torch import Tensor, nn

from mim_core import devices
from mim_core.data.order import Order
from mim_core.data.pack import Pack
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve
from mim_core.grid import Grid, chosen, entries_hidden, replaced, rows_at, rows_of
from mim_core.jobs.pretrain import begin, pretrain
from mim_core.masks import MASKS, MASKS_OF_MANY
from mim_core.optim import cosine
from mim_core.params import PretrainRow
from mim_core.pretext import Drawn, Masked, MaskedFetch, Pretext
from mim_core.spec import bind, build, check
from mim_core.transforms import Augment, normalise, place

LOSS, GRADIENT = 1e-6, 1e-5
SWIN = {"name": "swin", "patch_px": 2, "width": 16, "depths": [1, 1], "heads": [1, 2], "window": 4}
METHODS: dict[str, dict[str, Any]] = {
    "simmim": {},
    "relative": {"encoder": {**ENCODER, "positions": "relative", "layer_scale": 0.1}, "head": "mlp"},
    "drop_path": {"encoder": {**ENCODER, "drop_path": 0.5}, "head": {"name": "linear", "norm": True}},
    "mae": {"fill": "drop", "head": {"name": "transformer_decoder", "width": 32, "depth": 2, "heads": 4}, "loss": "l2"},
    "swin": {"encoder": SWIN},
}


def made(pack: Pack, **changes: Any) -> tuple[Pretext, Masked]:
    """An objective with its first batch."""
    row = pretrain_row(**changes)
    torch.manual_seed(0)
    objective, *_ = begin(row, pack, 0, Compute(torch.device("cpu"), False))
    with torch.no_grad():
        # Published initial weights leave biases of attention at zero, where an error in them would not show.
        for parameter in objective.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    fetch = MaskedFetch(pack.split("train"), objective.model.encoder.grid, bind(MASKS, row.mask), None, 0)
    return objective, fetch([(0, index) for index in range(8)])


def followed(objective: Pretext, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A loss and the gradients of what it moves, with drop path's draws fixed."""
    objective.model.zero_grad()
    torch.manual_seed(1)
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    named = objective.model.named_parameters()
    return value.item(), {name: one.grad.clone() for name, one in named if one.grad is not None}


def agree(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=LOSS)
    assert first[1].keys() >= second[1].keys()
    whole = torch.stack([one.norm() for one in second[1].values()]).norm()
    for name, one in first[1].items():
        other = second[1].get(name, torch.zeros_like(one))
        assert (one - other).norm() <= GRADIENT * max(other.norm(), 1e-2 * whole), name


def by_all(objective: Pretext, batch: Masked) -> Tensor:
    """The loss of a prediction for every position of the whole image, of which the hidden entries count."""
    images = normalise(batch.images, objective.pack.mean, objective.pack.std)
    encoder, entries = objective.model.encoder, objective.target.entries
    everywhere = torch.ones(len(images), encoder.output.count, dtype=torch.bool)
    prediction = objective.model(images, batch.hidden, everywhere)
    each = objective.loss(prediction, objective.target(images).flatten(0, 1))
    weights = entries_hidden(batch.hidden, encoder.grid, encoder.output, entries).flatten(0, 1).float()
    return (each * weights).sum() / weights.sum()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_hidden_is_computed(pack: Pack, name: str, fused: bool) -> None:
    objective, batch = made(pack, **METHODS[name])
    for module in objective.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]
    short = followed(objective, lambda: next(objective.losses(batch, 0))[1])
    agree(short, followed(objective, lambda: by_all(objective, batch)))


def test_unequal_masks_take_the_long_way_to_the_same(pack: Pack) -> None:
    objective, batch = made(pack)
    hidden = batch.hidden.clone()
    hidden[0, hidden[0].nonzero()[0]] = False
    assert torch.equal(rows_of(hidden), hidden)  # type: ignore[arg-type]
    uneven = Masked(batch.images, hidden)
    agree(
        followed(objective, lambda: next(objective.losses(uneven, 0))[1]),
        followed(objective, lambda: by_all(objective, uneven)),
    )


def test_what_is_chosen_by_indices_is_what_the_mask_chooses() -> None:
    values, mask = torch.randn(3, 5, 2, 4), torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    rows = rows_of(mask)
    assert rows is not None
    assert rows.tolist() == [[0, 3], [1, 2], [3, 4]]
    assert torch.equal(chosen(values, rows), values[mask])
    assert torch.equal(chosen(values, mask), values[mask])
    assert rows_of(torch.ones(2, 3, dtype=torch.bool)) is None
    assert torch.equal(chosen(values, None), values.flatten(0, 1))
    for wanted in (mask, rows, None):
        taken = chosen(values.flatten(2), wanted)
        assert torch.equal(chosen(replaced(torch.zeros(3, 5, 8), wanted, taken), wanted), taken)
    put = replaced(torch.zeros(3, 5, 8), rows, chosen(values.flatten(2), rows))
    assert torch.equal(put, values.flatten(2) * mask[..., None])
    assert torch.equal(rows_at(mask, 2), rows)


@pytest.mark.parametrize("method", ["simmim", "mae", "swin"])
def test_masks_that_the_device_draws_give_the_loss_and_gradients_of_those_of_the_loader(
    pack: Pack, method: str
) -> None:
    objective, batch = made(pack, **METHODS[method])
    row = pretrain_row(**METHODS[method])
    assert batch.hidden is not None
    objective.drawn = Drawn(partial(MASKS_OF_MANY["random"], seed=0, **row.mask.params()), int(batch.hidden[0].sum()))
    fetch = MaskedFetch(pack.split("train"), objective.model.encoder.grid, None, None, 0)
    left = fetch([(0, index) for index in range(8)])
    assert left.hidden is None
    here, there = objective.sent(batch), objective.sent(left)
    assert there.hidden is None
    hidden, wanted = objective._draw(there)
    assert here.hidden is not None
    assert torch.equal(hidden, here.hidden)
    assert here.wanted is not None
    assert torch.equal(wanted, here.wanted)
    agree(*(followed(objective, lambda one=one: next(objective.losses(one, 0))[1]) for one in (left, batch)))


@pytest.mark.parametrize("encoder", [ENCODER, SWIN])
def test_patches_are_embedded_as_by_the_convolution(encoder: dict[str, Any]) -> None:
    made: Any = build(ENCODERS, check(PretrainRow, {**PRETRAIN, "encoder": encoder}, "row").encoder, (16, 16), 3)
    images = torch.randn(2, 3, 16, 16)
    by_convolution = made.backbone.patch_embed(images).reshape(2, made.grid.count, -1)
    torch.testing.assert_close(made.embed(images), by_convolution, rtol=1e-5, atol=1e-6)


def plain(row: Any, pack: Pack, steps: int) -> list[float]:
    """The losses of a loop that spares nothing: fp32, every position predicted, AdamW as it comes."""
    torch.manual_seed(row.seed)
    objective, _, _, total = begin(row, pack, row.seed, Compute(torch.device("cpu"), False))
    model: Any = objective.model
    vit, grid = model.encoder.backbone, model.encoder.grid
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, one in model.named_parameters():
        if one.requires_grad:
            groups[int(one.ndim == 1 or name.endswith(("bias", "cls_token")))].append(one)
    optimiser = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": row.optim.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        foreach=False,
    )
    fetch = MaskedFetch(pack.split("train"), grid, bind(MASKS, row.mask), row.augment, row.seed)
    losses = []
    mean, std = (torch.tensor(one).view(1, -1, 1, 1) for one in (pack.mean, pack.std))
    for step, addresses in enumerate(Order(np.arange(64), row.optim.batch, row.seed, 0, steps)):
        batch = fetch(addresses)
        images, weight = (batch.images / 255 - mean) / std, batch.hidden[..., None].float()
        tokens = vit.patch_embed(images) * (1 - weight) + model.fill.token * weight
        features = vit.blocks(torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], 1) + vit.pos_embed)
        values = model.head.project(vit.norm(features)[:, 1:])
        maps = F.pixel_shuffle(values.transpose(1, 2).unflatten(2, grid.shape), grid.patch_px)
        pixels = grid.pixels(batch.hidden)[:, None].float()
        loss = (F.l1_loss(maps, images, reduction="none") * pixels).sum() / pixels.sum() / 3
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*groups[0], *groups[1]], row.optim.clip)
        warmup = row.optim.steps(64)[1]
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, total, row.optim.rate, warmup)
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_two_hundred_steps_agree_with_a_plain_loop(pack: Pack, tmp_path: Path) -> None:
    """In what the machine chooses: fp32 here and there, or bf16 beside the loop's fp32."""
    steps = 200
    optim = {**PRETRAIN["optim"], "epochs": steps // 4}
    row = pretrain_row(optim=optim, precision="auto")
    pretrain(row, pack, tmp_path, row.seed)
    found = [line["loss"] for line in read_curve(tmp_path / "curve.jsonl") if "loss" in line]
    losses = plain(row, pack, steps)
    each = steps // len(found)
    means = [sum(losses[at : at + each]) / each for at in range(0, steps, each)]
    assert math.isfinite(sum(means))
    assert means[-1] < 0.9 * means[0]
    assert found == pytest.approx(means, rel=2e-2 if devices.choose("cpu").bf16 else 1e-4)


def test_a_device_places_a_batch_as_the_loader_places_images(pack: Pack) -> None:
    augment = Augment(scale=(0.1, 1.0), ratio=(0.5, 2.0), flip=0.5)
    encoder = Grid(16, 16, 4)
    mask = bind(MASKS, pretrain_row().mask)
    addresses = [(epoch, index) for epoch in range(4) for index in range(16)]
    here, there = (MaskedFetch(pack.split("train"), encoder, mask, augment, 0, one)(addresses) for one in (False, True))
    assert torch.equal(here.hidden, there.hidden)
    assert here.boxes is None
    assert there.boxes is not None
    assert {0, 1} == set(there.boxes[:, 4].tolist())
    # Each of the loader's two passes rounds.
    assert (place(there.images, there.boxes) - here.images).abs().max() <= 1.1
    coloured = Augment(jitter=0.4)
    assert MaskedFetch(pack.split("train"), encoder, mask, coloured, 0, True)(addresses).boxes is None


def test_normalising_in_parts_gives_the_same_bits(pack: Pack) -> None:
    images = torch.randint(0, 256, (7, 3, 200, 120), dtype=torch.uint8)
    scale, shift = (torch.tensor(of).view(1, -1, 1, 1) for of in (
        [1 / (255 * s) for s in pack.std], [-m / s for m, s in zip(pack.mean, pack.std, strict=True)]
    ))  # fmt: skip
    assert torch.equal(normalise(images, pack.mean, pack.std), images.to(torch.float32) * scale + shift)
