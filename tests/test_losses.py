"""Losses: laws over the tables, closed forms, and SimMIM's published normaliser."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mim_core.grid import patchify
from mim_core.losses import CLASS_LOSSES, LOSSES, NUMBER_LOSSES, cross_entropy, l1, l2, smooth_l1
from mim_core.spec import OneOf, Piece, Strict, bind, check


class Row(Strict):
    loss: Annotated[Piece, OneOf(LOSSES)]


def pair(name: str, positions: int = 12, entries: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and a target of the loss's kind."""
    draws = torch.Generator().manual_seed(0)
    if name in NUMBER_LOSSES:
        return torch.randn(positions, entries, generator=draws), torch.randn(positions, entries, generator=draws)
    prediction = torch.randn(positions, classes, entries, generator=draws)
    return prediction, torch.randint(classes, (positions, entries), generator=draws)


def test_every_loss_has_one_kind() -> None:
    assert not set(NUMBER_LOSSES) & set(CLASS_LOSSES)
    assert {**NUMBER_LOSSES, **CLASS_LOSSES} == LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_finite_and_above_zero_for_each_entry(name: str) -> None:
    prediction, target = pair(name)
    loss = LOSSES[name](prediction, target)
    assert loss.shape == target.shape
    assert loss.dtype == prediction.dtype
    assert (loss.isfinite() & (loss > 0)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_vanishes_at_the_truth(name: str) -> None:
    _, target = pair(name)
    truth = target if name in NUMBER_LOSSES else F.one_hot(target, 4).movedim(-1, 1) * 1000.0
    assert (LOSSES[name](truth, target) == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_entrys_loss_reads_no_other_entry(name: str) -> None:
    prediction, target = pair(name)
    loss = LOSSES[name](prediction, target)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(LOSSES[name](prediction[order], target[order]), loss[order])
    torch.testing.assert_close(LOSSES[name](prediction[..., :2], target[..., :2]), loss[..., :2])


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_reaches_every_prediction(name: str) -> None:
    prediction, target = pair(name)
    LOSSES[name](prediction.requires_grad_(), target).mean().backward()
    assert prediction.grad is not None
    assert (prediction.grad != 0).all()


@pytest.mark.parametrize("error", [0.25, 1.0, 4.0])
def test_closed_forms_of_a_constant_error(error: float) -> None:
    target = torch.zeros(6, 3)
    prediction = torch.full_like(target, error)
    torch.testing.assert_close(l1(prediction, target), torch.full_like(target, error))
    torch.testing.assert_close(l2(prediction, target), torch.full_like(target, error**2))
    for beta in (0.5, 1.0, 2.0):
        expected = 0.5 * error**2 / beta if error < beta else error - beta / 2
        torch.testing.assert_close(smooth_l1(prediction, target, beta=beta), torch.full_like(target, expected))


def test_closed_forms_of_cross_entropy() -> None:
    target = torch.tensor([[0, 1], [2, 0]])
    even = torch.zeros(2, 3, 2)
    torch.testing.assert_close(cross_entropy(even, target), torch.full((2, 2), math.log(3)))
    # One logit of ln 4 beside two of 0: shares of 2/3 and 1/6.
    sure = F.one_hot(target, 3).movedim(-1, 1) * math.log(4)
    torch.testing.assert_close(cross_entropy(sure, target), torch.full((2, 2), -math.log(2 / 3)))
    smoothed = -(0.8 * math.log(2 / 3) + 0.2 / 3 * (math.log(2 / 3) + 2 * math.log(1 / 6)))
    torch.testing.assert_close(cross_entropy(sure, target, smoothing=0.2), torch.full((2, 2), smoothed))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_of_l1_is_the_published_normaliser_over_images_with_different_counts(channels: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, channels, 16, 16))
    hidden = rng.random((2, 4, 4)) < np.array([0.3, 0.8])[:, None, None]
    # SimMIM's published code: M is [b, 1, H, W]; the sum runs over the batch, then the channels divide.
    pixels = hidden.repeat(4, 1).repeat(4, 2)[:, None]
    published = (np.abs(x - y) * pixels).sum() / (pixels.sum() + 1e-5) / channels
    wanted = torch.from_numpy(hidden.reshape(2, -1))
    ours = l1(*(patchify(torch.from_numpy(images), 4)[wanted] for images in (x, y))).mean()
    assert ours.item() == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize(
    ("row", "params"),
    [
        ("l1", {}),
        ("l2", {}),
        ({"name": "smooth_l1", "beta": 0.5}, {"beta": 0.5}),
        ({"name": "cross_entropy", "smoothing": 0.1}, {"smoothing": 0.1}),
    ],
)
def test_a_row_chooses_a_loss_and_its_params(row: object, params: dict[str, float]) -> None:
    piece = check(Row, {"loss": row}, "row").loss
    assert piece.params() == params
    prediction, target = pair(piece.name)
    torch.testing.assert_close(
        bind(LOSSES, piece)(prediction, target), LOSSES[piece.name](prediction, target, **params)
    )
