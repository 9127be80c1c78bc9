"""A small pack and small rows that the tests of the core train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mim_core import ranks
from mim_core.data.pack import Pack, Sample, Source, open_pack, write
from mim_core.jobs import perform
from mim_core.params import DownstreamRow, PretrainRow, TargetRow
from mim_core.spec import check

COUNTS = {"train": 64, "validation": 16, "test": 16}
ENCODER = {"name": "vit", "patch_px": 4, "width": 32, "depth": 2, "heads": 4, "positions": "sincos"}
AUGMENT = {"scale": [0.67, 1.0], "ratio": [0.75, 1.3333], "flip": 0.5}
TUNE = {"batch": 16, "epochs": 5, "warmup_epochs": 1, "clip": 5.0}
OPTIM = {"lr": 1.0e-3, **TUNE}
PRETRAIN = {
    "data": "tiny",
    "encoder": ENCODER,
    "mask": {"name": "random", "ratio": 0.6, "unit_px": 4},
    "fill": "mask_token",
    "head": "linear",
    "target": "pixels",
    "loss": "l1",
    "augment": AUGMENT,
    "optim": OPTIM,
    "precision": "fp32",
}
TARGET = {
    "data": "tiny",
    "tokenizer": {"name": "dvae_small", "codes": 16, "layers": 2, "width": 8, "code_width": 8},
    "temperature": {"start": 1.0, "end": 0.0625, "over": 0.5},
    "kl_weight": {"start": 0.0, "end": 0.1},
    "least_perplexity": 1.0,
    "augment": AUGMENT,
    "optim": OPTIM,
    "precision": "fp32",
}
QUANTISED = {
    "data": "tiny",
    "tokenizer": {"name": "vq_small", "codes": 16, "layers": 2, "width": 8, "code_width": 4, "restart": 1.0},
    "least_perplexity": 1.0,
    "augment": AUGMENT,
    "optim": OPTIM,
    "precision": "fp32",
}
PALETTE = {"data": "tiny", "tokenizer": {"name": "palette", "codes": 8}}
FITTED = {**PRETRAIN, "target": {"name": "tokens", "fitted": "codes"}, "loss": "cross_entropy"}
CLASSIFY = {
    "task": {"name": "classify", "smoothing": 0.1},
    "data": "tiny",
    "init": "scratch",
    "encoder": ENCODER,
    "lr_grid": [1.0e-3],
    "seeds": [0],
    "augment": AUGMENT,
    "drop_path": 0.1,
    "optim": {**TUNE, "layer_decay": 0.75},
    "precision": "fp32",
}
ABLATION = {"data": "tiny", "base": "one", "grid": {"mask.ratio": [0.3, 0.6]}, "seeds": [0], "judges": {"tuned": {}}}
SEARCH = {
    "data": "tiny",
    "base": "one",
    "judge": {"tuned": {"labels": 8}},
    "space": {"mask.ratio": {"low": 0.3, "high": 0.9, "step": 0.1}, "head": ["linear", "mlp"]},
    "trials": 4,
    "budget_device_hours": 1.0,
    "seeds": [1],
}

TUNED = {**{key: value for key, value in CLASSIFY.items() if key != "encoder"}, "init": "one"}
FILES: dict[str, dict[str, Any]] = {
    "data.yaml": {"data": {"tiny": {"source": {"name": "scenes", "size_px": [32, 48]}},
                           "mine": {"source": {"name": "coco", "size_px": 32}}}},
    "targets.yaml": {"targets": {"codes": TARGET, "colours": PALETTE}},
    "pretrain.yaml": {"pretrain_fitted": {"two": FITTED}, "pretrain": {"one": PRETRAIN}},
    "downstream.yaml": {
        "baselines": {"fresh": CLASSIFY}, "supervised": {"theirs": {**TUNED, "init": "weights/a.pth"}},
        "downstream": {"tuned": TUNED}, "continued": {"again": {**TUNED, "init": "tuned"}},
    },
    "ablations.yaml": {"ablations_fitted": {"codes": {**ABLATION, "base": "two"}}, "ablations": {"ratio": ABLATION}},
    "search.yaml": {"search_fitted": {"codes": {**SEARCH, "base": "two", "space": {"mask.ratio": [0.3, 0.6]}}},
                    "search": {"recipe": SEARCH}},
}  # fmt: skip
"""Valid rows of each section, for the dataset `tiny`."""


def source(size: tuple[int, int] = (16, 16), channels: int = 3, classes: int = 4, objects: bool = False) -> Source:
    """Noise over a slope whose brightness tells the class; with `objects`, a rectangle of each image counts as one."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(COUNTS).index(split))
        slope = np.linspace(0, 60, size[1])
        for index in range(COUNTS[split]):
            label = index % classes
            image = 40 + 120 * label / classes + slope + rng.integers(0, 30, (channels, *size))
            if not objects:
                yield Sample(image.astype(np.uint8), label)
                continue
            instances = np.zeros(size, np.uint8)
            instances[size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] - 2] = 1
            box = np.array([[size[1] // 4, size[0] // 4, size[1] - 2, size[0] // 2, label]], np.float32)
            yield Sample(image.astype(np.uint8), label, boxes=box, instances=instances)

    names = [str(label) for label in range(classes)]
    if objects:
        kinds = ("labels", "boxes", "instances")
        return Source(names, COUNTS, samples, annotations=kinds, segments=["background", *names])
    return Source(names, COUNTS, samples, annotations=("labels",))


def tiny_pack(folder: Path, **changes: Any) -> Pack:
    write(source(**changes), folder, {"source": {"name": "tiny"}})
    return open_pack(folder)


def pretrain_row(**changes: Any) -> PretrainRow:
    return check(PretrainRow, {**PRETRAIN, **changes}, "row")


def target_row(**changes: Any) -> TargetRow:
    return check(TargetRow, {**TARGET, **changes}, "row")


def classify_row(**changes: Any) -> DownstreamRow:
    return check(DownstreamRow, {**CLASSIFY, **changes}, "row")


def python(*arguments: str) -> subprocess.Popen[str]:
    """Start another Python of one thread that talks over pipes, with the project on its path."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=root
    )


def be_rank(number: int, count: int, job: Mapping[str, Any], store: Path) -> None:
    """Work on a job as one of `count` ranks, in a process that somebody else starts."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    ranks.join(store)
    perform(job)
    ranks.agreed(True)


def send(process: subprocess.Popen[str], job: Mapping[str, Any]) -> None:
    assert process.stdin
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()


def write_rows(root: Path) -> Path:
    """Write FILES as a folder of params; gives it."""
    (root / "params").mkdir(exist_ok=True)
    for name, content in FILES.items():
        (root / "params" / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "params"
