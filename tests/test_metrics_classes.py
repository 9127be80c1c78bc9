"""Metrics of classes: scikit-learn's and torchmetrics' numbers, and VOC 2007's average precision in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_accuracy

from mim_core.metrics.classes import (
    accuracy,
    class_accuracy,
    confusion,
    cross_entropy,
    eleven_points,
    presence_entropy,
    presence_map,
)


def drawn(images: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    # The last class occurs in no image.
    return torch.randn(images, classes, generator=rng), torch.randint(classes - 1, (images,), generator=rng)


def test_metrics_are_scikit_learns_and_torchmetrics() -> None:
    logits, labels = drawn()
    taken, shares = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    assert accuracy(logits, labels) == pytest.approx(sk.accuracy_score(labels.numpy(), taken), abs=1e-6)
    for best in (1, 2, 5):
        theirs = sk.top_k_accuracy_score(labels.numpy(), logits.numpy(), k=best, labels=range(7))
        assert accuracy(logits, labels, best) == pytest.approx(theirs, abs=1e-6)
        torchs = multiclass_accuracy(logits, labels, 7, average="micro", top_k=best).item()
        assert accuracy(logits, labels, best) == pytest.approx(torchs, abs=1e-6)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = sk.balanced_accuracy_score(labels.numpy(), taken)
    assert class_accuracy(logits, labels) == pytest.approx(balanced, abs=1e-6)
    assert cross_entropy(logits, labels) == pytest.approx(sk.log_loss(labels.numpy(), shares, labels=range(7)), 1e-6)
    theirs = sk.confusion_matrix(labels.numpy(), taken, labels=range(7))
    np.testing.assert_array_equal(confusion(logits.argmax(1), labels, 7), theirs)


def test_accuracy_caps_at_all_classes_and_breaks_ties_as_argmax() -> None:
    logits, labels = drawn(classes=3)
    assert accuracy(logits, labels, 5) == 1.0
    equal = torch.zeros(6, 3)
    own = torch.tensor([0, 1, 2, 0, 1, 2])
    assert [accuracy(equal, own, best) for best in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    # What is no number is right about nothing.
    assert accuracy(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long)) == 0.0


@pytest.mark.parametrize("images", [1, 7, 50])
def test_eleven_points_are_the_interpolated_precision_of_scikit_learns_curve(images: int) -> None:
    rng = np.random.default_rng(images)
    scores, presence = rng.random(images), rng.integers(0, 2, images)
    presence[0] = 1
    precision, recall, _ = sk.precision_recall_curve(presence, scores)
    # Its last point, recall 0 at precision 1, is no threshold's.
    precision, recall = precision[:-1], recall[:-1]
    wanted = np.mean([precision[recall >= tenth / 10 - 1e-12].max() for tenth in range(11)])
    assert eleven_points(scores, presence) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("presence", "wanted"),
    [
        ([1, 1, 0, 0], 1.0),
        # The only one is found last: precision 1/4 at every recall.
        ([0, 0, 0, 1], 0.25),
        # Recall 1/2 at precision 1 (recalls 0 to 0.5), then 2/4 (0.6 to 1).
        ([1, 0, 0, 1], (6 * 1 + 5 * 0.5) / 11),
        # Ten positives, every second image: precision n / (2 n - 1) at recall n / 10, which falls.
        ([1, 0] * 10, np.mean([max(n / (2 * n - 1) for n in range(max(1, t), 11)) for t in range(11)])),
        # What is not judged is passed over, wherever it stands.
        ([-1, 1, -1, 0, -1, 0, 1], (6 * 1 + 5 * 0.5) / 11),
        ([-1, -1, 1], 1.0),
    ],
)
def test_eleven_points_in_closed_form(presence: list[int], wanted: float) -> None:
    scores = -np.arange(len(presence), dtype=float)
    assert eleven_points(scores, np.array(presence, np.int8)) == pytest.approx(wanted, abs=1e-12)


def test_map_is_the_mean_over_classes_that_are_in_some_image() -> None:
    logits = torch.tensor([[4.0, 1.0, 0.0], [3.0, 2.0, 1.0], [2.0, 3.0, 2.0], [1.0, 4.0, 3.0]])
    presence = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, -1], [1, 0, 0]], dtype=torch.int8)
    mean, each = presence_map(logits, presence)
    assert each[:2] == pytest.approx([(6 + 2.5) / 11, 0.25])
    assert math.isnan(each[2])
    assert mean == pytest.approx(np.mean(each[:2]))
    assert presence_map(logits, torch.zeros(4, 3, dtype=torch.int8))[0] == 0.0


def test_presence_entropy_is_scikit_learns_over_what_is_judged() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 4, generator=rng, dtype=torch.float64)
    presence = torch.randint(-1, 2, (30, 4), generator=rng)
    judged = presence >= 0
    wanted = sk.log_loss(presence[judged].numpy(), logits.sigmoid()[judged].numpy())
    assert presence_entropy(logits, presence).item() == pytest.approx(wanted, abs=1e-9)
    # Nothing that is not judged moves it, and it moves nothing.
    logits.requires_grad_()
    presence_entropy(logits, presence).backward()
    assert logits.grad is not None
    assert (logits.grad[~judged] == 0).all()
    assert presence_entropy(logits.detach(), torch.full((30, 4), -1)).item() == 0
