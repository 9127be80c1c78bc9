"""What a downstream task is: a model round an encoder, its loss, its metrics and the pictures of its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from mim_core.data.order import Address
from mim_core.data.pack import Pack, Split
from mim_core.spec import Piece
from mim_core.transforms import Augment

Fetch = Callable[[Sequence[Address]], Any]


@dataclass(frozen=True)
class Facts:
    """What a task must know of a dataset before it reads an image.

    `size` is (height, width) in px; `mean` and `std` of each channel in [0, 1]; `segments` name the values of semantic
    maps; `annotations` are as the pack's `meta.json` has them.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[str]
    segments: Sequence[str]
    annotations: Sequence[str]

    @classmethod
    def of(cls, pack: Pack) -> Facts:
        meta = pack.meta
        return cls(
            pack.size, pack.channels, pack.mean, pack.std, pack.classes, meta.get("segments", []), meta["annotations"]
        )


def sight(task: Piece, size: tuple[int, int]) -> tuple[int, int]:
    """Give the (height, width) in px that a task's encoder sees at once: its windows, or whole images of `size`."""
    height, width = task.params().get("window_px") or size
    return height, width


class Task(Protocol):
    """A row's task, built as `build(TASKS, row.task, encoder, facts, compute)`.

    Parameters whose names begin with `encoder.` in `model` are the encoder's and learn at the rate of their layer; all
    others learn at the full rate.
    """

    needs: tuple[str, ...]
    """Annotations of which the dataset must have one, the preferred first."""
    score: str
    """The metric, a share in [0, 1], by which a learning rate is chosen and an arm is reported."""
    trains: bool
    """False where nothing is optimised: the task is evaluated as it is."""
    model: nn.Module

    def labelled(self, split: Split) -> np.ndarray:
        """Give the indices of the images that have the labels which the task learns from, ascending."""
        ...

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        """Give what makes a training batch from addresses; it can be pickled. A batch has a length, in images."""
        ...

    def losses(self, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (player, loss), as the training loop wants it."""
        ...

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give the metrics over a split's labelled images, `score` among them; leaves the model in training mode."""
        ...

    def draw(self, split: Split, path: Path) -> None:
        """Save a picture of predictions on a split as a PNG file."""
        ...

    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        """Say what each uint8 image [b, c, H, W] of the facts' size shows, as `evaluate` judges it, in plain values.

        Of classes `class`, `probability` and `top`, a list of both, and where several may be in one image `present`,
        the names of those with a probability of a half; of a semantic map `map`, a uint8 array [H, W] of
        `segments`; of objects `objects`, a list of `class`, `score`, `left`, `top`, `right`, `bottom` in px. The model
        is in evaluation mode and no gradients are kept. A task that cannot answer from its weights alone lacks it.
        """
        ...

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        """Take what does not change while training from the chosen training images, before the first step."""
        ...


def tuned(encoder: Piece, drop_path: float, window: int | None = None) -> Piece:
    """Give the form in which an encoder is fine-tuned: with the row's drop path and window, and a relative bias of each
    block's own, which begins as the one that all blocks shared (BEiT's published fine-tuning)."""
    changes: dict[str, Any] = {"drop_path": drop_path} if "drop_path" in encoder.params() else {}
    if window and "window" in encoder.params():
        changes["window"] = window
    if encoder.params().get("positions") == "relative":
        changes["positions"] = "relative_per_block"
    return encoder.model_copy(update=changes)
