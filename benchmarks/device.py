"""Check what a GPU computes: beside a CPU, recorded and compiled beside step by step, and a whole job that is stopped.

    python benchmarks/device.py [--device cpu] [--out FOLDER]     # the core's packages only (pyproject.toml)

Each row of `params/pretrain.yaml` starts from the same weights on both devices, in fp32, on images of noise; tokenizers
are as they are drawn. On a CPU nothing is recorded. Writes device.<device>.json, and prints the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import described, drawn_pack, table
from safetensors.torch import load_file

from mim_core import devices, masks
from mim_core.data.order import Order
from mim_core.data.pack import Pack
from mim_core.devices import Compute
from mim_core.files import read_curve
from mim_core.grid import Grid
from mim_core.jobs import run as running
from mim_core.jobs.pretrain import begin, pretrain
from mim_core.masks import MASKS
from mim_core.params import load
from mim_core.pretext import MaskedFetch
from mim_core.spec import bind, build
from mim_core.tokenizers import TOKENIZERS
from mim_core.train import Recorded, StoppedError, taker
from mim_core.transforms import Augment, place

ROWS = load(Path(__file__).parents[1] / "params")
SIZE, IMAGES, BATCH, STEPS = (32, 32), 256, 64, 10
COMPILED = ("simmim_vit", "mae", "simmim_swin")


def tokenizer_of(row: Any) -> Any:
    if not row.fitted:
        return None
    torch.manual_seed(1)
    tokenizer: Any = build(TOKENIZERS, ROWS.targets[row.fitted].tokenizer, 3)
    return tokenizer.eval().requires_grad_(False)


def curve(
    row: Any, pack: Pack, compute: Compute, *, recorded: bool, compiled: bool = False
) -> tuple[list[float], bool]:
    """Losses of the first steps, and whether they were recorded."""
    torch.manual_seed(0)
    objective, trained, players, _ = begin(row, pack, 0, compute, tokenizer_of(row))
    objective.drawn = None
    if compiled:
        devices.compile_blocks(trained)
    gpu = compute.device.type == "cuda"
    fetch = MaskedFetch(pack.split("train"), objective.model.encoder.grid, bind(MASKS, row.mask), row.augment, 0, gpu)
    take = taker(objective, players)
    if isinstance(take, Recorded) and not recorded:
        take.possible = False
    found = []
    for step, addresses in enumerate(Order(np.arange(IMAGES), BATCH, 0, 0, STEPS)):
        torch.manual_seed(step)
        found.append(take(fetch(addresses), step)["loss"])
    return [one.item() for one in found], isinstance(take, Recorded) and take.graph is not None


def apart(ones: list[float], others: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ones, others, strict=True))


def rows(device: torch.device, pack: Pack, report: Callable[[str, dict[str, Any]], None]) -> None:
    gpu, cpu = Compute(device, False), Compute(torch.device("cpu"), False)
    for name, row in ROWS.pretrained().items():
        try:
            begun = time.perf_counter()
            single, _ = curve(row, pack, gpu, recorded=False)
            again, recorded = curve(row, pack, gpu, recorded=True)
            beside, _ = curve(row, pack, cpu, recorded=False)
            said: dict[str, Any] = {
                # Crops are placed in one pass there and rounded twice here, and a fill may draw on its device.
                "first loss from the CPU's": apart(single[:1], beside[:1]),
                "recorded": recorded,
                "recorded from one by one": apart(again, single),
                "losses": [single, again, beside],
            }
            if name in COMPILED:
                one, _ = curve(row, pack, gpu, recorded=False, compiled=True)
                both, _ = curve(row, pack, gpu, recorded=True, compiled=True)
                said |= {"compiled from not": apart(one, single), "compiled and recorded from not": apart(both, single)}
            said["seconds"] = time.perf_counter() - begun
        except Exception as error:  # the others are to be seen all the same
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"[:500]}
        report(name, said)


def drawn(device: torch.device) -> dict[str, Any]:
    """Masks and crops by the device beside those of the CPU."""
    different = cells = 0
    for grid, ratio, unit in ((Grid(32, 32, 4), 0.6, 8), (Grid(224, 224, 16), 0.75, 16), (Grid(192, 192, 4), 0.6, 32)):
        addresses = [(epoch, index) for epoch in (0, 3, 2**20) for index in (*range(50), 2**39)]
        here = np.stack([masks.random(masks.generator(5, *one), grid, ratio=ratio, unit_px=unit) for one in addresses])
        there = masks.random_of(torch.tensor(addresses, device=device), grid, seed=5, ratio=ratio, unit_px=unit)
        different += int((here != there.cpu().numpy()).sum())
        cells += here.size
    augment, rng = Augment(scale=(0.1, 1.0), ratio=(0.5, 2.0), flip=0.5), np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (64, 3, 48, 40), np.uint8))
    boxes = torch.tensor([augment.placing(masks.generator(0, 0, index, stream=1), 48, 40) for index in range(64)])
    one_by_one = torch.stack([augment(image, masks.generator(0, 0, i, stream=1)) for i, image in enumerate(images)])
    off = (place(images.to(device), boxes.to(device)).cpu() - one_by_one).abs().max().item()
    return {"cells of masks": cells, "different": different, "crops, largest difference of 255": off}


class After(running.Stop):
    """Asks to stop when it has been looked at so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 1


def jobs(folder: Path, pack: Pack, device: torch.device) -> dict[str, Any]:
    """A job by itself, stopped and resumed, and as long ones run: how far the ends are apart.

    Long ones are compiled, the device draws their masks, and processes of their own read.
    """
    row = ROWS.pretrain["simmim_vit"]
    ends = {}
    whole = devices.LONG
    for name, stop, long in (("one", 0, whole), ("again", 0, whole), ("stopped", 7, whole), ("long", 0, 1)):
        devices.LONG = long
        if stop:
            asked, running.STOP = running.STOP, After(stop)
            with contextlib.suppress(StoppedError):
                pretrain(row, pack, folder / name, 0)
            running.STOP = asked
        pretrain(row, pack, folder / name, 0)
        losses = [line["loss"] for line in read_curve(folder / name / "curve.jsonl") if "loss" in line]
        print(f"jobs: {name}", flush=True)
        ends[name] = load_file(folder / name / "encoder.safetensors"), losses
    devices.LONG = whole
    weights, losses = ends["one"]
    said: dict[str, Any] = {"first and last loss": [losses[0], losses[-1]]}
    for name, (other, found) in itertools.islice(ends.items(), 1, None):
        said[name] = {
            "equal weights": all(torch.equal(other[key], one) for key, one in weights.items()),
            "losses apart": apart(found, losses),
        }
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--checks", nargs="+", choices=("drawn", "jobs", "rows"), default=["drawn", "jobs", "rows"])
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.suppress_errors = False  # the product goes on without
    said: dict[str, Any] = {"machine": described(device), "rows": {}}

    def keep() -> None:
        (given.out / f"device.{given.device}.json").write_text(json.dumps(said, indent=1) + "\n")

    def report(name: str, found: dict[str, Any]) -> None:
        said["rows"][name] = found
        print(name, {key: value for key, value in found.items() if key != "losses"}, flush=True)
        keep()

    with tempfile.TemporaryDirectory() as folder:
        pack = drawn_pack(SIZE, IMAGES, Path(folder) / "pack", validation=32)
        for name, check in (("drawn", drawn), ("jobs", partial(jobs, Path(folder), pack))):
            if name not in given.checks:
                continue
            try:
                said[name] = check(device)
            except Exception as error:  # the others are to be seen all the same
                traceback.print_exc()
                said[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(name, said[name], flush=True)
        if "rows" in given.checks:
            rows(device, pack, report)
    keep()
    print(lines(said))


def lines(said: dict[str, Any]) -> str:
    columns = ["first loss from the CPU's", "recorded", "recorded from one by one", "compiled and recorded from not"]
    cells = [
        [name, *(f"{value:.1e}" if isinstance(value := found.get(one, ""), float) else str(value) for one in columns)]
        for name, found in said["rows"].items()
    ]
    return table(["row", *columns], cells)


if __name__ == "__main__":
    main()
