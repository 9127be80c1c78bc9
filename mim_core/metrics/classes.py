"""Metrics of classes: one class an image, or several that are present in it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def accuracy(logits: Float[Tensor, "b k"], labels: Tensor, best: int = 1) -> float:
    """Share of images whose label is among the `best` highest logits; of equal ones the first counts as higher."""
    own = logits.gather(1, labels[:, None])
    # Not `>`: what is not a number is no right answer.
    higher = ~(logits <= own) | ((logits == own) & (torch.arange(logits.shape[1]) < labels[:, None]))
    return (higher.sum(1) < best).double().mean().item()


def class_accuracy(logits: Float[Tensor, "b k"], labels: Tensor) -> float:
    """Mean over the classes that occur of the share of each one's images that are right."""
    matrix = confusion(logits.argmax(-1), labels, logits.shape[1])
    counts = matrix.sum(1)
    shares = matrix.diagonal()[counts > 0] / counts[counts > 0]
    return float(shares.mean())


def confusion(taken: Tensor, labels: Tensor, classes: int) -> Int[np.ndarray, "k k"]:
    """Count images by their class (rows) and the one that they were taken for (columns)."""
    cells = torch.bincount(labels.long() * classes + taken.long(), minlength=classes**2)
    matrix: np.ndarray = cells.reshape(classes, classes).numpy()
    return matrix


def cross_entropy(logits: Float[Tensor, "b k"], labels: Tensor) -> float:
    """Mean over images of the negative log of the label's share."""
    return F.cross_entropy(logits.double(), labels).item()


def presence_entropy(logits: Float[Tensor, "b k"], presence: Int[Tensor, "b k"]) -> Tensor:
    """Binary cross-entropy, the mean over all that is judged: presence 1 or 0; -1 is not."""
    judged = presence >= 0
    wanted = presence.clamp(min=0).to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, wanted, judged.to(logits.dtype), reduction="sum")
    return total / judged.sum().clamp(min=1)


def eleven_points(scores: np.ndarray, presence: np.ndarray) -> float:
    """Average precision of one class in VOC 2007's form: the mean over the recalls 0, 0.1, ..., 1 of the best precision
    at that recall or a higher one (0 where it is not reached).

    Images that are not judged (presence -1) count neither way. NaN where the class is in no image.
    """
    judged = presence >= 0
    order = np.argsort(-scores[judged], kind="stable")
    right = np.cumsum(presence[judged][order])
    positives = int(right[-1]) if len(right) else 0
    if positives == 0:
        return float("nan")
    precision = right / np.arange(1, len(right) + 1)
    # Whole numbers: as a fraction, 3 of 10 would miss the recall 0.3 by rounding.
    reached = [precision[10 * right >= tenths * positives] for tenths in range(11)]
    return float(np.mean([part.max() for part in reached]))


def presence_map(logits: Float[Tensor, "b k"], presence: Int[Tensor, "b k"]) -> tuple[float, list[float]]:
    """Mean of `eleven_points` over the classes that are in some image (VOC 2007's mAP), and each class's own."""
    columns = zip(logits.double().numpy().T, presence.numpy().T, strict=True)
    each = [eleven_points(scores, there) for scores, there in columns]
    known = [value for value in each if value == value]
    return (float(np.mean(known)) if known else 0.0), each
