"""A probe while pretraining: how well a linear classifier reads the classes from the encoder's features so far.

The classifier is ridge regression on one-hot classes, which has a closed form: no rate, no steps, no seed of its own.
Its features are the means of an image's patches after each block, standardised; block and penalty are chosen by
generalised cross-validation (Golub, Heath and Wahba, Technometrics 1979) on the labelled training images, so that
validation images choose nothing and the score on them is one of images not seen. It ranks encoders of any target, which
losses of reconstruction do not, long before they are fine-tuned.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
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
    evaluations: Annotated[int, Field(gt=0)] = 4

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
        """Read the mean patch features of images after each block, on the machine's memory."""
        parts = []
        for some in batched(map(int, indices), BATCH):
            images = torch.from_numpy(np.stack([split.images[index] for index in some])).to(self.compute.device)
            with self.compute.autocast():
                blocks = encoder.blocks(normalise(images, self.pack.mean, self.pack.std))
            parts.append([features.float().mean(1).cpu() for features, _ in blocks])
        return [torch.cat(block) for block in zip(*parts, strict=True)]


Fit = tuple[Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, "d k"]]


def fit(features: Float[Tensor, "n d"], wanted: Float[Tensor, "n k"]) -> tuple[float, Fit]:
    """Fit `wanted` by ridge regression, the penalty by generalised cross-validation.

    Gives its criterion, of which less is better, and the features' mean, their scale and the weights.
    """
    features = features.double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    u, s, v = torch.linalg.svd((features - mean) / scale, full_matrices=False)
    centred = wanted - wanted.mean(0)
    inside = u.T @ centred
    count = len(features)
    # What the features cannot reach at any penalty.
    beyond = (centred.square().sum() - inside.square().sum()).clamp(min=0)
    kept = s.square() / (s.square() + count * PENALTIES[:, None])  # [penalties, d]
    residual = beyond + ((1 - kept).square() * inside.square().sum(1)).sum(1)
    # One degree of freedom more is the mean's.
    free = (count - 1 - kept.sum(1)).clamp(min=1e-9)
    criteria = count * residual / free.square()
    best = int(criteria.argmin())
    weights = v.T @ (inside * (s / (s.square() + count * PENALTIES[best]))[:, None])
    return criteria[best].item(), (mean, scale, weights)
