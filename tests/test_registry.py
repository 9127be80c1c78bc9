"""The registry on a real store: the alias moves only to what beats the champion on the same test images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from core_pieces import classify_row, python, tiny_pack
from mlflow.tracking import MlflowClient

from flows import registry
from flows.registry import compete, pack_digests
from mim_core.data.pack import Pack

pytestmark = [
    pytest.mark.orchestration,
    # MLflow's own code, and SQLite's connections that it leaves to the collector.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new database of MLflow, which takes seconds to make."""
    import mlflow

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


def comparison(client: MlflowClient, name: str) -> str:
    client.create_registered_model(name)
    return name


def version(client: MlflowClient, name: str, score: float, digest: str = "a", metric: str = "accuracy") -> str:
    tags = {"test_score": str(score), "test_digest": digest, "metric": metric, "row": f"row_{score}"}
    return str(client.create_model_version(name, "file:///nowhere", tags=tags).version)


def champion(client: MlflowClient, name: str) -> str | None:
    found = client.get_registered_model(name).aliases.get("champion")
    return None if found is None else str(found)


def test_the_alias_moves_only_to_what_beats_the_champion(client: MlflowClient, tmp_path: Path) -> None:
    name, lock = comparison(client, "data.classify"), tmp_path / "lock"
    for score, expected, word in (
        (0.5, "1", "the first"),
        (0.4, "1", "not above 0.5000"),
        (0.5, "1", "not above 0.5000"),  # an equal is no better
        (0.6, "4", "above 0.5000 of version 1 (row_0.5)"),
        (float("nan"), "4", "no champion"),
        (0.55, "4", "not above 0.6000"),
    ):
        made = version(client, name, score)
        verdict = compete(client, name, made, lock)
        assert word in verdict
        assert champion(client, name) == expected
        assert client.get_model_version(name, made).tags["verdict"] == verdict
    assert compete(client, name, "4", lock).startswith("champion")
    assert champion(client, name) == "4"


@pytest.mark.parametrize(("digest", "metric", "said"), [("b", "accuracy", "test digest"), ("a", "miou", "metric")])
def test_other_test_images_and_metrics_are_not_compared(
    digest: str, metric: str, said: str, client: MlflowClient, tmp_path: Path
) -> None:
    name, lock = comparison(client, f"other.{digest}{metric}"), tmp_path / "lock"
    compete(client, name, version(client, name, 0.1), lock)
    better = version(client, name, 0.9, digest, metric)
    verdict = compete(client, name, better, lock)
    assert verdict.startswith("not compared")
    assert said in verdict
    assert champion(client, name) == "1"
    # As the verdict says: without the alias there is no champion to beat.
    client.delete_registered_model_alias(name, "champion")
    compete(client, name, better, lock)
    assert champion(client, name) == "2"
    assert compete(client, name, version(client, name, 0.95, digest, metric), lock).startswith("champion")


def test_an_alias_that_somebody_moved_is_what_has_to_be_beaten(client: MlflowClient, tmp_path: Path) -> None:
    name, lock = comparison(client, "moved.classify"), tmp_path / "lock"
    for score in (0.3, 0.8):
        compete(client, name, version(client, name, score), lock)
    client.set_registered_model_alias(name, "champion", "1")
    compete(client, name, version(client, name, 0.2), lock)
    assert champion(client, name) == "1"
    compete(client, name, version(client, name, 0.5), lock)
    assert champion(client, name) == "4"
    # Somebody's own model, of which nothing is known, stays too.
    client.create_model_version(name, "file:///nowhere")
    client.set_registered_model_alias(name, "champion", "5")
    assert "not compared" in compete(client, name, version(client, name, 0.9), lock)
    assert champion(client, name) == "5"


def test_of_rows_that_finish_at_once_the_best_wins(store: str, client: MlflowClient, tmp_path: Path) -> None:
    name, lock = comparison(client, "race.classify"), tmp_path / "lock"
    compete(client, name, version(client, name, 0.1), lock)
    scores = [float(score) for score in np.random.default_rng(0).permutation(np.linspace(0.2, 0.9, 8))]
    versions = [version(client, name, score) for score in scores]
    together = threading.Barrier(len(versions))

    def finish(one: str) -> None:
        own = MlflowClient(store)
        together.wait()
        compete(own, name, one, lock)

    threads = [threading.Thread(target=finish, args=(one,)) for one in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert champion(client, name) == versions[scores.index(max(scores))]


def test_names_of_encoders_and_models_do_not_collide(client: MlflowClient) -> None:
    assert registry._name(client, "twice", "encoder") == "twice"
    assert registry._name(client, "twice", "model") == "twice.model"
    assert registry._name(client, "twice", "encoder") == "twice"
    assert registry._name(client, "once", "model") == "once"
    assert registry._name(client, "once", "encoder") == "once.encoder"


def test_the_test_digest_is_of_the_test_images_and_their_annotations(tmp_path: Path) -> None:
    def made(name: str, **changes: int) -> Pack:
        return tiny_pack(tmp_path / name, **changes)

    first, same, other = (pack_digests(made(name, **changes).folder) for name, changes in (
        ("first", {}), ("same", {}), ("other", {"channels": 1})
    ))  # fmt: skip
    assert first == same
    assert first["test_digest"] != other["test_digest"]
    # Training images may change, and the places of files among all: scores on the same test images can be compared.
    images = np.load(tmp_path / "same" / "train" / "images.npy")
    np.save(tmp_path / "same" / "train" / "images.npy", images + 1)
    np.save(tmp_path / "same" / "test" / "origins.npy", np.arange(16)[:, None])
    assert pack_digests(tmp_path / "same")["test_digest"] == first["test_digest"]
    labels = np.load(tmp_path / "same" / "test" / "labels.npy")
    np.save(tmp_path / "same" / "test" / "labels.npy", labels[::-1])
    assert pack_digests(tmp_path / "same")["test_digest"] != first["test_digest"]


def test_a_model_is_registered_without_a_warning_and_answers_of_files(
    store: str, client: MlflowClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    import pandas as pd  # type: ignore[import-untyped]

    from mim_core import inference
    from mim_core.jobs import downstream

    pack = tiny_pack(tmp_path / "pack")
    judged = downstream(classify_row(), pack, tmp_path / "run", 0, 1e-3, None, test=True)
    run = client.create_run(client.create_experiment("here", (tmp_path / "artifacts").as_uri())).info.run_id
    tags = {"row": "row", "task": "classify", "data": "tiny", "metric": "accuracy"}
    tags |= {"test_score": str(judged["test_score"]), **pack_digests(pack.folder)}
    weights = tmp_path / "run" / "model.safetensors"
    capfd.readouterr()
    said = registry.register_model(client, run, weights, judged["example"], tags, tmp_path / "lock")
    registry.register_encoder(client, run, "encoder", weights, {**judged_about(weights), "width": 32})
    said_beside = "".join(capfd.readouterr()).splitlines()
    # Commands run with MLflow's log at WARNING.
    assert not [line for line in said_beside if " INFO " not in line]
    assert said.startswith("tiny.classify version 1: champion")
    assert client.get_run(run).info.status == "RUNNING"
    for name in ("row", "tiny.classify"):
        registered = client.get_model_version(name, "1")
        assert registered.run_id == run
        assert registered.tags.items() >= {**tags, **pack_digests(pack.folder)}.items()
    model = mlflow.pyfunc.load_model("models:/tiny.classify@champion")
    files = [inference.as_file(np.array(image)) for image in pack.split("test").images[:3]]
    ours = inference.load_model(weights)
    assert model.predict(pd.DataFrame({"image": files})) == ours.answer(list(map(ours.reader, files)))
    logged = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert not [path for path in logged if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def judged_about(weights: Path) -> dict[str, object]:
    from mim_core.checkpoint import read_weights

    return read_weights(weights)[1]


def test_a_stage_that_logs_a_model_does_not_import_torch(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(b"weights")
    run = client.create_run(client.create_experiment("bare", (tmp_path / "artifacts").as_uri())).info.run_id
    about = {"size": [32, 32], "channels": 3, "width": 8}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    code = f"""
import sys
from pathlib import Path
from mlflow.tracking import MlflowClient
from flows import registry
registry.register_encoder(MlflowClient(), {run!r}, "bare", Path({str(tmp_path / "encoder.safetensors")!r}), {about})
print("torch" in sys.modules)
"""
    said, errors = python("-c", code).communicate()
    assert said.split()[-1:] == ["False"], errors
    assert client.get_model_version("bare", "1").run_id == run
