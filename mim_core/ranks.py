"""Ranks: the processes that train one model together on one machine, each on its share of every batch.

A process alone is rank 0 of 1, and nothing here changes or costs it anything. Rank 0 reports, evaluates and writes.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(days=1)
"""The others wait while rank 0 evaluates; one that died is not waited for, as the launcher ends the rest."""


def join(store: Path) -> None:
    """Join the ranks that the elastic launcher started, through a file; each has the GPU of its number, if any."""
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"
    file = distributed.FileStore(str(store), count)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=file, rank=number, world_size=count, timeout=TIMEOUT)


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """Tell which of the ranks this process is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def mean(values: Tensor) -> Tensor:
    """Take the mean over the ranks, each entry by itself; all of them must ask."""
    if count() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / count()


def total(value: float) -> float:
    """Take the sum over the ranks; all of them must ask."""
    return mean(torch.tensor(value, dtype=torch.float64)).item() * count()


def agreed(flag: bool) -> bool:
    """Tell whether it is so on any rank; all must ask, and none goes on before the last has.

    It goes over the CPU, so that no rank waits for its GPU.
    """
    if count() == 1:
        return flag
    found = torch.tensor(int(flag))
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def shared(model: nn.Module) -> nn.Module:
    """Wrap a model on its device so that each rank's gradients become the mean over the ranks."""
    # Heads that do not read all of an encoder leave parameters without a gradient, the same ones at every step.
    return DistributedDataParallel(model, static_graph=True)
