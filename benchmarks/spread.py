"""How far weights differ where bits are not promised: another number of threads in the maths, another device.

    python benchmarks/spread.py --data packs/scenes --steps 200

Trains one small row with the same seed, images, masks and order under each setting, and compares its final weights and
loss with those of the first; and with another seed's, which is what differences are to be held against. A row of the
table is a run: the largest difference of a weight, the norm of all differences over that of the weights, the losses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROW = {
    "data": "any",
    "encoder": {"name": "vit", "patch_px": 4, "width": 64, "depth": 3, "heads": 4, "positions": "sincos"},
    "mask": {"name": "random", "ratio": 0.6, "unit_px": 4},
    "fill": "mask_token",
    "head": "linear",
    "target": "pixels",
    "loss": "l1",
    "augment": {"scale": [0.67, 1.0], "flip": 0.5},
    "optim": {"lr": 1.0e-3, "batch": 32, "epochs": 1, "clip": 5.0},
    "precision": "fp32",
}
TRAIN = """
import json, sys
from pathlib import Path
import torch
given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
from mim_core import devices
from mim_core.data.pack import open_pack
from mim_core.jobs import pretrain
from mim_core.params import PretrainRow
from mim_core.spec import check
if given["device"] == "cpu":
    torch.cuda.is_available = lambda: False
pack = open_pack(Path(given["pack"]))
found = pretrain(check(PretrainRow, given["row"], "row"), pack, Path(given["out"]), seed=given["seed"])
print(json.dumps({"loss": found["loss"], "device": found["compute"]["device"]}))
"""


def run(pack: Path, steps: int, threads: int, device: str, seed: int, out: Path) -> dict[str, Any]:
    """Train in a process of its own; gives its loss, device and weights."""
    from safetensors.torch import load_file

    count = json.loads((pack / "meta.json").read_text())["counts"]["train"]
    batch = ROW["optim"]["batch"]  # type: ignore[index]
    row = {**ROW, "optim": {**ROW["optim"], "epochs": steps / max(1, count // batch)}}  # type: ignore[dict-item]
    given = {"pack": str(pack), "row": row, "threads": threads, "device": device, "seed": seed, "out": str(out)}
    done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(given)], check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "weights": load_file(out / "model.safetensors")}


def compare(first: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, int]:
    """Largest difference of a weight, relative norm of all, and how many of the numbers differ."""
    import torch

    ours, theirs = (torch.cat([one.double().flatten() for one in run["weights"].values()]) for run in (first, other))
    apart = ours - theirs
    return apart.abs().max().item(), (apart.norm() / ours.norm()).item(), int((apart != 0).sum())


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("packs/scenes"), metavar="PACK")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    cases = [(f"cpu, {threads} threads", threads, "cpu", 0) for threads in given.threads]
    cases.insert(1, (f"cpu, {given.threads[0]} threads, again", given.threads[0], "cpu", 0))
    if torch.cuda.is_available():
        cases += [("cuda", 1, "cuda", 0), ("cuda, again", 1, "cuda", 0)]
    cases.append(("another seed", given.threads[0], "cpu", 1))
    print(f"{'run':24} {'largest':>10} {'relative':>10} {'numbers that differ':>20} {'loss':>12}")
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for index, (name, threads, device, seed) in enumerate(cases):
            found.append(run(given.data, given.steps, threads, device, seed, Path(folder) / str(index)))
            largest, relative, many = compare(found[0], found[-1])
            total = sum(one.numel() for one in found[0]["weights"].values())
            print(f"{name:24} {largest:10.2g} {relative:10.2g} {many:>10,} of {total:,} {found[-1]['loss']:12.7f}")


if __name__ == "__main__":
    main()
