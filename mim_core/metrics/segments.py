"""Metrics of semantic maps, from one table of counts, so that a split is judged as a whole and not image by image."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def confusion(
    predicted: Int[Tensor, "*pixels"], true: Int[Tensor, "*pixels"], classes: int, ignored: int = 255
) -> Int[Tensor, "k k"]:
    """Count pixels by true class (rows) and predicted class (columns) in int64; tables of parts of a split add up.

    Pixels whose true value is `ignored` are left out. Raises ValueError for values that are no class.
    """
    judged = true != ignored
    rows, columns = true[judged].long(), predicted[judged].long()
    for name, values in (("true", rows), ("predicted", columns)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < classes:
            wrong = int(values[(values < 0) | (values >= classes)][0])
            raise ValueError(
                f"{name} map: found the value {wrong}; there are {classes} classes, counted from 0; prepare the data "
                "again"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def ious(counts: Int[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Give each class's intersection over union; NaN for one that is neither there nor predicted (no union)."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def miou(counts: Int[Tensor, "k k"]) -> float:
    """Mean intersection over union of the classes whose union is not empty (VOC's and ADE20K's rule)."""
    return ious(counts).nanmean().item()


def pixel_accuracy(counts: Int[Tensor, "k k"]) -> float:
    """Share of judged pixels that have their class."""
    return (counts.diagonal().sum().double() / counts.sum()).item()


def mean_accuracy(counts: Int[Tensor, "k k"]) -> float:
    """Mean over the classes that are there of the share of their pixels that are found."""
    return (counts.diagonal().double() / counts.sum(1)).nanmean().item()
