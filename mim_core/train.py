"""The training loop: read, forward, backward, clip, step, report, evaluate, save. It serves every stage that trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mim_core import ranks
from mim_core.optim import Player

Scalars = dict[str, float]


class Objective(Protocol):
    """What is trained. `losses` yields (player, loss), each loss computed after the previous player's step.

    `step` counts the steps done before: what a schedule reads.
    """

    def losses(self, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]: ...


class NonFiniteLossError(RuntimeError):
    """A loss, gradient norm or weight was NaN or infinite after step `since`; what went before was sound."""

    def __init__(self, what: str, since: int, done: int) -> None:
        mend = "lower optim.lr, lengthen optim.warmup_epochs or set precision: fp32"
        super().__init__(f"{what} between steps {since + 1} and {done}; {mend}")
        self.since = since


class StoppedError(Exception):
    """Training was asked to stop and did, after `step` steps, with a checkpoint of them."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, with a checkpoint")
        self.step = step


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == total or (every > 0 and step % every == 0)


def train(
    objective: Objective,
    players: Mapping[str, Player],
    batches: Iterable[Any],
    *,
    seed: int,
    start: int,
    steps: int,
    report: Callable[[int, Scalars], None],
    report_every: int,
    save: Callable[[int, bool], None],
    save_every: int,
    evaluate: Callable[[int], Scalars],
    evaluate_every: int,
    stop: Callable[[], bool] = lambda: False,
    window: dict[str, Tensor] | None = None,
) -> None:
    """Train from `start` steps done to `steps` done; `batches` begin with the batch of step `start`.

    Reported scalars are means over the steps since the last report; `window` holds their sums, also those that a stop
    left. `save` gets the steps done and whether it must write now. Raises NonFiniteLossError; StoppedError where
    `stop`, asked after each step, is true on any rank: an evaluation is finished first.
    """
    window = {} if window is None else window
    since, images, begun = start - (start % report_every if window else 0), 0, time.perf_counter()
    for step, batch in enumerate(batches, start):
        # Dropout and drop path draw from a stream that step and rank name, so a resume needs no generator state.
        torch.manual_seed(seed << 32 | ranks.number() << 26 | step)
        for name, loss in objective.losses(batch, step):
            loss.backward()  # type: ignore[no-untyped-call]
            norm = players[name].step(step)
            for player in players.values():
                # A loss may run through other players (a critic's judgement): that is not theirs to follow.
                player.optimiser.zero_grad(set_to_none=True)
            prefix = "" if name == "model" else f"{name}_"
            for key, value in ((f"{prefix}loss", loss.detach()), (f"{prefix}grad_norm", norm)):
                # Summed on the device: reading a value here would make the device wait at every step.
                window[key] = window[key] + value if key in window else value
        images, done = images + len(batch), step + 1
        if due(done, report_every, steps):
            scalars = _sound(window, players, since, done)
            speed = ranks.total(images) / (time.perf_counter() - begun)
            scalars |= {"lr": players["model"].rate(step), "images_per_s": speed}
            report(done, scalars)
            window.clear()
            since, images, begun = done, 0, time.perf_counter()
        if due(done, evaluate_every, steps):
            paused = time.perf_counter()
            report(done, evaluate(done))
            begun += time.perf_counter() - paused
        stopped = done < steps and ranks.agreed(stop())
        if stopped or due(done, save_every, steps):
            if window:
                _sound(window, players, since, done)
            save(done, stopped)
        if stopped:
            raise StoppedError(done)
        if done == steps:
            return


def _sound(window: Mapping[str, Tensor], players: Mapping[str, Player], since: int, done: int) -> Scalars:
    """Give a window's means, over the ranks too; raises NonFiniteLossError where one, or a weight, is not finite."""
    scalars = {key: ranks.mean(value).item() / (done - since) for key, value in window.items()}
    for key, value in scalars.items():
        if key.endswith(("loss", "grad_norm")) and not math.isfinite(value):
            raise NonFiniteLossError(f"{key} is {value}", since, done)
    weights = [p for one in players.values() for group in one.optimiser.param_groups for p in group["params"]]
    if not torch.stack([weight.detach().isfinite().all() for weight in weights]).all():
        raise NonFiniteLossError("a weight is not finite", since, done)
    return scalars
