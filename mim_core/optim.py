"""Optimisers, schedules and the moving average of weights.

The papers' decay exclusions and layer-wise learning-rate decay; learning rates are pure functions of the step, so that
a resume needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.optim.lars import Lars
from torch import Tensor, nn


def cosine(
    step: int,
    total: int,
    peak: float,
    warmup: int = 0,
    floor: float = 0.0,
    start: float = 0.0,
    *,
    after_warmup: bool = False,
) -> float:
    """Linear warm-up from `start` over `warmup` steps, then half a cosine to `floor` at `total`.

    The cosine runs over the whole horizon, warm-up included, as in SimMIM's published schedule; with `after_warmup` it
    begins at the peak where the warm-up ends, as in MAE's and BEiT's.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    begun = warmup if after_warmup else 0
    share = (min(step, total) - begun) / max(1, total - begun)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * share))


def multistep(
    step: int,
    total: int,
    peak: float,
    warmup: int = 0,
    floor: float = 0.0,
    start: float = 0.0,
    *,
    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)],
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1,
) -> float:
    """Linear warm-up, then the peak, times `gamma` from each milestone (a share of the run) on; never below `floor`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    passed = sum(step >= round(share * total) for share in milestones)
    return max(floor, peak * gamma**passed)


def constant(step: int, total: int, peak: float, warmup: int = 0, floor: float = 0.0, start: float = 0.0) -> float:
    """Linear warm-up, then the peak."""
    return start + (peak - start) * step / warmup if step < warmup else peak


def polynomial(
    step: int,
    total: int,
    peak: float,
    warmup: int = 0,
    floor: float = 0.0,
    start: float = 0.0,
    *,
    power: Annotated[float, Field(gt=0)] = 1.0,
    after_warmup: bool = False,
) -> float:
    """Linear warm-up, then what is left of the run to the `power` down to `floor`: a straight line by default.

    As for the cosine, the fall begins with the run, or with `after_warmup` where the warm-up ends (segmentation in
    BEiT's code).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    begun = warmup if after_warmup else 0
    share = (min(step, total) - begun) / max(1, total - begun)
    left: float = (1 - share) ** power
    return floor + (peak - floor) * left


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "multistep": multistep,
    "polynomial": polynomial,
    "constant": constant,
}


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: Callable[[str], bool] = lambda name: False,
    layer: Callable[[str], int] = lambda name: 0,
    layers: int = 1,
    layer_decay: float = 1.0,
    factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Group parameters by decay and layer.

    Vectors (biases, norms) and names that `no_decay` marks are not decayed. Layer i of `layers` learns at
    layer_decay ** (layers - 1 - i) of the rate: the last layer at the full rate (BEiT, section 3.1; MAE, appendix A.1);
    `factor` multiplies it by a parameter's own. Each group has `lr_scale`, `weight_decay` and `names`.
    """
    groups: dict[tuple[bool, int, float], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and not no_decay(name)
        index = layer(name)
        scale = layer_decay ** (layers - 1 - index) * factor(name)
        group = groups.setdefault(
            (decays, index, scale),
            {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class Average:
    """An exponential moving average of what a model learns: its trained parameters and its norms' running moments.

    After step n, counted from 0, it moves 1 - min(decay, (1 + n) / (10 + n)) of the way to the weights: the rising
    share (that of TensorFlow's moving averages) lets a run of fewer steps than 1 / (1 - decay) forget where it began.
    """

    own: dict[str, Tensor]
    values: dict[str, Tensor]

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay

    def begin(self) -> None:
        """Begin at the model's weights, which are on their device and stay where they are in memory from here on."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        moments = ("running_mean", "running_var")
        state = self.model.state_dict()
        self.own = {name: one for name, one in state.items() if name in trained or name.endswith(moments)}
        self.values = {name: one.clone() for name, one in self.own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.own.values()), share)

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Put the average in the weights' place for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def wear(self) -> None:
        """Put the average in the weights' place for good."""
        for name, one in self.own.items():
            one.copy_(self.values[name])

    def load(self, values: dict[str, Tensor]) -> None:
        """Take the average of a checkpoint."""
        for name, one in self.values.items():
            one.copy_(values[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, one in self.own.items():
            kept = one.clone()
            one.copy_(self.values[name])
            self.values[name].copy_(kept)


@dataclass
class Player:
    """One side of a game with its own optimiser: nearly every method has one, the adversarial term adds a second."""

    optimiser: torch.optim.Optimizer
    rate: Callable[[int], float]
    clip: float | None = None
    average: Average | None = None

    def step(self, step: int) -> Tensor:
        """Set the rate, clip, step and clear the gradients; gives the gradient norm before clipping (not read yet)."""
        self.set_rates(step)
        norm = self.update()
        if self.average:
            self.average.update(step)
        return norm

    def set_rates(self, step: int) -> None:
        rate = self.rate(step)
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["lr_scale"])
            else:
                group["lr"] = rate * group["lr_scale"]

    def update(self) -> Tensor:
        """Clip, step at the rates that are set, and clear the gradients; gives their norm before clipping."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip else math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    @property
    def records(self) -> bool:
        """Whether `update` may be recorded as a part of a CUDA graph."""
        return isinstance(self.optimiser, torch.optim.AdamW) and self.average is None

    def record(self, on: bool = True) -> None:
        """Keep rates on the device, where a recorded update reads them, or as numbers again."""
        for group in self.optimiser.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(float(group["lr"]), device=device) if on else float(group["lr"])
            group["capturable"] = on

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, on whatever device: the optimiser's state and the average."""
        state = self.optimiser.state_dict()
        for group in state["param_groups"]:
            # Set anew at every step, and how they are kept is not the next run's affair.
            group["lr"] = float(group["lr"])
            if "capturable" in group:
                group["capturable"] = False
        return {"optimiser": state, "average": self.average.values if self.average else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average:
            self.average.load(state["average"])


Groups = list[dict[str, Any]]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def adamw(groups: Groups, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Optimizer:
    """AdamW in its fused form, which updates all tensors of a group in one pass."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def sgd(groups: Groups, *, momentum: Momentum = 0.9, nesterov: bool = False) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov and momentum > 0)


def lars(
    groups: Groups, *, momentum: Momentum = 0.9, trust: Annotated[float, Field(gt=0)] = 1e-3
) -> torch.optim.Optimizer:
    """LARS (You et al., 2017), as MAE's linear probe uses it: momentum under rates in proportion to a weight's norm.

    Each matrix learns at trust * |w| / (|g| + weight_decay * |w|) of the rate, also where nothing is decayed; vectors
    learn at the rate itself. A matrix of zeros learns at the rate.
    """
    parted = []
    for group in groups:
        for matrices in (True, False):
            pairs = zip(group["params"], group["names"], strict=True)
            kept = [(one, name) for one, name in pairs if (one.ndim > 1) == matrices]
            if kept:
                params, names = map(list, zip(*kept, strict=True))
                parted.append({**group, "params": params, "names": names, "always_adapt": matrices})
    optimiser: torch.optim.Optimizer = Lars(parted, lr=0.0, momentum=momentum, trust_coeff=trust)
    return optimiser


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "sgd": sgd, "lars": lars}
