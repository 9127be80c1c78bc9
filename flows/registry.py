"""The model registry: a row's encoder or model under the row's name, and of each comparison the best.

How a registered model is asked is in `served_task.py`, and of an encoder in `served_encoder.py`.

A comparison is a dataset and a task, `<dataset>.<task>`, which no row can be named. Each row's model is a version there
too, and `models:/<dataset>.<task>@champion` is the one that none has beaten. The alias moves by test scores, of the one
model and not of its row's seeds: they choose what to serve, and are no estimate of how well the chosen one does.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, infer_signature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from flows import workspace
from mim_core.locks import held

Kind = Literal["encoder", "model"]
CHAMPION = "champion"
SAME = ("metric", "test_digest")
"""Tags in which two versions must agree before their test scores are compared."""
MOVES = 5
PATIENCE_SECONDS = 120.0
"""How long others may take to judge a version."""
FILES = {"encoder": "served_encoder.py", "model": "served_task.py"}


def register_encoder(client: MlflowClient, run: str, row: str, weights: Path, about: Mapping[str, Any]) -> None:
    """Register a pretraining's encoder: uint8 images in, features out.

    `about` is its file's header, with the `width` of its features.
    """
    images = np.zeros((1, *about["size"], about["channels"]), np.uint8)
    signature = infer_signature(images, np.zeros((1, about["width"]), np.float32))
    logged = _log(run, "encoder", weights, signature)
    _version(client, _name(client, row, "encoder"), run, logged, {"row": row})


def register_model(
    client: MlflowClient, run: str, weights: Path, example: Mapping[str, Any], tags: Mapping[str, str], lock: Path
) -> str:
    """Register a downstream row's model, let it compete, and give what came out.

    `example` has what it answered of an image, see `mim_core.inference.example`. `tags` tell of it: `row`, `task`,
    `data`, `metric`, `test_score`, the pack's digests and more. `lock` is a file that holds other processes of this
    machine back while the champion is decided.
    """
    if "refused" in example:
        return f"not registered: {example['refused']}"
    signature = ModelSignature(Schema([ColSpec("binary", "image")]), _outputs([example["answer"]]))
    logged = _log(run, "model", weights, signature)
    comparison = f"{tags['data']}.{tags['task']}"
    _version(client, _name(client, tags["row"], "model"), run, logged, tags)
    said = f"Models of the task {tags['task']} on {tags['data']}; @{CHAMPION} is the best on the same test images."
    _made(client, comparison, "comparison", said)
    version = _version(client, comparison, run, logged, tags)
    return f"{comparison} version {version}: {compete(client, comparison, version, lock)}"


def compete(client: MlflowClient, name: str, version: str, lock: Path) -> str:
    """Move the alias `champion` to a version that beats the one it stands at; gives the verdict, a tag of it from then.

    Where no champion stands there is none to beat. Of two that finish at once the second sees what the first has done:
    on one machine `lock` sees to it; on another the alias is read again after it is moved, and judged anew. Raises
    HeldError where others do not let go of it.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    with held(lock, f"the champion of {name}", lambda: time.monotonic() > end):
        new = client.get_model_version(name, version)
        verdict = str(new.tags.get("verdict", ""))
        for _ in range(MOVES):
            champion = _champion(client, name)
            if champion and str(champion.version) == version:
                break
            wins, verdict = _judge(new, champion)
            if not wins:
                break
            client.set_registered_model_alias(name, CHAMPION, version)
        client.set_model_version_tag(name, version, "verdict", verdict)
    return verdict


def _judge(new: ModelVersion, champion: ModelVersion | None) -> tuple[bool, str]:
    """Say whether the alias is to move, and why."""
    score = float(new.tags["test_score"])
    told = f"{new.tags['metric']} {score:.4f} on test images"
    if not math.isfinite(score):
        return False, f"{told}: no champion"
    if champion is None:
        return True, f"champion: {told}, the first"
    other = f"version {champion.version} ({champion.tags.get('row', 'no row')})"
    unlike = [key for key in SAME if champion.tags.get(key) != new.tags[key]]
    if unlike or "test_score" not in champion.tags:
        what = " and ".join(key.replace("_", " ") for key in unlike) or "test score"
        return False, f"not compared: the {what} of the champion, {other}, differs; delete the alias to start anew"
    best = float(champion.tags["test_score"])
    if score > best:
        return True, f"champion: {told}, above {best:.4f} of {other}"
    return False, f"{told}, not above {best:.4f} of the champion, {other}"


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(version)) if version else None


def pack_digests(pack: Path) -> dict[str, str]:
    """Hash a pack's description, and what test scores depend on: its test images and their annotations."""
    meta = (pack / "meta.json").read_bytes()
    said = json.loads(meta)
    hashed = hashlib.sha256(json.dumps([said[key] for key in ("classes", "segments", "annotations")]).encode())
    for path in sorted((pack / "test").glob("*.npy")):
        if path.stem == "origins":  # they move where training images are added before
            continue
        with path.open("rb") as file:
            hashed.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {"pack_digest": hashlib.sha256(meta).hexdigest()[:32], "test_digest": hashed.hexdigest()[:32]}


def _log(run: str, kind: Kind, weights: Path, signature: ModelSignature) -> Any:
    """Log a model made by a file of code and one of weights, in a second: packages are named, not searched for, and no
    example is given, of which MLflow would let the model answer here: it is loaded nowhere but where it serves."""
    versions = workspace.versions()
    requirements = [f"{package}=={versions[package]}" for package in ("torch", "torchvision", "timm", "numpy")]
    requirements += ["safetensors", "pydantic", "jaxtyping", "scipy", "pillow", "pycocotools"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of its own type hints, while it is imported, and of no example
        import mlflow.pyfunc

        with mlflow.start_run(run_id=run):
            logged = mlflow.pyfunc.log_model(
                name=kind,
                python_model=str(Path(__file__).with_name(FILES[kind])),
                artifacts={"weights": str(weights)},
                code_paths=[str(Path(__file__).parents[1] / "mim_core")],
                signature=signature,
                pip_requirements=requirements,
            )
    # Leaving the block ended the run; its stage ends it.
    MlflowClient().update_run(run, status="RUNNING")
    return logged


def _version(client: MlflowClient, name: str, run: str, logged: Any, tags: Mapping[str, str]) -> str:
    """Make a logged model a version of a registered one, and give its number."""
    made = client.create_model_version(name, logged.model_uri, run, tags=dict(tags), model_id=logged.model_id)
    return str(made.version)


def _name(client: MlflowClient, row: str, kind: Kind) -> str:
    """Name a row's registered model, and see that it is there: the row's name, unless a row of another stage has it."""
    found = _made(client, row, kind)
    if found != kind:
        row = f"{row}.{kind}"
        _made(client, row, kind)
    return row


def _made(client: MlflowClient, name: str, kind: str, said: str = "") -> str:
    """Make a registered model, which `said` describes, unless it is there, and give its kind."""
    try:
        client.create_registered_model(name, tags={"kind": kind}, description=said)
        return kind
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_registered_model(name).tags.get("kind", kind))


def _outputs(answers: list[dict[str, Any]]) -> Schema | None:
    """Describe answers; None where the example's say too little, as an empty list of objects does."""
    try:
        return infer_signature(answers, answers).outputs
    except MlflowException:
        return None
