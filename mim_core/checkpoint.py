"""Checkpoints that a kill cannot break, in files that load without running code.

A checkpoint is a folder `step_<n>` with `weights.safetensors`, `optimisers.pt` (tensors and numbers, read with
weights_only) and `state.json`. It is written under another name, synced, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KEEP = 2


def save(
    folder: Path, step: int, weights: Mapping[str, Tensor], optimisers: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `step`, with `about` as JSON, and drop all but the newest two."""
    final, part = folder / f"step_{step:09d}", folder / f".part-{os.getpid()}"
    for torn in folder.glob(".part-*"):  # of a process that was killed: a job has one writer
        shutil.rmtree(torn, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, part / "weights.safetensors"
    )
    torch.save(dict(optimisers), part / "optimisers.pt")
    (part / "state.json").write_text(json.dumps({**about, "step": step}))
    for file in part.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync_folder(folder)
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """Find the newest checkpoint in a folder, or None."""
    return next(reversed(_steps(folder)), None)


def load(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its `about` with `step`, the weights and the optimisers' states."""
    about = json.loads((checkpoint / "state.json").read_text())
    weights, _ = read_weights(checkpoint / "weights.safetensors")
    optimisers = torch.load(checkpoint / "optimisers.pt", map_location="cpu", weights_only=True)
    return about, weights, optimisers


def write_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write weights with what is needed to rebuild their model, `about`, in the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # One header key: safetensors does not fix the order of several, and equal runs must write equal bytes.
    header = {"unmask": json.dumps(about, sort_keys=True)}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, part, metadata=header)
    part.replace(path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and their `about`; raises ValueError where the file is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("unmask", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
