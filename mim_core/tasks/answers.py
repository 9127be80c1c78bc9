"""What a classifier answers, its one class or which classes are present: labels, loss, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mim_core.data.pack import Split
from mim_core.metrics import classes

Predicts = Literal["class", "presence"]
LIKELIEST = 5
"""Classes that are named of an image at most."""


class Answer(Protocol):
    """A kind of answer. Labels are a tensor of an image's each."""

    needs: tuple[str, ...]
    score: str

    def labelled(self, split: Split) -> np.ndarray:
        """Give the indices of a split's images that have labels, ascending."""
        ...

    def labels(self, split: Split, indices: np.ndarray) -> Tensor:
        """Read the labels of images."""
        ...

    def loss(self, logits: Float[Tensor, "b k"], labels: Tensor) -> Tensor: ...

    def metrics(self, logits: Float[Tensor, "b k"], labels: Tensor) -> dict[str, float]: ...

    def told(self, logits: Float[Tensor, "b k"], names: Sequence[str]) -> list[dict[str, Any]]:
        """Say of each image what `Task.predict` says of classes."""
        ...


class OneClass:
    """One class an image: softmax cross-entropy, with label `smoothing`; labels are class numbers [b]."""

    needs: tuple[str, ...] = ("labels",)
    score = "accuracy"

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def labelled(self, split: Split) -> np.ndarray:
        return np.flatnonzero(split.labels >= 0)

    def labels(self, split: Split, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(split.labels[indices])

    def loss(self, logits: Float[Tensor, "b k"], labels: Tensor) -> Tensor:
        """Mean over the batch; `labels` may be shares of the classes [b, k] too, which are taken as they are."""
        smoothing = 0.0 if labels.is_floating_point() else self.smoothing
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def metrics(self, logits: Float[Tensor, "b k"], labels: Tensor) -> dict[str, float]:
        return {
            "accuracy": classes.accuracy(logits, labels),
            "accuracy_top5": classes.accuracy(logits, labels, 5),
            "class_accuracy": classes.class_accuracy(logits, labels),
            "cross_entropy": classes.cross_entropy(logits, labels),
        }

    def told(self, logits: Float[Tensor, "b k"], names: Sequence[str]) -> list[dict[str, Any]]:
        return ranked(logits.softmax(-1), names)


class Presence:
    """Which classes are in an image: binary cross-entropy and VOC 2007's mAP; labels are presence [b, k].

    What is not judged (-1: only objects that are difficult) counts neither in the loss nor in the score.
    """

    needs: tuple[str, ...] = ("presence",)
    score = "voc07_map"

    def labelled(self, split: Split) -> np.ndarray:
        return np.flatnonzero((split.array("presence") >= 0).any(1))

    def labels(self, split: Split, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(split.array("presence")[indices]))

    def loss(self, logits: Float[Tensor, "b k"], labels: Tensor) -> Tensor:
        return classes.presence_entropy(logits, labels)

    def metrics(self, logits: Float[Tensor, "b k"], labels: Tensor) -> dict[str, float]:
        mean, _ = classes.presence_map(logits, labels)
        return {"voc07_map": mean, "cross_entropy": classes.presence_entropy(logits.double(), labels).item()}

    def told(self, logits: Float[Tensor, "b k"], names: Sequence[str]) -> list[dict[str, Any]]:
        chances = logits.sigmoid()
        present = [[name for name, there in zip(names, row, strict=True) if there] for row in (chances >= 0.5).tolist()]
        return [{**one, "present": found} for one, found in zip(ranked(chances, names), present, strict=True)]


def ranked(chances: Float[Tensor, "b k"], names: Sequence[str]) -> list[dict[str, Any]]:
    """Name each image's likeliest classes with their probabilities, and the first of them beside."""
    best, places = chances.topk(min(LIKELIEST, len(names)))
    found = []
    for row, at in zip(best.tolist(), places.tolist(), strict=True):
        top = [{"class": names[place], "probability": chance} for place, chance in zip(at, row, strict=True)]
        found.append({**top[0], "top": top})
    return found


def answer(predicts: Predicts, smoothing: float = 0.0) -> Answer:
    """Make a kind of answer; raises ValueError where presence is to be smoothed."""
    if predicts == "class":
        return OneClass(smoothing)
    if smoothing:
        raise ValueError(
            f"smoothing: found {smoothing} with predicts presence; it is for one class an image; delete it"
        )
    return Presence()
