"""A probe while pretraining: how well a linear classifier reads the classes from the encoder's features so far.

The classifier is ridge regression on one-hot classes, which has a closed form: no rate, no steps, no seed of its own.
Its features are the mean, deviation, highest and lowest value over an image's patches after each block, standardised:
where objects are small, means alone can stay at chance while the others tell classes, and none does in an encoder that
has not learned. Block and penalty are chosen by generalised cross-validation (Golub, Heath and Wahba, Technometrics
1979) on the labelled training images, so that validation images choose nothing and the score on them is one of images
not seen. It ranks encoders of any target, which losses of reconstruction do not, before they are fine-tuned.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor

from mim_core.data.pack import Pack, Split, batched, label_budget
from mim_core.devices import Compute
from mim_core.metrics.classes import accuracy
from mim_core.spec import Strict
from mim_core.transforms import normalise

BATCH = 256
"""Images that are read at once."""
VALIDATED = 500
"""Validation images that a probe is scored on at most, as evenly over the classes as they allow."""
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)
"""Penalties that are tried, in units of the number of images (a standardised feature's sum of squares)."""


class Probing(Strict):
    """What a job asks for: how many `labels` the probe may learn from, and at how many `evaluations`, the last at the
    end of training."""

    labels: Annotated[int, Field(gt=1)] = 1000
    evaluations: PositiveInt = 4

    def stride(self, steps: int, every: int) -> int:
        """Give the steps between two probes, a multiple of the steps between evaluations."""
        return max(1, steps // (self.evaluations * every)) * every

    def due(self, step: int, steps: int, every: int) -> bool:
        """Whether a probe is due at an evaluation after `step` steps; those are `every` steps apart, and at the end."""
        at, rest = divmod(step, self.stride(steps, every))
        return step == steps or (rest == 0 and at < self.evaluations)


class Linear:
    """The probe of one job: its images, the same at each evaluation."""

    def __init__(self, pack: Pack, labels: int, seed: int, compute: Compute) -> None:
        """Choose the images; raises ValueError where the dataset has no classes or too few labels."""
        self.pack, self.compute = pack, compute
        train, held = pack.split("train"), pack.split("validation")
        for name, split in (("training", train), ("validation", held)):
            if not (len(split) and (split.labels >= 0).any()):
                raise ValueError(
                    f"probe: {pack.folder.name} has no {name} image with a class; a probe needs a dataset with labels "
                    "of classes; choose one, or leave the probe out"
                )
        try:
            self.chosen = label_budget(train.labels, labels, seed)
        except ValueError as error:
            raise ValueError(f"probe.{error}") from None
        self.held = label_budget(held.labels, min(VALIDATED, int((held.labels >= 0).sum())), seed)
        self.train_split, self.held_split = train, held

    def score(self, encoder: Any) -> dict[str, float]:
        """Give `probe_score`, the share of validation images whose class is read right, and `probe_block`, the block
        that it is read after, counted from 1. The encoder is in evaluation mode."""
        classes = len(self.pack.classes)
        known = torch.from_numpy(self.train_split.labels[self.chosen])
        true = torch.from_numpy(self.held_split.labels[self.held])
        wanted = F.one_hot(known, classes).double()
        fits = [fit(features, wanted) for features in self.features(encoder, self.train_split, self.chosen)]
        block = min(range(len(fits)), key=lambda at: fits[at][0])
        *_, (mean, scale, weights) = fits[block]
        found = self.features(encoder, self.held_split, self.held)[block]
        scores = ((found.double() - mean) / scale) @ weights + wanted.mean(0)
        return {"probe_score": accuracy(scores, true), "probe_block": float(block + 1)}

    @torch.no_grad()
    def features(self, encoder: Any, split: Split, indices: Int64[np.ndarray, " n"]) -> list[Float[Tensor, "n d"]]:
        """Read what patches are like over each image after each block, into the machine's memory."""
        parts = []
        for some in batched(map(int, indices), BATCH):
            images = torch.from_numpy(np.stack([split.images[index] for index in some])).to(self.compute.device)
            with self.compute.autocast():
                blocks = encoder.blocks(normalise(images, self.pack.mean, self.pack.std))
            parts.append([pooled(features.float()).cpu() for features, _ in blocks])
        return [torch.cat(block) for block in zip(*parts, strict=True)]


def pooled(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
    """Give the mean, deviation, highest and lowest value of each feature over the patches."""
    return torch.cat([patches.mean(1), patches.std(1, correction=0), patches.amax(1), patches.amin(1)], 1)


Fit = tuple[Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, "d k"]]


def fit(features: Float[Tensor, "n d"], wanted: Float[Tensor, "n k"]) -> tuple[float, Fit]:
    """Fit `wanted` by ridge regression, the penalty by generalised cross-validation.

    Gives its criterion, of which less is better, and the features' mean, their scale and the weights.
    """
    features = features.double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    standard, centred = (features - mean) / scale, wanted - wanted.mean(0)
    count, width = features.shape
    # The eigenvectors of the smaller of the two matrices of products; both have the same eigenvalues but zeros.
    narrow = width <= count
    values, vectors = torch.linalg.eigh(standard.T @ standard if narrow else standard @ standard.T)
    real = values > 1e-10 * values.max()
    values, vectors = values[real], vectors[:, real]
    along = vectors.T @ (standard.T @ centred if narrow else centred)
    inside = along.square().sum(1) / (values if narrow else 1.0)
    # What the features cannot reach at any penalty.
    beyond = (centred.square().sum() - inside.sum()).clamp(min=0)
    kept = values / (values + count * PENALTIES[:, None])  # [penalties, eigenvalues]
    residual = beyond + ((1 - kept).square() * inside).sum(1)
    # One degree of freedom more is the mean's.
    free = (count - 1 - kept.sum(1)).clamp(min=1e-9)
    criteria = count * residual / free.square()
    best = int(criteria.argmin())
    weights = vectors @ (along / (values + count * PENALTIES[best])[:, None])
    return criteria[best].item(), (mean, scale, weights if narrow else standard.T @ weights)
