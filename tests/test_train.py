"""The training loop: what happens after which step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim_core.optim import Player, adamw, param_groups
from mim_core.train import NonFiniteLossError, Scalars, StoppedError, due, train


def player(weight: nn.Parameter, rate: float = 0.1) -> Player:
    return Player(adamw(param_groups([("w", weight)], weight_decay=0.0), (0.9, 0.999)), lambda step: rate * (step + 1))


class Listed:
    """An objective whose losses are the batches' numbers; it notes what it sees."""

    def __init__(self, events: list[Any]) -> None:
        self.weight = nn.Parameter(torch.ones(()))
        self.events = events

    def losses(self, batch: list[float], step: int) -> Iterator[tuple[str, Tensor]]:
        self.events.append(("losses", batch[0], torch.rand(()).item()))
        yield "model", self.weight * 0 + torch.tensor(batch).mean()


def run(
    batches: list[list[float]],
    start: int = 0,
    steps: int = 6,
    stop_after: int = 99,
    window: dict[str, Tensor] | None = None,
    **every: int,
) -> tuple[list[Any], list[Any]]:
    """Train on listed losses; gives the reports and all events."""
    events: list[Any] = []
    reports: list[tuple[int, Scalars]] = []

    def report(step: int, scalars: Scalars) -> None:
        events.append(("evaluated" if "score" in scalars else "report", step))
        reports.append((step, scalars))

    def evaluate(step: int) -> Scalars:
        events.append(("evaluate", step))
        return {"score": float(step)}

    objective = Listed(events)
    train(
        objective,
        {"model": player(objective.weight)},
        batches,
        seed=3,
        start=start,
        steps=steps,
        report=report,
        report_every=every.get("report", 2),
        save=lambda step, now: events.append(("save now" if now else "save", step)),
        save_every=every.get("save", 3),
        evaluate=evaluate,
        evaluate_every=every.get("evaluate", 4),
        stop=lambda: len([name for name, *_ in events if name == "losses"]) >= stop_after,
        window=window,
    )
    return reports, events


def test_report_then_evaluate_then_save_each_when_due_and_all_at_the_end() -> None:
    _, events = run([[float(step)] for step in range(6)])
    names = [event[:2] for event in events]
    assert names == [
        ("losses", 0), ("losses", 1), ("report", 2), ("losses", 2), ("save", 3), ("losses", 3), ("report", 4),
        ("evaluate", 4), ("evaluated", 4), ("losses", 4), ("losses", 5), ("report", 6), ("evaluate", 6),
        ("evaluated", 6), ("save", 6),
    ]  # fmt: skip


def test_reported_scalars_are_means_over_the_window() -> None:
    reports, _ = run([[float(step)] for step in range(6)], report=4, evaluate=0)
    losses = [(step, scalars["loss"]) for step, scalars in reports if "loss" in scalars]
    assert losses == [(4, pytest.approx(1.5)), (6, pytest.approx(4.5))]
    assert reports[0][1]["lr"] == pytest.approx(0.4)
    assert reports[0][1]["images_per_s"] > 0
    assert reports[0][1]["grad_norm"] == 0


def test_a_resumed_loop_counts_on_and_draws_what_it_would_have_drawn() -> None:
    whole, events = run([[float(step)] for step in range(6)])
    rest, later = run([[float(step)] for step in range(2, 6)], start=2)
    assert [(step, scalars["loss"]) for step, scalars in rest if "loss" in scalars] == [
        (step, scalars["loss"]) for step, scalars in whole if "loss" in scalars and step > 2
    ]
    drawn = [event for event in events if event[0] == "losses"]
    assert [event for event in later if event[0] == "losses"] == drawn[2:]
    assert len({event[2] for event in drawn}) == 6


def test_the_loop_takes_no_more_batches_than_steps() -> None:
    taken = []

    def endless() -> Iterator[list[float]]:
        while True:
            taken.append(1)
            yield [1.0]

    _, events = run(endless(), steps=3)  # type: ignore[arg-type]
    assert len(taken) == 3
    assert events[-1] == ("save", 3)


def test_a_stop_saves_at_once_and_the_rest_reports_as_the_whole() -> None:
    batches = [[float(step)] for step in range(6)]
    whole, _ = run(batches, report=4)
    window: dict[str, Tensor] = {}
    with pytest.raises(StoppedError, match="after step 2") as stopped:
        run(batches, stop_after=2, window=window, report=4)
    assert stopped.value.step == 2
    assert window["loss"].item() == 0 + 1
    rest, events = run(batches[2:], start=2, window=window, report=4)
    timed = "images_per_s"
    assert [(step, {**one, timed: 0}) for step, one in rest] == [(step, {**one, timed: 0}) for step, one in whole]
    assert ("save now", 2) not in events


def test_a_stop_at_the_last_step_is_the_end() -> None:
    _, events = run([[0.0]] * 6, stop_after=6)
    assert events[-1] == ("save", 6)


@pytest.mark.parametrize(("step", "every", "total", "is_due"), [
    (4, 2, 9, True), (5, 2, 9, False), (9, 2, 9, True), (9, 0, 9, True), (4, 0, 9, False),
])  # fmt: skip
def test_due(step: int, every: int, total: int, is_due: bool) -> None:
    assert due(step, every, total) is is_due


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_steps(bad: float) -> None:
    with pytest.raises(NonFiniteLossError, match=r"loss is (nan|inf) between steps 3 and 4; lower optim\.lr"):
        run([[1.0], [1.0], [1.0], [bad], [1.0], [1.0]])


class Game:
    """Two players: each loss is made when the other has moved, and the critic's runs through the model."""

    def __init__(self) -> None:
        self.first, self.second = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(5.0))
        self.seen: list[float] = []
        self.gradients: list[Any] = []

    def losses(self, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]:
        self.gradients += [self.first.grad, self.second.grad]
        yield "model", self.first * 2
        self.seen.append(self.first.item())
        yield "critic", self.second + 100 * self.first


def test_two_players_step_in_turn_and_each_loss_comes_after_the_last_step() -> None:
    game = Game()
    reports: list[Scalars] = []
    train(
        game,
        {"model": player(game.first), "critic": player(game.second, rate=0.5)},
        [[0], [0]],
        seed=0,
        start=0,
        steps=2,
        report=lambda step, scalars: reports.append(scalars),
        report_every=1,
        save=lambda step, now: None,
        save_every=0,
        evaluate=lambda step: {},
        evaluate_every=0,
    )
    # Under constant gradients Adam's steps are the rate: 0.1 and 0.2 for the model, 0.5 and 1.0 for the critic.
    assert game.seen == [pytest.approx(0.9), pytest.approx(0.7)]
    assert game.second.item() == pytest.approx(3.5)
    first, second = (scalars for scalars in reports if scalars)
    assert first["loss"] == pytest.approx(2)
    assert first["critic_loss"] == pytest.approx(5 + 90)
    assert second["critic_loss"] == pytest.approx(4.5 + 70)
    # What the critic's loss says to the model is not the model's to follow.
    assert (second["grad_norm"], second["critic_grad_norm"]) == (pytest.approx(2), pytest.approx(1))
    assert game.gradients == [None] * 4
