"""Fills: laws over the table, and what each puts where the mask hides."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch

from mim_core.fills import FILLS, BertMix, Colour, Drop, Fill, MaskToken
from mim_core.grid import Grid
from mim_core.spec import OneOf, Piece, SpecError, Strict, build, check

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GRID = Grid(16, 24, 4)
WIDTH = 8


class Row(Strict):
    fill: Annotated[Piece, OneOf(FILLS)]


def made(name: str, grid: Grid = GRID, **params: Any) -> Fill:
    torch.manual_seed(0)
    return FILLS[name](WIDTH, grid, MEAN, STD, **params)


def batch(images: int = 3, hide: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised images, their tokens, and masks that hide equally many."""
    draws = torch.Generator().manual_seed(1)
    hidden = torch.rand(images, GRID.count, generator=draws).argsort(1) < hide
    return (
        torch.randn(images, 3, 16, 24, generator=draws),
        torch.randn(images, GRID.count, WIDTH, generator=draws),
        hidden,
    )


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("training", [True, False])
def test_visible_pixels_and_tokens_stay(name: str, training: bool) -> None:
    fill = made(name).train(training)
    images, tokens, hidden = batch()
    pixels = GRID.pixels(hidden)[:, None].expand_as(images)
    assert torch.equal(fill.pixels(images, hidden)[~pixels], images[~pixels])
    filled, kept = fill.tokens(tokens, hidden)
    if fill.drops:
        assert torch.equal(filled.flatten(0, 1), tokens[~hidden])
    else:
        assert kept is None
        assert filled.shape == tokens.shape
        assert torch.equal(filled[~hidden], tokens[~hidden])


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_hidden_does_not_come_through_unless_the_fill_says_so(name: str, training: bool) -> None:
    fill = made(name).train(training)
    images, tokens, hidden = batch()
    pixels = GRID.pixels(hidden)[:, None]
    others = torch.where(pixels, images + 100, images)
    painted = torch.equal(fill.pixels(others, hidden), fill.pixels(images, hidden))
    changed = torch.where(hidden[..., None], tokens + 100, tokens)
    found = []
    for given in (changed, tokens):
        torch.manual_seed(0)
        found.append(fill.tokens(given, hidden)[0])
    assert (fill.peeks and training) is not (painted or torch.equal(*found))


@pytest.mark.parametrize("name", FILLS)
def test_evaluation_repeats_and_does_not_depend_on_the_batch(name: str) -> None:
    fill = made(name).eval()
    images, tokens, hidden = batch()
    before = torch.get_rng_state()
    for function, values in ((fill.pixels, images), (lambda *of: fill.tokens(*of)[0], tokens)):
        whole = function(values, hidden)
        assert torch.equal(function(values, hidden), whole)
        for index in range(3):
            assert torch.equal(function(values[index : index + 1], hidden[index : index + 1])[0], whole[index])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FILLS)
def test_half_precision_tokens_stay_so(name: str) -> None:
    _, tokens, hidden = batch()
    assert made(name).tokens(tokens.bfloat16(), hidden)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", FILLS)
def test_a_fill_builds_without_memory_from_a_row(name: str) -> None:
    piece = check(Row, {"fill": name}, "row").fill
    with torch.device("meta"):
        fill = build(FILLS, piece, WIDTH, GRID, MEAN, STD)
    assert type(fill) is FILLS[name]
    assert all(one.is_meta for one in [*fill.parameters(), *fill.buffers()])


def test_every_hidden_token_is_the_mask_token() -> None:
    fill = made("mask_token")
    assert isinstance(fill, MaskToken)
    _, tokens, hidden = batch()
    filled, _ = fill.tokens(tokens, hidden)
    assert torch.equal(filled[hidden], fill.token[0].expand(int(hidden.sum()), -1))
    # As published: truncated normal of deviation 0.02, and three dimensions, so that weight decay applies.
    assert fill.token.shape == (1, 1, WIDTH)
    assert 0 < fill.token.std() < 0.04


@pytest.mark.parametrize(("colour", "value"), [("mean", MEAN), ("white", (1.0, 1.0, 1.0)), ("zero", (0.0, 0.0, 0.0))])
def test_hidden_pixels_have_the_colour(colour: str, value: tuple[float, ...]) -> None:
    fill = made("colour", colour=colour)
    assert isinstance(fill, Colour)
    images, _, hidden = batch()
    painted = fill.pixels(images, hidden) * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    for channel in range(3):
        found = painted[:, channel][GRID.pixels(hidden)]
        torch.testing.assert_close(found, torch.full_like(found, value[channel]), atol=1e-6, rtol=0)
    assert not list(fill.state_dict())


def test_a_colour_fills_single_pixels_where_the_mask_is_of_pixels() -> None:
    fill = Colour(WIDTH, Grid(4, 6, 1), (0.5,), (0.25,))
    images = torch.randn(1, 1, 4, 6)
    hidden = torch.rand(1, 24) < 0.5
    painted = fill.pixels(images, hidden)
    assert torch.equal(painted, images.masked_fill(hidden.view(1, 1, 4, 6), 0))


@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_bert_mix_has_its_shares(shares: tuple[float, float]) -> None:
    token, random = shares
    grid = Grid(64, 64, 4)
    fill = made("bert_mix", grid, token=token, random=random)
    assert isinstance(fill, BertMix)
    tokens = torch.arange(40 * grid.count).view(40, -1, 1).expand(-1, -1, WIDTH).float() + 1
    hidden = torch.rand(40, grid.count) < 0.5
    filled, _ = fill.tokens(tokens, hidden)
    masked = (filled == fill.token).all(-1)
    same = (filled == tokens).all(-1)
    other = ~masked & ~same
    count = int(hidden.sum())
    for found, share in ((masked, token), (other, random), (same & hidden, 1 - token - random)):
        assert not found[~hidden].any()
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(int(found.sum()) / count - share) <= 4 * deviation + 1e-9
    # Another patch, and one of the same image.
    source = (filled[other][:, 0] - 1).long()
    assert torch.equal(source // grid.count, other.nonzero()[:, 0])
    assert (source % grid.count != other.nonzero()[:, 1]).all()
    if random:
        assert len(source.unique()) > len(source) / 3


def test_bert_mix_draws_from_the_global_generator_in_training() -> None:
    fill = made("bert_mix")
    _, tokens, hidden = batch()

    def filled(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return fill.tokens(tokens, hidden)[0]

    assert torch.equal(filled(1), filled(1))
    assert not torch.equal(filled(1), filled(2))


def test_bert_mix_refuses_shares_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"random: found 0.3 beside token 0.8; .*try 0.2 or less"):
        made("bert_mix", random=0.3)
    with pytest.raises(ValueError, match=r"random: found 0.1 on a grid of one patch"):
        made("bert_mix", Grid(4, 4, 4))
    assert made("bert_mix", Grid(4, 4, 4), random=0.0).tokens(torch.ones(1, 1, 8), torch.ones(1, 1) > 0)[1] is None


def test_drop_keeps_visible_tokens_in_order() -> None:
    fill = made("drop")
    assert isinstance(fill, Drop)
    _, tokens, hidden = batch()
    filled, kept = fill.tokens(tokens, hidden)
    assert kept is not None
    assert kept.shape == (3, GRID.count - 14)
    assert (kept.diff(dim=1) > 0).all()
    assert not hidden.gather(1, kept).any()
    assert torch.equal(filled, torch.stack([tokens[row, kept[row]] for row in range(3)]))
    assert fill.drops
    assert not list(fill.parameters())


def test_drop_refuses_a_ragged_batch() -> None:
    _, tokens, hidden = batch()
    hidden[1, hidden[1].nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"fill: found a batch that hides 13 to 14 of 24 patches; .*choose a mask"):
        made("drop").tokens(tokens, hidden)


@pytest.mark.parametrize(
    "fill",
    [
        {"name": "bert_mix", "token": 1.5},
        {"name": "colour", "colour": "red"},
        {"name": "mask_token", "std": 0.1},
        {"name": "drop", "ratio": 0.5},
    ],
)
def test_a_row_with_a_wrong_param_is_refused(fill: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        check(Row, {"fill": fill}, "row")
