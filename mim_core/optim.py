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
from timm.optim.muon import zeropower_via_newtonschulz
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
        return type(self.optimiser) is torch.optim.AdamW and self.average is None

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
    parted = list(_parted(groups, lambda name, one: one.ndim > 1, "always_adapt"))
    optimiser: torch.optim.Optimizer = Lars(parted, lr=0.0, momentum=momentum, trust_coeff=trust)
    return optimiser


class Muon(torch.optim.AdamW):
    """Muon for the matrices of transformer blocks, AdamW for all else; see `muon`."""

    ITERATION = (3.4445, -4.7750, 2.0315)
    """Coefficients of X, X X' X and (X X')^2 X, as published."""

    def __init__(
        self, groups: Groups, betas: tuple[float, float], momentum: float, rms: float, iterations: int
    ) -> None:
        self.momentum, self.rms, self.iterations = momentum, rms, iterations
        parted = list(_parted(groups, lambda name, one: of_a_block(name), "orthogonal"))
        super().__init__(parted, lr=0.0, betas=betas, eps=1e-8, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the blocks' matrices, and leave to AdamW what then still has a gradient."""
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            if group["orthogonal"]:
                for name, one in zip(group["names"], group["params"], strict=True):
                    if one.grad is not None:
                        self._gather(alike, name, one, group)
        for (_, longer), moves in alike.items():
            moved = torch.stack([update for update, _, _ in moves])
            # The published bfloat16 is emulated on many CPUs, where all of a step takes ten times as long with it.
            kind = torch.bfloat16 if moved.is_cuda else moved.dtype
            directions = zeropower_via_newtonschulz(moved, self.iterations, [self.ITERATION], dtype=kind)
            for direction, (_, values, rate) in zip(directions.to(moved.dtype), moves, strict=True):
                # A direction's entries have a root mean square of 1 / sqrt(longer side).
                values.add_(direction, alpha=-rate * self.rms * math.sqrt(longer))
        return super().step(closure)

    def _gather(
        self,
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]],
        name: str,
        one: Tensor,
        group: dict[str, Any],
    ) -> None:
        """Decay a matrix, and put its update with those of its shape: they are made orthogonal together."""
        assert one.grad is not None
        state = self.state[one]
        if not state:
            # AdamW, which loads a checkpoint's state, wants to find a step.
            state["step"], state["momentum"] = torch.zeros((), device=one.device), torch.zeros_like(one)
        state["step"] += 1
        momentum = state["momentum"].lerp_(one.grad, 1 - self.momentum)
        update = one.grad.lerp(momentum, self.momentum)
        one.grad = None
        one.mul_(1 - group["lr"] * group["weight_decay"])
        # Queries, keys and values are matrices of their own, kept as one.
        parts = 3 if name.endswith("qkv.weight") else 1
        for change, values in zip(update.chunk(parts), one.detach().chunk(parts), strict=True):
            if change.shape[0] > change.shape[1]:
                change, values = change.mT, values.mT
            shape = (change.shape[0], change.shape[1])
            alike.setdefault(shape, []).append((change, values, float(group["lr"])))


def muon(
    groups: Groups,
    betas: tuple[float, float] = (0.9, 0.999),
    *,
    momentum: Momentum = 0.95,
    rms: Annotated[float, Field(gt=0)] = 0.2,
    iterations: Annotated[int, Field(ge=1, le=10)] = 5,
) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024): a matrix moves by its Nesterov momentum with all singular values made nearly one.

    For the matrices of attention and MLP in transformer blocks; all else (embeddings, heads, tokens, vectors) takes
    AdamW's steps with `betas` at the same rate. The entries of a matrix's update have a root mean square of `rms` times
    the rate, whatever its shape; 0.2 is about that of AdamW's (Liu et al., Muon is Scalable for LLM Training, 2025,
    section 2.2). Newton-Schulz `iterations` bring singular values near one. Weight decay as AdamW's.
    """
    return Muon(groups, betas, momentum, rms, iterations)


BLOCK = (".attn.qkv.weight", ".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")
"""How the names of the matrices of timm's transformer blocks end."""


def of_a_block(name: str) -> bool:
    """Whether a parameter is a matrix of attention or MLP in a transformer block."""
    return f".{name}".endswith(BLOCK)


def _parted(groups: Groups, chosen: Callable[[str, nn.Parameter], bool], key: str) -> Iterator[dict[str, Any]]:
    """Part each group in two by what is chosen, which `key` of each then tells."""
    for group in groups:
        for held in (True, False):
            pairs = zip(group["names"], group["params"], strict=True)
            kept = [(name, one) for name, one in pairs if chosen(name, one) == held]
            if kept:
                names, params = map(list, zip(*kept, strict=True))
                yield {**group, "params": params, "names": names, key: held}


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "lars": lars,
    "muon": muon,
}
WITH_BETAS = {"adamw", "muon"}
"""Optimisers that take AdamW's betas."""
