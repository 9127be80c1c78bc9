"""What the benchmarks share: the machine's description, a pack to train on, a clock, and the form of a table."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_core.data.pack import Pack, Sample, Source, open_pack, write
from mim_core.devices import Compute, describe

NAMED = (
    "torch", "torchvision", "timm", "transformers", "lightly", "datasets", "webdataset", "dvc", "prefect", "mlflow",
)  # fmt: skip


Turn = Callable[[int], None]
"""Trains for so many steps."""


def described(device: torch.device) -> dict[str, Any]:
    """Say for a result what it was measured on, and how busy that was."""
    about = describe(Compute(device, False))
    return {
        **{key: about[key] for key in ("device", "type", "cores")},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": [round(one, 2) for one in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: found for name in NAMED if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def drawn_pack(size: tuple[int, int], batch: int, folder: Path, validation: int = 0) -> Pack:
    """A pack of noise."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for _ in range(counts[split]):
            yield Sample(rng.integers(0, 256, (3, *size), np.uint8))

    counts = {"train": batch, "validation": validation, "test": 0}
    write(Source([], counts, samples), folder, {})
    return open_pack(folder)


def timed(turn: Turn, steps: int, device: torch.device) -> float:
    """Seconds of a turn: of CPU on a CPU, else by the clock."""
    cpu = device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    if not cpu:
        torch.cuda.synchronize()
    begun = clock()
    turn(steps)
    if not cpu:
        torch.cuda.synchronize()
    return clock() - begun


def cpu_of(pid: int) -> float:
    """CPU-seconds that a process and all below it have taken so far, but for children that have ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        below = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") + sum(cpu_of(int(child)) for child in below)
    return 0.0


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    body = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in body)
