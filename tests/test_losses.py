"""Losses: laws over the table, closed forms, and SimMIM's published normaliser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mim_core.losses import LOSSES, l1, l2, smooth_l1
from mim_core.targets import patchify


def pair(positions: int = 12, values: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(positions, values, generator=draws), torch.randn(positions, values, generator=draws)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_finite_scalar_and_zero_at_equality(name: str) -> None:
    prediction, target = pair()
    loss = LOSSES[name](prediction, target)
    assert loss.shape == ()
    assert loss > 0
    assert LOSSES[name](target, target) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_doubling_the_batch_leaves_a_loss(name: str) -> None:
    prediction, target = pair()
    doubled = LOSSES[name](prediction.repeat(2, 1), target.repeat(2, 1))
    torch.testing.assert_close(doubled, LOSSES[name](prediction, target))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_positions_leaves_a_loss(name: str) -> None:
    prediction, target = pair()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(LOSSES[name](prediction[order], target[order]), LOSSES[name](prediction, target))


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_reaches_every_prediction(name: str) -> None:
    prediction, target = pair()
    LOSSES[name](prediction.requires_grad_(), target).backward()
    assert prediction.grad is not None
    assert (prediction.grad != 0).all()


@pytest.mark.parametrize("error", [0.25, 1.0, 4.0])
def test_closed_forms_of_a_constant_error(error: float) -> None:
    target = torch.zeros(6, 3)
    prediction = torch.full_like(target, error)
    assert l1(prediction, target).item() == pytest.approx(error)
    assert l2(prediction, target).item() == pytest.approx(error**2)
    for beta in (0.5, 1.0, 2.0):
        expected = 0.5 * error**2 / beta if error < beta else error - beta / 2
        assert smooth_l1(prediction, target, beta=beta).item() == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_l1_is_the_published_normaliser_over_images_with_different_counts(channels: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, channels, 16, 16))
    hidden = rng.random((2, 4, 4)) < np.array([0.3, 0.8])[:, None, None]
    # SimMIM's published code: M is [b, 1, H, W]; the sum runs over the batch, then the channels divide.
    pixels = hidden.repeat(4, 1).repeat(4, 2)[:, None]
    published = (np.abs(x - y) * pixels).sum() / (pixels.sum() + 1e-5) / channels
    wanted = torch.from_numpy(hidden.reshape(2, -1))
    ours = l1(*(patchify(torch.from_numpy(images), 4)[wanted] for images in (x, y)))
    assert ours.item() == pytest.approx(published, rel=1e-6)
