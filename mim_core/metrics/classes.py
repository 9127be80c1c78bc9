"""Metrics of classes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def accuracy(logits: Float[Tensor, "b k"], labels: Tensor) -> float:
    """Share of images whose highest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()
