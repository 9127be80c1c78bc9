"""Time the points of an ablation side by side, as `unmask ablate` runs them, beside one by one with all threads each.

    python benchmarks/ablation.py mask_ratio --points 4 --epochs 1 --rounds 2

Both ways run the same jobs (pretraining, then its judge) of the same rows and seed from nothing, in turns. `one by one`
starts a process a run, as a script of one's own does; `one by one, warm` leaves that out: one process for all. Needs
the pack of the ablation's dataset (`dvc repro prepare@scenes`) and an idle machine. Writes benchmarks/ablation.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import described

from flows import rows, workspace
from flows.workers import Workers, slots
from mim_core.cores import cores

Jobs = list[list[dict[str, Any]]]
"""The jobs of each point, in order."""


def main() -> None:
    """Time the ways in turns and print the median of the rounds' ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--epochs", type=float, help="epochs of pretraining and of the judge, less than the rows'")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    ways: dict[str, Callable[[Jobs], None]] = {
        "side by side": side_by_side,
        "one by one": one_by_one,
        "one by one, warm": one_by_one_warm,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(given.rounds):
        order = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for way in order:
            with tempfile.TemporaryDirectory() as folder:
                work = jobs(given.name, given.points, given.epochs, Path(folder))
                begun = time.perf_counter()
                ways[way](work)
                taken[way].append(time.perf_counter() - begun)
            print(f"round {turn + 1}: {way:18} {taken[way][-1]:7.1f} s", flush=True)
    first = taken["side by side"]
    ratios = {way: [a / b for a, b in zip(first, taken[way], strict=True)] for way in list(ways)[1:]}
    said = {
        "ablation": given.name,
        "points": given.points,
        "epochs": given.epochs,
        "seconds": taken,
        "ratio": {way: {"median": statistics.median(one), "rounds": one} for way, one in ratios.items()},
        "machine": described(torch.device("cpu")) | {"slots": slots()},
    }
    workspace.write_json(Path(__file__).with_suffix(".json"), said)
    for way, one in ratios.items():
        print(f"side by side / {way}: {statistics.median(one):.2f} (rounds {', '.join(f'{r:.2f}' for r in one)})")


def jobs(name: str, count: int, epochs: float | None, folder: Path) -> Jobs:
    """Give the jobs of the first points of an ablation, with seed 0."""
    judge = next(iter(rows.judges("ablate", name).values()))
    pack = str(workspace.pack_folder(judge["data"]))

    def shorter(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "optim": {**row["optim"], "epochs": epochs or row["optim"]["epochs"]}}

    found: Jobs = []
    for index, point in enumerate(rows.points(name)[:count]):
        before, after = folder / f"{index}_pretrain", folder / f"{index}_judge"
        shared = {"pack": pack, "seed": 0}
        first = {**shared, "kind": "pretrain", "row": shorter(point["row"]), "folder": str(before), "fitted": None}
        init, rate = str(before / "encoder.safetensors"), judge["lr_grid"][0]
        second = {**shared, "kind": "downstream", "row": shorter(judge), "folder": str(after), "init": init}
        found.append([first, {**second, "lr": rate, "test": False}])
    return found


def side_by_side(work: Jobs) -> None:
    """As the flow does: a worker a slot, with one share of the cores each; every worker starts first."""
    workers = Workers(slots(), max(1, cores() // slots()), "benchmark", [])

    def point(one: list[dict[str, Any]]) -> None:
        for job in one:
            workers.run(job, lambda lines: None)

    try:
        with ThreadPoolExecutor(slots()) as pool:
            list(pool.map(point, work))
    finally:
        workers.stop()


def one_by_one(work: Jobs) -> None:
    """A process a run, each with all cores."""
    for job in (job for point in work for job in point):
        one_by_one_warm([[job]])


def one_by_one_warm(work: Jobs) -> None:
    """One process with all cores for all runs."""
    worker = Workers(1, cores(), "benchmark", [])
    try:
        for job in (job for point in work for job in point):
            worker.run(job, lambda lines: None)
    finally:
        worker.stop()


if __name__ == "__main__":
    main()
