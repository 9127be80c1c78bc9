"""Inference by a sliding window, as mmsegmentation has it: scores are averaged where windows overlap."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]


def corners(size: Size, window: Size, stride: Size) -> list[tuple[int, int]]:
    """Give the top left corners of windows that cover an image, `stride` px apart; the last ones end with the image.

    All pairs are (height, width) in px.
    """
    tops, lefts = (
        [min(at * step, whole - part) for at in range(1 + -(-(whole - part) // step))]
        for whole, part, step in zip(size, window, stride, strict=True)
    )
    return list(product(tops, lefts))


def slide(
    score: Callable[[Tensor], Float[Tensor, "b k h w"]], images: Float[Tensor, "b c H W"], window: Size, stride: Size
) -> Float[Tensor, "b k H W"]:
    """Score images window by window and give each pixel the mean of its windows' scores."""
    height, width = window
    total, times = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, left in corners((images.shape[-2], images.shape[-1]), window, stride):
        rows, columns = slice(top, top + height), slice(left, left + width)
        scores = score(images[..., rows, columns])
        if not total.ndim:
            total = scores.new_zeros(*scores.shape[:2], *images.shape[-2:])
        total[..., rows, columns] += scores
        times[rows, columns] += 1
    return total / times
