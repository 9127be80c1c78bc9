"""Nearest neighbours: the vote by hand and by scikit-learn, fewer than k images, and a file that answers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_pieces import ENCODER, classify_row
from sklearn.neighbors import KNeighborsClassifier

from mim_core import checkpoint
from mim_core.data.pack import Pack
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.jobs import downstream
from mim_core.params import EncoderOf
from mim_core.params.relations import trained
from mim_core.spec import build, check
from mim_core.tasks import knn
from mim_core.tasks.knn import Knn, vote
from mim_core.tasks.task import Facts

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Compute(torch.device("cpu"), bf16=False)
NOTHING: dict[str, Any] = {"augment": None, "drop_path": 0.0, "optim": None, "lr_grid": []}


def drawn(images: int, others: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(images)
    bank = torch.nn.functional.normalize(torch.randn(others, 6, generator=rng), dim=1)
    return torch.randn(images, 6, generator=rng), bank, torch.randint(3, (others,), generator=rng)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5)])
def test_votes_are_dinos_by_hand_and_scikit_learns(k: int, temperature: float) -> None:
    features, bank, classes = drawn(12)
    found = vote(features, bank, classes, k=k, temperature=temperature, count=4)
    shares = (found / found.sum(1, keepdim=True)).numpy()
    by_hand = np.zeros((12, 4))
    for row, feature in enumerate(features.double().numpy()):
        near = bank.double().numpy() @ (feature / np.linalg.norm(feature))
        for at in np.argsort(-near)[:k]:
            by_hand[row, classes[at]] += math.exp(near[at] / temperature)
    np.testing.assert_allclose(shares, by_hand / by_hand.sum(1, keepdims=True), atol=1e-5)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / temperature)
    )
    theirs.fit(bank.numpy(), classes.numpy())
    np.testing.assert_allclose(shares[:, :3], theirs.predict_proba(features.numpy()), atol=1e-4)
    assert not shares[:, 3].any()


def test_all_vote_where_there_are_fewer_than_k() -> None:
    features, bank, classes = drawn(6, others=4)
    few = vote(features, bank, classes, k=20, temperature=0.07, count=3)
    assert torch.equal(few, vote(features, bank, classes, k=4, temperature=0.07, count=3))


def test_votes_do_not_depend_on_chunks_or_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    features, bank, classes = drawn(30)
    whole = vote(features, bank, classes, k=5, temperature=1e-3, count=3)
    assert whole.isfinite().all()
    monkeypatch.setattr(knn, "CHUNK", 7)
    torch.testing.assert_close(vote(features, bank, classes, k=5, temperature=1e-3, count=3), whole)


def test_the_job_trains_nothing_and_its_file_answers_alone(tmp_path: Path, pack: Pack) -> None:
    task = {"name": "knn", "k": 5, "blocks": [1, 2], "pooling": ["mean", "class"]}
    row = classify_row(task=task, labels=30, **NOTHING)
    result = downstream(row, pack, tmp_path / "job", 3, 0.0, None, True)
    assert result["metric"] == "accuracy"
    assert result["test_score"] == result["test_accuracy"] > 0.9
    scores = {key: value for key, value in result.items() if key.startswith("validation_accuracy_block_")}
    assert len(scores) == 4
    assert result["validation_score"] == max(scores.values())
    assert "test_cross_entropy" not in result
    assert (tmp_path / "job" / "predictions.png").stat().st_size > 0
    assert downstream(row, pack, tmp_path / "job", 3, 0.0, None, True)["test_accuracy"] == result["test_accuracy"]

    weights, _ = checkpoint.read_weights(tmp_path / "job" / "model.safetensors")
    assert weights["bank"].shape == (30, 32)
    torch.testing.assert_close(weights["bank"].norm(dim=1), torch.ones(30))
    torch.manual_seed(3)
    encoder = build(ENCODERS, row.encoder, (16, 16), 3)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(weights[f"encoder.{name}"], tensor), name
    again = Knn(encoder, Facts.of(pack), CPU, k=5, blocks=(1, 2), pooling=("mean", "class"))
    again.model.load_state_dict(weights)
    again.model.eval()
    test = pack.split("test")
    logits = again.logits(torch.from_numpy(np.array(test.images)))
    assert (logits.argmax(1).numpy() == test.labels).mean() == result["test_accuracy"]
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(test)))
    assert again.evaluate(test)["accuracy"] == result["test_accuracy"]


def test_fewer_labels_than_k_do(tmp_path: Path, pack: Pack) -> None:
    row = classify_row(task="knn", labels=4, **NOTHING)
    assert 0 <= downstream(row, pack, tmp_path, 0, 0.0, None, False)["validation_score"] <= 1


def test_what_training_needs_is_refused() -> None:
    row = classify_row(task="knn", drop_path=0.0)
    faults = [fault.split(":")[0] for fault in trained(row)]
    assert faults == ["optim", "lr_grid", "augment"]
    assert not list(trained(classify_row(task="knn", **NOTHING)))


def test_blocks_that_are_not_there_are_refused() -> None:
    encoder = build(ENCODERS, check(EncoderOf, {"encoder": ENCODER}, "row").encoder, (16, 16), 3)
    facts = Facts((16, 16), 3, (0.5,) * 3, (0.5,) * 3, ["a", "b"], [], [])
    with pytest.raises(ValueError, match="blocks: found 3; the encoder's are 1 to 2"):
        Knn(encoder, facts, CPU, blocks=(3,))
