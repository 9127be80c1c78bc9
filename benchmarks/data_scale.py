"""Measure a dataset at scale: prepare it, open its pack and read images at random.

    python benchmarks/data_scale.py --images 1000000 --folder /tmp/scale

Generates JPEG files of 64 px, 1,000 a folder and 10 classes: a few hundred pictures of smooth noise, each told apart
by bytes behind its end, which decoders pass over and hashes do not. Then it does what `dvc repro prepare@ROW` does
after its checks, each part in a process of its own, so that peaks of memory (RSS) are that part's: the pack, by one
process a core; opening it; and `Split.tensor` at random indices, with the file dropped from the page cache and again
with what was read there. Writes benchmarks/data_scale.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from flows import workspace
from flows.progress import Bar
from flows.workers import cores
from mim_core.data import pack
from mim_core.data.folder import folder
from mim_core.data.work import Work

SIDE_PX, PICTURES, A_FOLDER, CLASSES = 64, 256, 1000, 10
READS = 20_000


def main() -> None:
    """Run the parts one after the other, and print and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where files and pack are made; the temporary folder by default")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measured(PARTS[given.part], given)))
        return
    with tempfile.TemporaryDirectory(prefix="scale-", dir=given.folder) as at:
        said: dict[str, Any] = {"images": given.images, "side_px": SIDE_PX, "processes": given.processes}
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--images", str(given.images), "--folder", at]
            done = subprocess.run([*command, "--processes", str(given.processes)], stdout=subprocess.PIPE, check=True)
            said[part] = json.loads(done.stdout.splitlines()[-1])
            print(f"{part}: {said[part]}", flush=True)
    # Here, as the parts are processes of this file, whose memory is counted.
    torch, machine = map(importlib.import_module, ("torch", "machine"))
    said["machine"] = machine.described(torch.device("cpu"))
    workspace.write_json(given.out, said)


def measured(part: Callable[[argparse.Namespace], dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Do a part; gives what it says with its seconds, CPU-seconds and peaks of memory, of its processes too."""
    before, over = peak_mib(), threading.Event()
    with ThreadPoolExecutor(1) as watch:
        below = watch.submit(highest_mib, over)
        begun = time.perf_counter()
        found = part(given)
        seconds = time.perf_counter() - begun
        over.set()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
        "highest_mib_of_a_process_of_its": below.result(),
        **{key: round(value, 3) for key, value in found.items()},
    }


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)


def highest_mib(over: threading.Event) -> int:
    """Watch the processes below this one; their peaks, as the system tells them, begin with their parent's memory."""
    highest = 0
    while not over.wait(0.2):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                highest = max(highest, child.memory_info().rss >> 20)
    return highest


def generate(given: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        content = io.BytesIO()
        noise.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(content, "JPEG", quality=85)
        pictures.append(content.getvalue())
    for index in range(given.images):
        at = given.folder / "images" / f"class_{index // A_FOLDER % CLASSES}" / f"{index // A_FOLDER:05}"
        if index % A_FOLDER == 0:
            at.mkdir(parents=True)
        (at / f"{index:08}.jpg").write_bytes(pictures[index % PICTURES] + index.to_bytes(8, "little"))
    return {"mean_file_bytes": sum(map(len, pictures)) / PICTURES + 8}


def prepare(given: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    with Bar("prepare", 1) as bar, Work(given.folder / ".part", "scale", given.processes, bar.count) as work:
        source = folder(given.folder / "images", size_px=(SIDE_PX, SIDE_PX))
        read = time.perf_counter() - begun
        pack.write(source, given.folder / "pack", {"name": "scale"}, work)
    seconds = time.perf_counter() - begun
    return {"read_seconds": read, "write_seconds": seconds - read, "images_per_s": given.images / seconds}


def opened(given: argparse.Namespace) -> dict[str, Any]:
    importlib.import_module("torch")  # takes longer than all else, and training has it
    before, begun = peak_mib(), time.perf_counter()
    train = pack.open_pack(given.folder / "pack").split("train")
    assert train.tensor(0).shape == (3, SIDE_PX, SIDE_PX)
    found = {"open_seconds": time.perf_counter() - begun, "grown_mib": peak_mib() - before}
    return {**found, "train_images": len(train), "pack_mib": sum(path.stat().st_size for path in files(given)) / 2**20}


def read(given: argparse.Namespace) -> dict[str, Any]:
    importlib.import_module("torch")
    train = pack.open_pack(given.folder / "pack").split("train")
    indices = np.random.default_rng(0).integers(0, len(train), min(READS, len(train)))
    found = {}
    for path in files(given):  # written to disk by then, so that nothing keeps it in memory
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for turn in ("cold", "warm"):
        begun = time.perf_counter()
        for index in indices:
            train.tensor(int(index))
        found[f"{turn}_images_per_s"] = len(indices) / (time.perf_counter() - begun)
    return found


def files(given: argparse.Namespace) -> list[Path]:
    return sorted((given.folder / "pack").rglob("*.npy"))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "generate": generate,
    "prepare": prepare,
    "open": opened,
    "random_access": read,
}


if __name__ == "__main__":
    main()
