"""Checkpoints that neither a kill, a full disk nor a flipped bit can break, in files that load without running code.

A checkpoint is a folder `step_<n>` with `weights.safetensors`, `optimisers.pt` (tensors and numbers, read with
weights_only) and `state.json`. It is written under another name, synced, and renamed: it is there whole or not at all.
`sha256sums`, which `sha256sum --check` reads too, tells later whether the disk still gives what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEEP = 2
FILES = ("optimisers.pt", "state.json", "weights.safetensors")
SUMS = "sha256sums"
ASIDE = ".damaged-"

Loaded = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]
"""A checkpoint's `about` with `step`, its weights and its optimisers' states."""


class NotWrittenError(RuntimeError):
    """A file could not be written, mostly for want of room; what lay there before is whole."""


def save(
    folder: Path, step: int, weights: Mapping[str, Tensor], optimisers: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `step`, with `about` as JSON, and drop all but the newest two.

    Raises NotWrittenError where the disk does not take it; the checkpoints before it stay.
    """
    final, part = folder / f"step_{step:09d}", folder / f".part-{os.getpid()}"
    for torn in folder.glob(".part-*"):  # of a process that was killed: a job has one writer
        shutil.rmtree(torn, ignore_errors=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with written(final, _bytes(held) + _bytes(optimisers), part):
        part.mkdir(parents=True)
        save_file(held, part / "weights.safetensors")
        with (part / "optimisers.pt").open("wb") as file:
            torch.save(dict(optimisers), file)
        (part / "state.json").write_text(json.dumps({**about, "step": step}))
        (part / SUMS).write_bytes(b"".join(_sum(part / name) for name in FILES))
        for name in (*FILES, SUMS):
            _sync(part / name)
        _sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(folder)
    for old in (*_steps(folder)[:-KEEP], *folder.glob(f"{ASIDE}*")):
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written(target: Path, needed: int, part: Path | None = None) -> Iterator[None]:
    """Remove `part` where `target` (a file or a folder, of `needed` bytes) cannot be written.

    Raises NotWrittenError, which says where, why, how much is needed and how much is free.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Torch tells of a full disk in words of its own; what the system said is behind them.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, (OSError, SafetensorError)):
            raise
        if part:
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
        free = shutil.disk_usage(next(one for one in target.parents if one.is_dir())).free
        why = str(getattr(reason, "strerror", None) or reason).split("I/O error: ")[-1]
        raise NotWrittenError(
            f"{target}: not written ({why}); it needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free in "
            f"{target.parent}; make room and run again: what lay there before is whole, and a run goes on from it"
        ) from error


def latest(folder: Path) -> Path | None:
    """Find the newest checkpoint in a folder, or None."""
    return next(reversed(_steps(folder)), None)


def newest(folder: Path) -> Loaded | None:
    """Load the newest whole checkpoint in a folder, or None; damaged ones are set aside, with a warning."""
    damaged: list[str] = []
    loaded = None
    for found in reversed(_steps(folder)):
        if not (wrong := damage(found)):
            loaded = load(found)
            break
        # Out of the way of those to come, of which only so many are kept; the next one that is written drops it.
        aside = folder / f"{ASIDE}{found.name}"
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        damaged.append(f"{found.name} ({wrong})")
    if damaged:
        mend = f"the run goes on from step {loaded[0]['step']}" if loaded else "none is whole: the run starts afresh"
        warnings.warn(f"{folder}: damaged checkpoints: {', '.join(damaged)}; {mend}; check the disk", stacklevel=2)
    return loaded


def drop_after(folder: Path, step: int) -> None:
    """Drop the checkpoints after a step, but never the oldest."""
    for found in reversed(_steps(folder)[1:]):
        if int(found.name.removeprefix("step_")) > step:
            shutil.rmtree(found, ignore_errors=True)


def damage(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint's files; empty where they are what was written."""
    try:
        stored = (checkpoint / SUMS).read_bytes()
        found = {name: _sum(checkpoint / name) for name in FILES}
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    wrong = [name for name, line in found.items() if line not in stored.splitlines(keepends=True)]
    if not wrong and stored != b"".join(found.values()):
        wrong = [SUMS]
    return f"{', '.join(wrong)} not as {SUMS} has it" if wrong else ""


def load(checkpoint: Path) -> Loaded:
    """Read a checkpoint as it is: `about`, weights, optimisers' states.

    Raises ValueError where a file holds anything but tensors and plain values; nothing of it is run.
    """
    about = json.loads((checkpoint / "state.json").read_text())
    weights, _ = read_weights(checkpoint / "weights.safetensors")
    file = checkpoint / "optimisers.pt"
    try:
        optimisers = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        found = " ".join(str(error).split()).partition("(1)")[0]
        raise ValueError(
            f"{file}: refused, and nothing of it was run: a checkpoint holds tensors and plain values only ({found}); "
            f"it is not what was written; delete {checkpoint} and run again"
        ) from None
    return about, weights, optimisers


def write_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write weights with what is needed to rebuild their model, `about`, in the file's header.

    Raises NotWrittenError where the disk does not take them; the file before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # One header key: safetensors does not fix the order of several, and equal runs must write equal bytes.
    header = {"unmask": json.dumps(about, sort_keys=True)}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with written(path, _bytes(held), part):
        save_file(held, part, metadata=header)
        _sync(part)
        part.replace(path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and their `about`; raises ValueError where the file is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("unmask", "{}"))
            if not isinstance(about, dict):
                raise ValueError("its header's `unmask` is no mapping")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _bytes(state: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    inner = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(_bytes(one) for one in inner)


def _sum(path: Path) -> bytes:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode()


def _sync(path: Path) -> None:
    """Have a file's or a folder's content reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
