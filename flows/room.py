"""How much room on the disk the present rows still need: packs, results and checkpoints, before anything is begun."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import rows, workspace
from flows.workers import slots

KEPT = 2
"""Checkpoints that a job keeps."""
CACHED = 2
"""What DVC tracks lies in its cache too, where the file system cannot share blocks."""
PIXEL = 3 + 2
"""Bytes a pixel of a pack at most: three colours, an instance and a class."""
RECORD = 2**20
"""Bytes of a run's pictures, curves and records, roundly."""
PUBLISHED = {"cifar10": 60_000, "cifar100": 60_000, "stl10": 113_000}
"""Images of datasets that are not one file each."""


@dataclass(frozen=True)
class Room:
    """Bytes: of `packs` and of `runs` that are not there yet, and of `checkpoints` while the largest stage runs.

    Stages run one after another, and each drops its checkpoints at its end.
    """

    packs: int
    runs: int
    checkpoints: int

    @property
    def total(self) -> int:
        return self.packs + self.runs + self.checkpoints


def needed() -> Room:
    """Estimate what `dvc repro` of all rows needs beside what is there; raises UserError where rows have faults.

    An upper bound, as file systems that share blocks need half of it; of rows that begin from others' weights only
    their pictures are counted, as the file is not read here.
    """
    given, sizes = rows.load(), rows.sizes()
    packs = sum(CACHED * _pack(name, row["source"]) for name, row in given["data"].items())
    runs, stages = 0, [0]
    kinds = {"targets": "targets"} | dict.fromkeys(rows.PRETRAIN, "pretrain") | dict.fromkeys(rows.JUDGED, "downstream")
    for section, kind in kinds.items():
        for name, row in given[section].items():
            if (workspace.run_folder(kind, name) / "manifest.json").exists():
                continue
            size = sizes.get(f"{section}.{name}", {"weights": 0, "checkpoint": 0})
            # A pretrain row has its encoder and its whole model; MLflow's registry a copy of what is registered.
            files = {"targets": CACHED, "pretrain": 2 * CACHED + 1, "downstream": CACHED + 2}[kind]
            runs += files * size["weights"] + RECORD
            # Jobs of a stage keep their files until all are done.
            jobs = len(row["lr_grid"] or [0]) + len(row["seeds"]) - 1 if kind == "downstream" else 1
            stages.append(jobs * (KEPT * size["checkpoint"] + 2 * size["weights"]) + size["checkpoint"])
    for stage, sections in rows.LABORATORY.items():
        for section in sections:
            for name, row in given[section].items():
                if (workspace.run_folder(stage, name) / "manifest.json").exists():
                    continue
                base = next(sizes[f"{one}.{row['base']}"] for one in rows.PRETRAIN if row["base"] in given[one])
                points = len(rows.points(name)) if stage == "ablate" else row["trials"] + 2
                seeds = len(row["seeds"])
                # Each point keeps its encoder in .unmask/points/.
                runs += points * seeds * (base["weights"] + RECORD)
                stages.append(slots() * (KEPT + 1) * base["checkpoint"])
    return Room(packs, runs, max(stages))


def _pack(name: str, source: Mapping[str, Any]) -> int:
    """Bytes of a dataset's pack where it has none of this row; none where its files are not there yet."""
    try:
        if json.loads((workspace.pack_folder(name) / "meta.json").read_text())["row"]["source"] == source:
            return 0
    except (OSError, LookupError, ValueError, TypeError):
        pass
    height, width = map(int, source["size_px"])
    return _images(workspace.data_folder(name), source) * height * width * PIXEL


def _images(folder: Path, source: Mapping[str, Any]) -> int:
    """Count a dataset's images, by names of files where nothing else tells it."""
    if source["name"] == "scenes":
        return int(source["train"] + source["validation"] + source["test"])
    if source["name"] in PUBLISHED:
        return PUBLISHED[source["name"]]
    from mim_core.data.images import EXTENSIONS

    found = (name for _, _, names in os.walk(folder) for name in names)
    return sum(os.path.splitext(name)[1].lower() in EXTENSIONS for name in found)


def free() -> int:
    """Bytes that are free where the workspace lies."""
    return shutil.disk_usage(workspace.root()).free
