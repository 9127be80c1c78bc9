"""What DVC, Prefect and MLflow add to a stage, and what reports and checkpoints add to a training loop.

    python benchmarks/layers.py [--rounds 3] [--turns 9]

A clone of the project in a temporary folder runs one short pretraining row, in turns: its job alone (a process of
`mim_core.jobs`), its flow without servers (Prefect then starts one of its own), its flow with both servers up, and all
of that by `dvc repro`. CPU-seconds are those of the command and all its children, and of the servers. An empty flow and
a bare record show what Prefect and MLflow take by themselves. The loop is `mim_core.train` with its reports, beside
forward, backward and step alone, on the embedded images' SimMIM row; a checkpoint a minute is timed by itself.

Writes benchmarks/layers.json and the tables benchmarks/layers.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import cpu_of, described, drawn_pack, table, timed

from mim_core import devices
from mim_core.cores import cores
from mim_core.jobs.pretrain import begin
from mim_core.jobs.run import Run
from mim_core.masks import MASKS
from mim_core.params import load
from mim_core.pretext import MaskedFetch
from mim_core.spec import bind
from mim_core.train import train

ROOT = Path(__file__).parents[1]
ROW = "layers"
ROWS = f"""
  {ROW}:
    data: scenes
    encoder: {{name: vit, patch_px: 4, width: 32, depth: 2, heads: 2, positions: sincos}}
    mask: {{name: random, ratio: 0.6, unit_px: 4}}
    fill: mask_token
    head: linear
    target: pixels
    loss: l1
    optim: {{lr: 1.0e-3, batch: 32, epochs: 4, clip: 5.0}}
"""
FLOW = """
import flows
from prefect import flow, task

@task
def one(): pass

@flow
def empty():
    for _ in range(3):
        one()

empty()
"""
RECORD = """
import sys, pathlib, time, flows
from flows.tracking import Record
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
record = Record("pretrain", "layers", folder, {"name": "scenes", "md5": "0"}, {"seed": 0})
curve = record.child("layers seed 0", folder, {"seed": 0})
for step in range(1, 33):
    curve.add([{"step": step, "time": time.time(), "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "images_per_s": 1.0}])
curve.finish({"loss": 1.0, "steps": 32})
record.end(record.parent)
"""


class Workspace:
    """A clone of the project with a small dataset and row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in tracked.stdout.split():  # as it stands, changes that are not committed included
            shutil.copyfile(ROOT / name, folder / name)
        data = folder / "params" / "data.yaml"
        data.write_text(data.read_text().replace("train: 12000, validation: 1000, test: 2000", SMALL))
        with (folder / "params" / "pretrain.yaml").open("a") as rows:
            rows.write(ROWS)
        own = ("PREFECT_", "MLFLOW_", "UNMASK_")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(own)},
            "PYTHONPATH": str(folder),
            "HOME": str(folder.parent),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "UNMASK_PREFECT_PORT": str(_free_port()),
            "UNMASK_MLFLOW_PORT": str(_free_port()),
        }
        self.run(["-m", "flows.cli", "data", "restore"])
        self.run(["-m", "dvc", "repro", "prepare@scenes"])

    def run(self, arguments: list[str], given: str | None = None) -> None:
        """Run Python with arguments; what it says is shown where it fails."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            input=given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}")

    def cpu(self) -> float:
        """CPU-seconds so far of all commands that have ended, and of the servers."""
        recorded = self.folder / ".unmask" / "servers.json"
        servers = json.loads(recorded.read_text()).values() if recorded.exists() else []
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime + sum(cpu_of(said["pid"]) for said in servers)

    def measured(self, way: Callable[[], None]) -> tuple[float, float]:
        """Seconds by the clock and of CPU of a way, servers included."""
        begun, before = time.perf_counter(), self.cpu()
        way()
        return time.perf_counter() - begun, self.cpu() - before


SMALL = "train: 256, validation: 64, test: 64"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stages(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and CPU-seconds of each way to run the row."""
    with tempfile.TemporaryDirectory() as temporary:
        there = Workspace(Path(temporary) / "clone")
        params = load(there.folder / "params").pretrained()[ROW].model_dump(mode="json")
        fresh = (there.folder / ".unmask" / f"alone_{index}" for index in itertools.count())

        def job() -> None:
            work = {"kind": "pretrain", "row": params, "pack": "packs/scenes", "seed": 0, "fitted": None}
            given = {**work, "folder": str(next(fresh)), "threads": cores()}  # as in the flow: waiting threads take CPU
            there.run(["-m", "mim_core.jobs"], json.dumps(given) + "\n")

        def flow() -> None:
            there.run(["-m", "flows.pretrain", ROW])

        def repro() -> None:
            there.run(["-m", "dvc", "repro", "--force", "--single-item", f"pretrain@{ROW}"])

        without: dict[str, Callable[[], None]] = {"flow, no servers": flow}
        up: dict[str, Callable[[], None]] = {
            "job alone": job,
            "flow, servers up": flow,
            "dvc repro, servers up": repro,
            "an empty flow (Prefect)": lambda: there.run(["-c", FLOW]),
            "a record (MLflow)": lambda: there.run(["-c", RECORD, str(next(fresh))]),
        }
        found: dict[str, dict[str, list[float]]] = {}
        try:
            for ways in (without, up):
                if ways is up:
                    there.run(["-m", "flows.cli", "up"])
                    there.run(["-m", "flows.pretrain", ROW])  # a first run with new servers is not what is asked
                for turn in range(rounds):
                    for name in list(ways)[:: -1 if turn % 2 else 1]:
                        seconds, cpu = there.measured(ways[name])
                        one = found.setdefault(name, {"seconds": [], "cpu": []})
                        one["seconds"].append(seconds)
                        one["cpu"].append(cpu)
                        print(f"{name:26} {seconds:6.1f} s {cpu:6.1f} CPU-s", flush=True)
        finally:
            there.run(["-m", "flows.cli", "down"])
    return found


def loop(turns: int, steps: int = 12) -> dict[str, Any]:
    """Ratios of the product's loop to the bare step, and the CPU-seconds of a checkpoint."""
    row = load(ROOT / "params").pretrained()["simmim_vit"]
    device = torch.device("cpu")
    torch.set_num_threads(1)
    devices.keep_freed_memory()  # as a job does
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pack = drawn_pack((32, 32), row.optim.batch, folder / "pack")
        torch.manual_seed(0)
        objective, trained, players, _ = begin(row, pack, 0, devices.choose("cpu", row.precision))
        grid = objective.model.encoder.grid
        fetch = MaskedFetch(pack.split("train"), grid, bind(MASKS, row.mask), None, 0)
        batches = itertools.cycle([fetch([(epoch, i) for i in range(row.optim.batch)]) for epoch in range(4)])
        run = Run(folder / "run", trained, players, 10**6, row.checkpoint_minutes)
        run.resume()
        every = max(1, row.optim.steps(12_000)[0] // 100)
        done = 0

        def bare(count: int) -> None:
            for batch in itertools.islice(batches, count):
                ((_, loss),) = objective.losses(batch, 0)
                loss.backward()  # type: ignore[no-untyped-call]
                players["model"].step(0)

        def whole(count: int) -> None:
            nonlocal done
            train(
                objective,
                players,
                itertools.islice(batches, count),
                seed=0,
                start=done,
                steps=10**6,
                report=run.report,
                report_every=every,
                save=lambda step, now: None,
                save_every=every,
                evaluate=lambda step: {},
                evaluate_every=0,
                window=run.window,
            )
            done += count

        for way in (bare, whole):
            way(2)
        ratios = []
        for turn in range(turns):
            order = (bare, whole) if turn % 2 else (whole, bare)
            spent = {way: timed(way, max(steps, every), device) for way in order}
            ratios.append(spent[whole] / spent[bare])
        saves = [timed(lambda _: run.save(done, True), 1, device) for _ in range(5)]
    return {
        "reports": {"median": statistics.median(ratios) - 1, "rounds": [one - 1 for one in ratios]},
        "report_every": every,
        "checkpoint_cpu_s": statistics.median(saves),
        "checkpoint_a_minute": statistics.median(saves) / 60,
    }


def lines(said: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{statistics.median(one[key]):.1f} ({min(one[key]):.1f}-{max(one[key]):.1f})" for key in one)]
        for name, one in said["stages"].items()
    ]
    text = table(["one short stage", "seconds (spread)", "CPU-seconds (spread)"], rows)
    cpu = {name: statistics.median(one["cpu"]) for name, one in said["stages"].items()}
    if "job alone" in cpu:
        flow, repro = cpu["flow, servers up"], cpu["dvc repro, servers up"]
        added = [
            ["Prefect and MLflow", f"{flow - cpu['job alone']:.1f}"],
            ["DVC", f"{repro - flow:.1f}"],
            ["all three", f"{repro - cpu['job alone']:.1f}"],
        ]
        text += "\n" + table(["added to the job, servers up", "CPU-seconds"], added)
    found = said["loop"]
    rows = [
        [f"a report every {found['report_every']} steps", f"{found['reports']['median']:.1%}"],
        [f"a checkpoint a minute ({found['checkpoint_cpu_s']:.2f} CPU-s)", f"{found['checkpoint_a_minute']:.1%}"],
    ]
    return text + "\n" + table(["added to the bare step (SimMIM's row, 32 px)", "share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each way to run a stage")
    parser.add_argument("--turns", type=int, default=9, help="of each loop")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    said: dict[str, Any] = {"machine": described(torch.device("cpu")), "loop": loop(given.turns), "stages": {}}
    if given.rounds:
        said["stages"] = stages(given.rounds)
    (given.out / "layers.json").write_text(json.dumps(said, indent=1) + "\n")
    (given.out / "layers.md").write_text(lines(said))
    print(lines(said))


if __name__ == "__main__":
    main()
