"""The workspace: where everything lies, what a run leaves behind, and what makes a result stale.

`root()` is the repository; `home()` the ignored folder `.unmask/` that holds servers' state, jobs in progress and logs.
An experiment that DVC runs in a temporary copy of the repository uses the home of the repository it was copied from, so
that its servers and records are the same.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from mim_core.files import write_atomically


class UserError(Exception):
    """A fault the user can mend; the command line prints its message and no traceback."""


def first_line(error: BaseException) -> str:
    """What an error says first; its type's name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@cache
def root() -> Path:
    """Find the repository: the nearest folder upwards that holds dvc.yaml and params/. Raises UserError."""
    start = Path.cwd()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params").is_dir():
            return folder
    raise UserError(f"{start}: found no dvc.yaml with params/ here or above; run unmask inside its repository")


def home() -> Path:
    """Give the folder of ignored state; `UNMASK_HOME` overrides it."""
    if "UNMASK_HOME" in os.environ:
        return Path(os.environ["UNMASK_HOME"]).resolve()
    parts = root().parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):  # a temporary copy of the repository
            return Path(*parts[:index]) / ".unmask"
    return root() / ".unmask"


def params_folder() -> Path:
    return root() / "params"


def data_folder(name: str = "") -> Path:
    """The dataset's folder as its user has it, tracked by data.dvc."""
    return root() / "data" / name


def pack_folder(name: str) -> Path:
    return root() / "packs" / name


def run_folder(kind: str, row: str) -> Path:
    """A stage's published results: `runs/<kind>/<row>`, where the kind is targets, pretrain or downstream."""
    return root() / "runs" / kind / row


def report_folder() -> Path:
    return root() / "report"


def jobs_folder() -> Path:
    """Jobs in progress, by key; a job's folder goes when its stage has published."""
    return home() / "jobs"


def digest(value: Any) -> str:
    """Hash a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@cache
def code_fingerprint() -> str:
    """Hash the sources of `mim_core` without comments and docstrings: what can change a number, and no more.

    Parsing them takes a second: the outcome is kept, under a key of their bytes.
    """
    sources = {path: path.read_text() for path in sorted((Path(__file__).parents[1] / "mim_core").rglob("*.py"))}
    key, kept = digest([[path.name, text] for path, text in sources.items()]), home() / "code.json"
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        return str(json.loads(kept.read_text())[key])
    hashed = hashlib.sha256()
    for path, text in sources.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:] or [ast.Pass()]
        hashed.update(path.name.encode() + ast.dump(tree).encode())
    found = hashed.hexdigest()[:32]
    with contextlib.suppress(OSError):  # it is worth no error that it cannot be kept
        write_json(kept, {key: found})
    return found


def git(*arguments: str) -> str | None:
    """Run git in the repository; None where it fails or is absent."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    names = ("torch", "torchvision", "timm", "numpy", "prefect", "mlflow", "dvc", "unmask")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_manifest(
    folder: Path,
    *,
    stage: str,
    row: str,
    params: dict[str, Any],
    data: dict[str, str],
    parents: list[str],
    started: float,
    device_seconds: float,
    images_seen: int,
    compute: dict[str, Any],
    metrics: dict[str, Any],
    runs: dict[str, str | None],
) -> dict[str, Any]:
    """Write `manifest.json`, the truth about a run, which MLflow only views.

    `data` names the dataset and its md5, `parents` the runs it builds on (their folders below runs/), `device_seconds`
    the time of all its jobs added up, `runs` the MLflow and Prefect run ids.
    """
    status = git("status", "--porcelain", "--untracked-files=no", "--", "mim_core", "flows", "params", "dvc.yaml")
    manifest = {
        "stage": stage,
        "row": row,
        "params": params,
        "params_hash": digest(params),
        "data": data,
        "parents": parents,
        "git": {"commit": (git("rev-parse", "HEAD") or "").strip() or None, "dirty": bool(status)},
        "code": code_fingerprint(),
        "versions": versions(),
        "compute": compute,
        "started": started,
        "wall_seconds": time.time() - started,
        "device_hours": device_seconds / 3600,
        "images_seen": images_seen,
        "metrics": metrics,
        **runs,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest
