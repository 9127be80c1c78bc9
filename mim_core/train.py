"""The training loop: read, forward, backward, clip, step, report, evaluate, save. It serves every stage that trains."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mim_core import ranks
from mim_core.optim import Player

Scalars = dict[str, float]
Take = Callable[[Any, int], dict[str, Tensor]]
"""Takes one step on a batch; gives each player's loss and gradient norm, not read yet."""


class Objective(Protocol):
    """What is trained. `losses` yields (player, loss), each loss computed after the previous player's step.

    `step` counts the steps done before: what a schedule reads.
    """

    def losses(self, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]: ...


class Recordable(Objective, Protocol):
    """An objective whose steps may be recorded: `losses` is `losses_of(sent(batch))`, the second all on the device."""

    def sent(self, batch: Any) -> Any: ...

    def losses_of(self, sent: Any) -> Iterator[tuple[str, Tensor]]: ...


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
    take: Take | None = None,
) -> None:
    """Train from `start` steps done to `steps` done; `batches` begin with the batch of step `start`.

    Reported scalars are means over the steps since the last report; `window` holds their sums, also those that a stop
    left. `take` takes the steps, `taker`'s where none is given. `save` gets the steps done and whether it must write
    now. Raises NonFiniteLossError; StoppedError where `stop`, asked after each step, is true on any rank: an evaluation
    is finished first.
    """
    window = {} if window is None else window
    take = take or taker(objective, players)
    since, images, begun = start - (start % report_every if window else 0), 0, time.perf_counter()
    for step, batch in enumerate(batches, start):
        # Dropout and drop path draw from a stream that step and rank name, so a resume needs no generator state.
        torch.manual_seed(seed << 32 | ranks.number() << 26 | step)
        for key, value in take(batch, step).items():
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


def taker(objective: Objective, players: Mapping[str, Player]) -> Take:
    """Give what takes steps: one by one or, where objective and players say that they allow it, recorded."""
    if getattr(objective, "records", False) and all(player.records for player in players.values()):
        recordable: Any = objective
        return Recorded(recordable, players)
    return lambda batch, step: followed(objective.losses(batch, step), players, lambda player: player.step(step))


def followed(
    losses: Iterable[tuple[str, Tensor]], players: Mapping[str, Player], move: Callable[[Player], Tensor]
) -> dict[str, Tensor]:
    """Have each loss's player follow its gradient; gives losses and gradient norms by name."""
    found: dict[str, Tensor] = {}
    for name, loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        norm = move(players[name])
        for player in players.values():
            # A loss may run through other players (a critic's judgement): that is not theirs to follow.
            player.optimiser.zero_grad(set_to_none=True)
        prefix = "" if name == "model" else f"{name}_"
        found |= {f"{prefix}loss": loss.detach(), f"{prefix}grad_norm": norm}
    return found


class Recorded:
    """Takes steps by a CUDA graph, so that the device does not wait for each launch: the same kernels in one call.

    The first steps on batches of one shape are taken one by one, in which libraries and optimisers make what they keep;
    then one is recorded, and all that follow replay it. A batch of another shape, or whose hidden positions are known
    as a mask alone, which makes shapes depend on values, is taken by itself.
    """

    BEFORE = 3

    def __init__(self, objective: Recordable, players: Mapping[str, Player]) -> None:
        self.objective, self.players = objective, players
        self.shape: Any = None
        self.seen, self.possible = 0, True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Any = None
        self.found: dict[str, Tensor] = {}

    def __call__(self, batch: Any, step: int) -> dict[str, Tensor]:
        sent = self.objective.sent(batch)
        shape = [None if one is None else (one.shape, one.dtype, one.device) for one in sent]
        fixed = sent.wanted is None or sent.wanted.dtype != torch.bool
        if self.graph is None and fixed and self.possible:
            self.seen = self.seen + 1 if shape == self.shape else 0
            self.shape = shape
            if self.seen >= self.BEFORE:
                self._record(sent)
        if self.graph is None or shape != self.shape:
            return followed(self.objective.losses_of(sent), self.players, lambda player: player.step(step))
        for player in self.players.values():
            player.set_rates(step)
        for own, one in zip(self.given, sent, strict=True):
            if own is not None:
                own.copy_(one)
        self.graph.replay()
        return {name: value.clone() for name, value in self.found.items()}

    def _record(self, sent: Any) -> None:
        """Record a step on a batch of this shape; it is not taken by that."""
        self.given = type(sent)(*(None if one is None else one.clone() for one in sent))
        for player in self.players.values():
            player.record()
        torch.cuda.synchronize()
        # The recording has memory of its own, and takes what the steps before it leave.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of the loader may pin memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.found = followed(self.objective.losses_of(self.given), self.players, Player.update)
            self.graph = graph
        except RuntimeError as error:
            self.possible, self.given, self.found = False, None, {}
            for player in self.players.values():
                player.record(False)
                player.optimiser.zero_grad(set_to_none=True)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"a step could not be recorded as a CUDA graph ({said}): steps go on one by one", stacklevel=2
            )


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
