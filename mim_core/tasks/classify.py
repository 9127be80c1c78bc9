"""Classification by fine-tuning: mean of the patch features, LayerNorm, one linear layer.

The protocol of BEiT (section 3.1), MAE (appendix A.1) and SimMIM (section 4.1): the whole encoder is trained with
layer-wise learning-rate decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mim_core import gallery
from mim_core.data.order import Address, read_images
from mim_core.data.pack import Split, batched
from mim_core.devices import Compute
from mim_core.metrics.classes import accuracy
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment, normalise

BATCH = 256
"""Images that are evaluated at once."""
MISTAKES = 24
"""Images that are drawn at most."""
LIKELIEST = 5
"""Classes that are named of an image at most."""


class Classifier(nn.Module):
    """An encoder with a classification layer on its mean feature."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.classify = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k"]:
        features = self.encoder(self.encoder.embed(images))
        out: Tensor = self.classify(self.norm(features.mean(1)))
        return out


@dataclass(frozen=True)
class Labelled:
    """A batch: uint8 images [b, c, H, W] and class numbers [b]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class LabelledFetch:
    """Make a labelled batch; picklable, so that loader workers can have it."""

    split: Split
    augment: Augment | None
    seed: int

    def __call__(self, addresses: Sequence[Address]) -> Labelled:
        images = read_images(self.split, addresses, self.augment, self.seed)
        labels = self.split.labels[[index for _, index in addresses]]
        return Labelled(images, torch.from_numpy(labels))


class Classify:
    """Fine-tune for classes: cross-entropy, with label `smoothing`."""

    needs = ("labels",)
    score = "accuracy"
    trains = True

    def __init__(
        self,
        encoder: Any,
        facts: Facts,
        compute: Compute,
        *,
        smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self.model = Classifier(encoder, len(facts.classes))
        self.facts, self.compute, self.smoothing = facts, compute, smoothing

    def labelled(self, split: Split) -> np.ndarray:
        return np.flatnonzero(split.labels >= 0)

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        return LabelledFetch(split, augment, seed)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        pass

    def losses(self, batch: Labelled, step: int) -> Iterator[tuple[str, Tensor]]:
        logits = self.logits(batch.images)
        yield "model", F.cross_entropy(logits, batch.labels.to(logits.device), label_smoothing=self.smoothing)

    def logits(self, images: Tensor) -> Tensor:
        """Score uint8 images [b, c, H, W] by class [b, k], in fp32."""
        with self.compute.autocast():
            logits = self.model(normalise(images.to(self.compute.device), self.facts.mean, self.facts.std))
        return logits.float()  # type: ignore[no-any-return]

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give top-1 accuracy and cross-entropy over a split's labelled images."""
        scores, labels = self._scores(split)
        return {"accuracy": accuracy(scores, labels), "cross_entropy": F.cross_entropy(scores, labels).item()}

    def draw(self, split: Split, path: Path) -> None:
        """Draw the worst mistakes: the images whose own class got the least."""
        scores, labels = self._scores(split)
        chances = scores.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        worst = [int(at) for at in chances.argsort()[:MISTAKES] if scores[at].argmax() != labels[at]]
        indices, names = self.labelled(split)[worst], self.facts.classes
        said = [f"{names[int(labels[at])]}, taken for {names[int(scores[at].argmax())]}" for at in worst]
        images = [torch.from_numpy(np.array(split.images[index])) / 255 for index in indices]
        caption = f"Worst mistakes among {len(labels):,} images ({accuracy(scores, labels):.1%} are right)"
        gallery.draw_labelled(images, said, caption).save(path)

    def answer(self, images: Tensor) -> list[dict[str, Any]]:
        return ranked(self.logits(images), self.facts.classes)

    @torch.no_grad()
    def _scores(self, split: Split) -> tuple[Tensor, Tensor]:
        """Score a split's labelled images: logits [n, k] and class numbers [n]."""
        self.model.eval()
        labelled = self.labelled(split)
        logits = []
        for indices in batched(map(int, labelled), BATCH):
            images = torch.from_numpy(np.stack([split.images[index] for index in indices]))
            logits.append(self.logits(images).cpu())
        self.model.train()
        return torch.cat(logits), torch.from_numpy(split.labels[labelled])


def ranked(logits: Float[Tensor, "b k"], names: Sequence[str]) -> list[dict[str, Any]]:
    """Name each image's likeliest classes with their probabilities, and the first of them beside."""
    chances, places = logits.softmax(-1).topk(min(LIKELIEST, len(names)))
    found = []
    for row, at in zip(chances.tolist(), places.tolist(), strict=True):
        top = [{"class": names[place], "probability": chance} for place, chance in zip(at, row, strict=True)]
        found.append({**top[0], "top": top})
    return found
