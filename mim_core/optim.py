"""Optimisers and schedules.

AdamW with the papers' decay exclusions and layer-wise learning-rate decay; learning rates are pure functions of the
step, so that a resume needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
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


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "multistep": multistep, "constant": constant}


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: Callable[[str], bool] = lambda name: False,
    layer: Callable[[str], int] = lambda name: 0,
    layers: int = 1,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Group parameters by decay and layer.

    Vectors (biases, norms) and names that `no_decay` marks are not decayed. Layer i of `layers` learns at
    layer_decay ** (layers - 1 - i) of the rate: the last layer at the full rate (BEiT, section 3.1; MAE, appendix A.1).
    Each group has `lr_scale`, `weight_decay` and `names`.
    """
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and not no_decay(name)
        index = layer(name)
        scale = layer_decay ** (layers - 1 - index)
        group = groups.setdefault(
            (decays, index),
            {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


@dataclass
class Player:
    """One side of a game with its own optimiser: nearly every method has one, the adversarial term adds a second."""

    optimiser: torch.optim.Optimizer
    rate: Callable[[int], float]
    clip: float | None = None

    def step(self, step: int) -> Tensor:
        """Set the rate, clip, step and clear the gradients; gives the gradient norm before clipping (not read yet)."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip else math.inf)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(step) * group["lr_scale"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW in its fused form, which updates all tensors of a group in one pass."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
