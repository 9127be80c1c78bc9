"""The objective: nothing hidden is seen, the scope's entries count as they should, and both players learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_pieces import pretrain_row, tiny_pack
from torch import Tensor

from mim_core.adversarial import Adversarial, Critic
from mim_core.data.pack import Pack
from mim_core.devices import choose
from mim_core.fills import FILLS
from mim_core.grid import Entries, Grid, entries_hidden, near
from mim_core.losses import l2
from mim_core.masks import MASKS, generator
from mim_core.optim import Player, adamw
from mim_core.params import PretrainRow, load
from mim_core.pretext import Masked, MaskedModel, Pretext, Scope, assemble, hole
from mim_core.spec import bind, build
from mim_core.tokenizers import TOKENIZERS

ROWS = load(Path(__file__).parents[1] / "params")
# What may see some of what is hidden, and why.
PEEKING = {"vit_mpp": "BERT's mix leaves a tenth of the hidden embeddings as they are, and puts others' in a tenth"}
COLOURS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def assembled(row: PretrainRow) -> tuple[MaskedModel, Any]:
    tokenizer = build(TOKENIZERS, ROWS.targets[row.fitted].tokenizer, 3) if row.fitted else None
    return assemble(row, (32, 32), 3, *COLOURS, tokenizer)


def masks(row: PretrainRow, grid: Grid, count: int) -> Tensor:
    return torch.from_numpy(
        np.stack([bind(MASKS, row.mask)(generator(0, 0, index), grid).reshape(-1) for index in range(count)])
    )


@pytest.mark.parametrize("name", ROWS.pretrained())
def test_no_row_lets_its_encoder_see_what_is_hidden(name: str) -> None:
    row = ROWS.pretrained()[name]
    torch.manual_seed(0)
    model, _ = assembled(row)
    model.train()
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    hidden = masks(row, model.encoder.grid, 1).expand(4, -1)  # equally many in all, whatever the mask
    features, _, _ = model.encode(images, hidden)
    (features * torch.randn(features.shape)).sum().backward()
    assert images.grad is not None
    moved = images.grad.abs().sum(1) > 0
    under = model.encoder.grid.pixels(hidden)
    assert moved[~under].float().mean() > 0.9, "visible pixels have to reach the features"
    assert model.fill.peeks == (name in PEEKING)
    if name in PEEKING:
        assert 0 < moved[under].float().mean() < 0.35, PEEKING[name]
    else:
        assert not moved[under].any()


@pytest.mark.parametrize("name", ROWS.pretrained())
def test_every_row_takes_a_step_and_reaches_all_its_parameters(name: str, tmp_path: Path) -> None:
    row = ROWS.pretrained()[name]
    pack = tiny_pack(tmp_path / "pack", size=(32, 32))
    model, target = assembled(row)
    chosen: Any = row.loss
    scope = Scope(chosen.scope, chosen.ring_px, chosen.visible_weight)
    from mim_core.losses import LOSSES

    objective = Pretext(model, target, bind(LOSSES, row.loss), scope, pack, choose("cpu", "fp32"))
    hidden = masks(row, model.encoder.grid, 1).expand(8, -1)
    batch = Masked(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), hidden)
    ((player, loss),) = objective.losses(batch, 0)
    loss.backward()
    assert player == "model"
    assert loss.isfinite()
    # A table of relative positions of the class token alone has nothing to tell apart at first.
    without = [key for key, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not without


def pretext(pack: Pack, scope: Scope, **changes: Any) -> Pretext:
    row = pretrain_row(loss="l2", **changes)
    model, target = assemble(row, pack.size, pack.channels, pack.mean, pack.std)
    return Pretext(model, target, l2, scope, pack, choose("cpu", "fp32"))


SWIN = {"name": "swin", "patch_px": 2, "width": 8, "depths": [1, 1], "heads": [1, 2], "window": 4}


def test_the_hidden_scope_of_a_vit_is_its_mask_and_has_no_weights(pack: Pack) -> None:
    hidden = torch.rand(3, 16) < 0.5
    wanted, weights = pretext(pack, Scope()).wanted(hidden)
    assert torch.equal(wanted, hidden)
    assert weights is None


def test_entries_of_partly_hidden_positions_count_where_they_are_hidden(pack: Pack) -> None:
    """A Swin predicts 4 px a position and its mask hides 2 px cells: only those may count."""
    objective = pretext(pack, Scope(), encoder=SWIN)
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, 0] = True  # the upper left 2 x 2 px of the first position
    wanted, weights = objective.wanted(hidden)
    assert wanted.nonzero().tolist() == [[0, 0]]
    assert weights is not None
    inside = weights[0, 0].reshape(3, 4, 4)
    assert inside[:, :2, :2].all()
    assert inside.sum() == 12
    prediction, target = torch.ones(1, 48), torch.zeros(1, 48)
    assert objective.mean_loss(prediction, target, weights[wanted]).item() == pytest.approx(1.0)


def test_a_ring_weighs_as_it_says_over_the_number_of_entries(pack: Pack) -> None:
    objective = pretext(pack, Scope("ring", ring_px=4, visible_weight=10.0))
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    hidden[0, 1, 1] = True
    wanted, weights = objective.wanted(hidden.reshape(1, -1))
    assert wanted.sum() == 9
    assert weights is not None
    assert weights[0, 5].eq(1).all()
    assert weights[0, 0].eq(10).all()
    error = torch.ones(9, 48)
    loss = objective.mean_loss(error, torch.zeros(9, 48), weights[wanted])
    assert loss.item() == pytest.approx((1 + 8 * 10) / 9)


def test_the_whole_scope_counts_all_and_may_weigh_the_visible(pack: Pack) -> None:
    hidden = torch.rand(2, 16) < 0.5
    wanted, weights = pretext(pack, Scope("all")).wanted(hidden)
    assert wanted.all()
    assert weights is None
    _, weights = pretext(pack, Scope("all", visible_weight=0.5)).wanted(hidden)
    assert weights is not None
    assert torch.equal(weights.amin(-1) == 1, hidden)


def test_near_grows_by_whole_cells() -> None:
    hidden = torch.zeros(1, 6, 6, dtype=torch.bool)
    hidden[0, 2, 3] = True
    grown = near(hidden.reshape(1, -1), Grid(24, 24, 4), 9).reshape(6, 6)
    assert grown.sum() == 25
    assert grown[:5, 1:].all()


def test_entries_are_hidden_where_half_of_their_part_is() -> None:
    hidden = torch.tensor([[True, False, True, True]])  # 2 x 2 cells of 2 px, over one position of 4 px
    grids = (Grid(4, 4, 2), Grid(4, 4, 4))
    assert entries_hidden(hidden, *grids, Entries(1, 1)).tolist() == [[[True]]]
    assert entries_hidden(hidden, *grids, Entries(2, 2)).tolist() == [[[True, False, True, True] * 2]]
    assert entries_hidden(hidden, *grids, Entries(1, 4)).sum() == 12


# --- the adversarial term ---


def test_the_critic_has_the_published_layers_at_64_px() -> None:
    widths = [layer.out_channels for layer in Critic((64, 64), 3, 64).layers if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (24, 40), (227, 227)])
def test_a_critic_scores_views_of_any_size(size: tuple[int, int]) -> None:
    critic = Critic(size, 3, 4)
    scores = critic(torch.randn(5, 3, *size))
    assert scores.shape == (5,)
    with pytest.raises(ValueError, match="needs 4 px"):
        Critic((3, 8), 3, 4)


def test_the_critics_loss_does_not_reach_the_model() -> None:
    fake = torch.randn(2, 3, 16, 16, requires_grad=True)
    Critic((16, 16), 3, 4).loss(torch.randn(2, 3, 16, 16), fake).backward()
    assert fake.grad is None


def test_a_hole_is_the_box_round_what_is_wanted() -> None:
    wanted = torch.zeros(4, 6, dtype=torch.bool)
    wanted[1:3, 2:5] = True
    assert hole(wanted.reshape(-1), Grid(16, 24, 4), 8) == (slice(8, 24), slice(16, 40))


@pytest.mark.parametrize("name", ["context_encoder_adversarial", "simmim_vit"])
def test_two_players_take_turns_and_each_moves_only_itself(name: str, tmp_path: Path) -> None:
    """Also a ViT row, as the term goes with any pixel target."""
    row = ROWS.pretrained()[name]
    pack = tiny_pack(tmp_path / "pack", size=(32, 32))
    model, target = assembled(row)
    hidden = masks(row, model.encoder.grid, 8)
    objective = Pretext(model, target, l2, Scope(), pack, choose("cpu", "fp32"))
    wanted, _ = objective.wanted(hidden[:1])
    box = hole(wanted[0], model.encoder.output, target.entries.side) if row.adversarial else None
    size = (box[0].stop - box[0].start, box[1].stop - box[1].start) if box else (32, 32)
    objective.critic, objective.critic_weight = Critic(size, 3, 4), Adversarial().weight
    objective.critic_sees = box
    players = {
        key: Player(adamw([{"params": list(part.parameters()), "lr_scale": 1.0}], (0.5, 0.9)), lambda step: 1e-3)
        for key, part in (("model", model), ("critic", objective.critic))
    }
    batch = Masked(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), hidden)
    before = {key: [one.clone() for one in part.parameters()] for key, part in parts(objective).items()}
    seen = []
    for key, loss in objective.losses(batch, 0):
        loss.backward()
        players[key].step(0)
        for player in players.values():
            player.optimiser.zero_grad(set_to_none=True)
        seen.append(key)
        moved = {
            other: any(not torch.equal(a, b) for a, b in zip(before[other], part.parameters(), strict=True))
            for other, part in parts(objective).items()
        }
        assert moved == {"critic": True, "model": key == "model"}
    assert seen == ["critic", "model"]


def parts(objective: Pretext) -> dict[str, Any]:
    return {"critic": objective.critic, "model": objective.model}


def test_all_fills_say_whether_they_drop_or_peek() -> None:
    assert {name for name, fill in FILLS.items() if fill.drops} == {"drop"}
    assert {name for name, fill in FILLS.items() if fill.peeks} == {"bert_mix"}
