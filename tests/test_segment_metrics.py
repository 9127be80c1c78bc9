"""Metrics of segments: other libraries' numbers, closed forms, and what no class may do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mim_core.metrics.segments import confusion, ious, mean_accuracy, miou, pixel_accuracy

CLASSES = 7


def maps(seed: int) -> tuple[Tensor, Tensor]:
    """Predictions that are often right, with 255 in places; class 5 is nowhere, class 6 is predicted only."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 5, (3, 17, 23))
    predicted = np.where(rng.random(true.shape) < 0.6, true, rng.choice([0, 1, 2, 3, 4, 6], true.shape))
    true[rng.random(true.shape) < 0.2] = 255
    return torch.from_numpy(predicted), torch.from_numpy(true)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_torchmetrics_and_scikit_learn(seed: int) -> None:
    predicted, true = maps(seed)
    counts = confusion(predicted, true, CLASSES)
    judged = true != 255
    np.testing.assert_array_equal(
        counts.numpy(), confusion_matrix(true[judged], predicted[judged], labels=range(CLASSES))
    )
    jaccard = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255)
    assert miou(counts) == pytest.approx(jaccard(predicted, true).item(), abs=1e-6)
    each = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)(predicted, true)
    np.testing.assert_allclose(ious(counts).nan_to_num(0), each, atol=1e-6)
    right = MulticlassAccuracy(CLASSES, average="micro", ignore_index=255)
    assert pixel_accuracy(counts) == pytest.approx(right(predicted, true).item(), abs=1e-6)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(true[judged], predicted[judged])
    assert mean_accuracy(counts) == pytest.approx(balanced, abs=1e-6)


def test_parts_of_a_split_add_up() -> None:
    predicted, true = maps(0)
    parts = [confusion(p, t, CLASSES) for p, t in zip(predicted, true, strict=True)]
    assert torch.equal(sum(parts), confusion(predicted, true, CLASSES))  # type: ignore[arg-type]
    assert parts[0].dtype == torch.int64


def test_a_class_counts_where_it_is_there_or_predicted() -> None:
    true = torch.tensor([0, 0, 0, 1, 255])
    counts = confusion(torch.tensor([0, 0, 2, 1, 3]), true, 4)
    np.testing.assert_allclose(ious(counts), [2 / 3, 1, 0, np.nan])
    assert miou(counts) == pytest.approx(5 / 9)
    assert pixel_accuracy(counts) == 3 / 4
    assert mean_accuracy(counts) == pytest.approx((2 / 3 + 1) / 2)
    assert miou(confusion(true, true, 4)) == 1


def test_values_that_are_no_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"true map: found the value 4; there are 4 classes"):
        confusion(torch.tensor([0, 1]), torch.tensor([4, 1], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"predicted map: found the value -1"):
        confusion(torch.tensor([-1, 1]), torch.tensor([0, 1]), 4)
    assert not confusion(torch.tensor([9, 9]), torch.tensor([255, 255]), 4).any()
