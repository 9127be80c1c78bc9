"""Classification by fine-tuning: mean of the patch features, LayerNorm, one linear layer.

The protocol of BEiT (section 3.1), MAE (appendix A.1) and SimMIM (section 4.1): the whole encoder is trained with
layer-wise learning-rate decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mim_core.data.order import Address, read_images
from mim_core.data.pack import Pack, Split, batched
from mim_core.devices import Compute
from mim_core.metrics import accuracy
from mim_core.transforms import Augment, normalise


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


class Classification(nn.Module):
    """The objective: cross-entropy, with label smoothing."""

    def __init__(self, model: Classifier, pack: Pack, compute: Compute, smoothing: float) -> None:
        super().__init__()
        self.model, self.pack, self.compute, self.smoothing = model, pack, compute, smoothing

    def losses(self, batch: Labelled, step: int) -> Iterator[tuple[str, Tensor]]:
        with self.compute.autocast():
            logits = self.model(normalise(batch.images.to(self.compute.device), self.pack.mean, self.pack.std))
        yield "model", F.cross_entropy(logits.float(), batch.labels.to(logits.device), label_smoothing=self.smoothing)

    @torch.no_grad()
    def evaluate(self, split: Split, batch: int = 256) -> dict[str, float]:
        """Top-1 accuracy and cross-entropy over a split's labelled images."""
        self.model.eval()
        logits = []
        labelled = np.flatnonzero(split.labels >= 0)
        for indices in batched(map(int, labelled), batch):
            images = torch.from_numpy(np.stack([split.images[index] for index in indices])).to(self.compute.device)
            with self.compute.autocast():
                logits.append(self.model(normalise(images, self.pack.mean, self.pack.std)).float().cpu())
        self.model.train()
        labels = torch.from_numpy(split.labels[labelled])
        scores = torch.cat(logits)
        return {"accuracy": accuracy(scores, labels), "cross_entropy": F.cross_entropy(scores, labels).item()}
