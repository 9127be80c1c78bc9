"""Check the machine and the workspace before work starts, and say how to mend each fault."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from flows import data, room, rows, servers, workspace
from mim_core.cores import cores

DISK_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One check: what was found and, where that is a fault, what to do."""

    name: str
    found: str
    mend: str = ""


def examine(data_needed: bool = True) -> Iterator[Finding]:
    """Run all checks, in the order in which they would stop a run; `data_needed` makes missing data a fault, and too
    little room for all rows (the demo fetches its data, and runs few of them)."""
    yield _python()
    yield from _packages()
    yield _git()
    yield _writable()
    yield _disk(data_needed)
    yield _device()
    yield from _ports()
    yield _params()
    yield _data(data_needed)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", found, "" if sys.version_info >= (3, 11) else "use Python 3.11 or later: make PYTHON=...")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the distribution requires; `pip check` misses nothing that this finds."""
    try:
        texts = importlib.metadata.requires("unmask") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "unmask is not installed", "run `make .venv/installed`")
        return
    faults, shown = [], []
    for requirement in map(Requirement, texts):
        if requirement.marker and not requirement.marker.evaluate({"extra": "flows"}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(Version(version), prereleases=True):
            faults.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in {"torch", "timm", "prefect", "fastapi", "mlflow", "dvc", "optuna"}:
            shown.append(f"{requirement.name} {version}")
    mend = "install the pinned set again: rm .venv/installed && make .venv/installed" if faults else ""
    yield Finding("packages", "; ".join(faults) or ", ".join(shown), mend)


def _git() -> Finding:
    if not shutil.which("git"):
        return Finding("git", "not found", "install git: data and results are pinned with it")
    commit = workspace.git("rev-parse", "--short", "HEAD")
    if commit is None:
        return Finding("git", f"{workspace.root()} has no commit", "run inside a clone, or `git init` and commit once")
    return Finding("git", commit.strip())


def _writable() -> Finding:
    places = [workspace.root(), workspace.home(), *(workspace.root() / name for name in ("data", "packs", "runs"))]
    shut = [str(place) for place in places if place.exists() and not os.access(place, os.W_OK)]
    mend = "give yourself write permission: chmod -R u+w " + " ".join(shut) if shut else ""
    return Finding("permission", f"cannot write to {', '.join(shut)}" if shut else "the workspace can be written", mend)


def _disk(all_rows: bool) -> Finding:
    free = room.free()
    found = f"{free / 1e9:.0f} GB free"
    if free < DISK_GB * 1e9:
        return Finding("disk", found, f"free {DISK_GB:.0f} GB; old checkpoints lie in {workspace.home()}")
    try:
        need = room.needed()
    except workspace.UserError:  # told among the params
        return Finding("disk", found)
    parts = f"packs {need.packs / 1e9:.1f}, runs {need.runs / 1e9:.1f}, checkpoints {need.checkpoints / 1e9:.1f}"
    found += f"; what all rows still need is {need.total / 1e9:.1f} GB at most ({parts})"
    mend = ""
    if all_rows and need.total > free:
        more = (need.total - free) / 1e9
        mend = (
            f"free {more:.1f} GB more, or run fewer rows: `dvc repro STAGE@ROW`; old points lie in {workspace.home()}"
        )
    return Finding("disk", found, mend)


def _device() -> Finding:
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus:
        return Finding("device", f"{gpus} NVIDIA GPU{'s' * (gpus > 1)}")
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    kind = (
        "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32 (no bf16 instructions: about 2 times slower)"
    )
    return Finding("device", f"CPU, {cores()} cores, {kind}")


def _ports() -> Iterator[Finding]:
    ours = servers.running()
    for name, port in servers.wanted_ports().items():
        if name in ours:
            yield Finding(name, f"up at {servers.address(name, ours)}")
        elif servers.port_taken(port):
            other = f"choose another port: UNMASK_{name.upper()}_PORT={port + 1}"
            yield Finding(name, f"port {port} is in use by another program", f"stop that program, or {other}")
        else:
            yield Finding(name, f"not running; port {port} is free")


def _params() -> Finding:
    try:
        found = rows.load()
    except workspace.UserError as error:
        return Finding("params", str(error), "correct these rows")
    return Finding("params", ", ".join(f"{len(named)} {section}" for section, named in found.items()))


def _data(needed: bool) -> Finding:
    if not workspace.data_folder().exists():
        mend = "run `unmask data restore`" if needed else ""
        return Finding("data", "data/ is not there yet", mend)
    try:
        digests = data.guard()
    except workspace.UserError as error:
        return Finding("data", str(error), "see above")
    return Finding("data", ", ".join(f"{name} {md5[:8]}" for name, md5 in digests.items()))
