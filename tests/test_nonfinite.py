"""Losses that are not finite: the run goes back and is slower there, and what cannot be mended ends it with reasons."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mim_core import checkpoint
from mim_core.data.order import Address, Order
from mim_core.files import read_curve
from mim_core.jobs.run import STOP, TRIES, Run
from mim_core.optim import Average, Player, param_groups, sgd
from mim_core.train import NonFiniteLossError, StoppedError

STEPS, SPIKE, POISON = 300, 130, 200
"""Three steps a report: the first spike lies between those after 129 and 132 steps."""


class Descent(nn.Module):
    """Goes down the square of log w, which has no value where a step was too long, by a rate that leaps once."""

    def __init__(self, poisoned: Sequence[int] = (), stop_at: int = -1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.poisoned, self.stop_at = poisoned, stop_at

    def losses(self, batch: Tensor, step: int) -> Iterator[tuple[str, Tensor]]:
        if step == self.stop_at:
            STOP.asked = True
        noise = 1e-3 * torch.rand(2) + 1e-4 * batch.float().mean()
        yield "model", ((self.w + noise).log().square().sum() * (math.nan if step in self.poisoned else 1.0))


@pytest.fixture(autouse=True)
def no_stop() -> Iterator[None]:
    yield
    STOP.asked = False


def fetch(addresses: Sequence[Address]) -> Tensor:
    return torch.tensor([index for _, index in addresses])


def run(
    folder: Path,
    minutes: float,
    spike: float = 2.5,
    poisoned: Sequence[int] = (),
    stop_at: int = -1,
    at: int = SPIKE,
) -> Descent:
    model = Descent(poisoned, stop_at)
    optimiser = sgd(param_groups(model.named_parameters(), weight_decay=0.0), momentum=0.5)
    player = Player(optimiser, lambda step: spike if step == at else 1e-4, average=Average(model, 0.9))
    order = Order(np.arange(100, 140), 8, 3, 0, STEPS)
    Run(folder, model, {"model": player}, STEPS, minutes).train(model, fetch, order, lambda step: {"score": 1.0}, 10)
    return model


def whole(folder: Path) -> bool:
    """Whether all weights of all checkpoints are finite."""
    found = list((folder / "checkpoints").glob("step_*"))
    return bool(found) and all(one.isfinite().all() for path in found for one in checkpoint.load(path)[1].values())


AGAIN = "between steps 130 and 132; .*: again from step {}, at 1/2 of the rate"


@pytest.mark.reliability
def test_a_run_goes_back_is_slower_there_and_ends_alike_wherever_it_went_back_to(tmp_path: Path, tried: Tried) -> None:
    ends = []
    # With a checkpoint at each report, and with none before the end: then back to the beginning.
    for name, minutes, back in (("often", 1e-9, 129), ("never", 1e9, 0)):
        with pytest.warns(UserWarning, match=AGAIN.format(back)) as warned:
            ends.append(run(tmp_path / name, minutes).w.detach())
        assert 1 <= len(warned) <= TRIES
        lines = [line for line in read_curve(tmp_path / name / "curve.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(3, STEPS + 1, 3))
        assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
        seconds = [line["seconds"] for line in lines]
        assert seconds == sorted(seconds)
        assert whole(tmp_path / name)
    assert torch.equal(*ends)
    assert ends[0].isfinite().all()
    tried("a loss that is not finite", 1, "back to the last good checkpoint, at half the rate there")


def test_a_run_that_meets_nothing_is_not_slowed(tmp_path: Path) -> None:
    run(tmp_path, 1e-9, spike=1e-4)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found
    assert found[0]["slowed"] == {}
    assert {line["lr"] for line in read_curve(tmp_path / "curve.jsonl") if "lr" in line} == {1e-4}


@pytest.mark.parametrize("stop_at", [49, SPIKE + 1])
def test_a_stop_meanwhile_writes_nothing_that_is_not_finite_and_changes_no_bit(tmp_path: Path, stop_at: int) -> None:
    with pytest.warns(UserWarning, match="again from step"):
        straight = run(tmp_path / "straight", 1e9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(StoppedError):
            run(tmp_path / "stopped", 1e9, stop_at=stop_at)
        assert whole(tmp_path / "stopped")
        STOP.asked = False
        again = run(tmp_path / "stopped", 1e9)
    assert torch.equal(straight.w, again.w)


@pytest.mark.reliability
def test_what_stays_bad_ends_the_run_with_steps_tries_and_images_and_the_last_good_state(
    tmp_path: Path, tried: Tried
) -> None:
    said = r"loss is nan between steps 199 and 201; lower optim\.lr.*Tried 3 times more .* 1/8 of the rate\. .*images "
    with pytest.warns(UserWarning, match="again from step"), pytest.raises(NonFiniteLossError, match=said) as ended:
        run(tmp_path, 1e-9, spike=1e-4, poisoned=[POISON])
    note = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (note["after_step"], note["seed"], note["tries"]) == (198, 3, TRIES)
    order = list(Order(np.arange(100, 140), 8, 3, 0, STEPS))
    assert note["images"] == [[index for _, index in batch] for batch in order[198:201]]
    assert f"images {', '.join(map(str, note['images'][0]))}, ...: all are in {tmp_path}" in str(ended.value)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found
    assert found[0]["step"] <= 198
    assert whole(tmp_path)
    # With what was wrong gone, the same folder goes on.
    assert run(tmp_path, 1e-9, spike=1e-4).w.isfinite().all()
    tried("a loss that stays not finite", 1, "the run ends with the steps and images; the last good state stays")


def test_weights_that_were_harmed_before_the_last_report_are_not_gone_on_from(tmp_path: Path) -> None:
    """The harm is done in the last step before a report and its checkpoint, and shows in the step after."""
    ends = []
    for name, minutes in (("often", 1e-9), ("never", 1e9)):
        with pytest.warns(UserWarning, match="between steps 133 and 135; .*again from step") as warned:
            ends.append(run(tmp_path / name, minutes, at=131).w.detach())
        assert [str(one.message)[-15:] for one in warned] == ["1/2 of the rate", "1/4 of the rate"]
    assert torch.equal(*ends)
    assert ends[0].isfinite().all()
