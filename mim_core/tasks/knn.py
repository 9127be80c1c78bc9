"""Nearest neighbours on frozen features: nothing is trained.

The weighted vote of DINO's evaluation (Caron et al., ICCV 2021, appendix; after Wu et al., CVPR 2018): features of unit
length, each of the `k` nearest labelled images votes for its class with exp(similarity / temperature). Encoders of
masked image modelling do poorly here and well when fine-tuned: do not choose among them by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from mim_core.data.pack import Split
from mim_core.devices import Compute
from mim_core.tasks.answers import OneClass
from mim_core.tasks.confusion import draw_classes
from mim_core.tasks.features import Blocks, Frozen, Poolings, Reader, Tap, said, taps
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment

CHUNK = 256
"""Images that are compared with all others at once."""


class Neighbours(Frozen):
    """A frozen encoder with the features and classes of labelled images, a bank for the tap that was chosen."""

    bank: Tensor
    classes: Tensor

    def __init__(self, encoder: Any, taps: Sequence[Tap], count: int, k: int, temperature: float) -> None:
        super().__init__(encoder, taps)
        self.count, self.k, self.temperature = count, k, temperature
        self.register_buffer("bank", torch.empty(0, taps[0].width))
        self.register_buffer("classes", torch.empty(0, dtype=torch.long))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # As many rows as the file's: how many images were labelled is not known before.
        for name in ("bank", "classes"):
            if f"{prefix}{name}" in state:
                own, given = getattr(self, name), state[f"{prefix}{name}"]
                setattr(self, name, torch.empty(given.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k"]:
        """Give the log of each class's share of the votes."""
        return self.shares(self.features(images)[int(self.chosen)], self.bank, self.classes)

    def shares(self, features: Float[Tensor, "b d"], bank: Float[Tensor, "n d"], classes: Tensor) -> Tensor:
        """Let a bank's nearest vote on features: the log of each class's share [b, k]."""
        votes = vote(features, bank, classes, k=self.k, temperature=self.temperature, count=self.count)
        return (votes / votes.sum(1, keepdim=True)).log()


def vote(
    features: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"],
    classes: Tensor,
    *,
    k: int,
    temperature: float,
    count: int,
) -> Float[Tensor, "b k"]:
    """Sum the votes of the k nearest of a bank of unit vectors (all where there are fewer) by class, of `count`."""
    votes = []
    for some in torch.split(F.normalize(features, dim=1), CHUNK):
        near, at = (some @ bank.T).topk(min(k, len(bank)))
        # Less the nearest's: votes count by their ratio, and exp() of a small temperature's would overflow.
        weights = ((near - near[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(some), count, device=some.device).scatter_add_(1, classes[at], weights))
    return torch.cat(votes)


class Knn:
    """Judge frozen features by their nearest neighbours among the labelled training images.

    Where several `blocks` and `pooling`s are tried, the best on validation images is what test images are scored by;
    `block` and `pooling` (0 mean, 1 class, 2 both) name it among the metrics.
    """

    needs: tuple[str, ...] = ("labels",)
    score = "accuracy"
    trains = False

    def __init__(
        self,
        encoder: Any,
        facts: Facts,
        compute: Compute,
        *,
        k: PositiveInt = 20,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        blocks: Blocks = (-1,),
        pooling: Poolings = ("mean",),
    ) -> None:
        """Build; raises ValueError for blocks and poolings that the encoder has not."""
        self.model = Neighbours(encoder, taps(encoder, blocks, pooling), len(facts.classes), k, temperature)
        self.facts, self.compute, self.answer = facts, compute, OneClass()
        self.reader = Reader(self.model, facts, compute)
        self.known: tuple[Split, np.ndarray] | None = None
        self.banks: list[Tensor] = []

    def labelled(self, split: Split) -> np.ndarray:
        return self.answer.labelled(split)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        """Take the images that vote; they are read with the first evaluation, whose seconds are a run's."""
        self.known = (images, chosen)

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        raise AssertionError("nothing is trained: such rows have no optim")

    def losses(self, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("nothing is trained: such rows have no optim")

    def logits(self, images: Tensor) -> Tensor:
        """Give the log of each class's share of the votes [b, k] on uint8 images [b, c, H, W]."""
        model = self.model
        return model.shares(self.reader.of(images)[int(model.chosen)], model.bank, model.classes)

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give the chosen features' metrics. On validation images the best are chosen first, and all scores given."""
        self._fill()
        labels = self.answer.labels(split, self.labelled(split))
        every: dict[str, float] = {}
        if split.folder.name == "validation" and len(self.banks) > 1:
            scores = [self.answer.metrics(self._shares(split, at), labels)["accuracy"] for at in range(len(self.banks))]
            self.model.chosen.fill_(int(np.argmax(scores)))
            self.model.bank = self.banks[int(self.model.chosen)]
            every = {f"accuracy_{tap}": one for tap, one in zip(self.model.taps, scores, strict=True)}
        at = int(self.model.chosen)
        found = self.answer.metrics(self._shares(split, at), labels)
        # Votes are no chances: a class without a vote has none, and cross-entropy would be infinite.
        del found["cross_entropy"]
        return {**found, **said(self.model.taps[at]), **every}

    def draw(self, split: Split, path: Path) -> None:
        """Draw what is taken for what beside the worst mistakes."""
        labelled = self.labelled(split)
        shares = self._shares(split, int(self.model.chosen))
        draw_classes(split, labelled, shares, self.answer.labels(split, labelled), self.facts.classes, path)

    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        return self.answer.told(self.logits(images), self.facts.classes)

    def _fill(self) -> None:
        """Read the features that vote, once."""
        if self.known and not self.banks:
            images, chosen = self.known
            device = self.compute.device
            self.banks = [F.normalize(one, dim=1).to(device) for one in self.reader.read(images, chosen)]
            self.model.classes = self.answer.labels(images, chosen).to(device)
            self.model.bank = self.banks[int(self.model.chosen)]

    def _shares(self, split: Split, at: int) -> Tensor:
        features = self.reader.read(split, self.labelled(split))[at].to(self.compute.device)
        bank = self.banks[at] if self.banks else self.model.bank
        return self.model.shares(features, bank, self.model.classes).cpu()
