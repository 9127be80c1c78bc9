"""Linear probes of a frozen encoder: which block, pooling and rate tell classes best, all tried in one pass.

The published protocols as params, beside the row's `optim` and `augment`:

MAE (appendix A.1 and code): `pooling: class` (or mean), `norm: batch`, which its code puts before the layer and whose
    absence is the usual failure to reproduce it, `init_std: 0.01`; LARS at 6.4 (0.1 for each 256 of the 16384 images
    of a step), no decay, 90 epochs of which 10 warm up; random resized crops. Where its code takes the mean, it norms
    after that; here the features are the encoder's own, after its last norm.
SimMIM (table 6; the block by its authors' word): `blocks: 8` of 12, `pooling: mean`, no class token.
BEiT (`run_linear_eval.py`): a layer on each block's class token and mean side by side, `pooling: both` with every block
    in `blocks`, `norm: none`, weights from N(0, 0.01), all trained by the sum of their losses with AdamW (decay 1e-4;
    or SGD, momentum 0.9, no decay), base rate 1e-3 for 256 images, a cosine over 100 epochs, crops and flips. It gives
    each block's accuracy and, as its own, the best over blocks and epochs on the very images that it reports; here
    validation images choose, and test images are scored once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mim_core.data.order import Address
from mim_core.data.pack import Split
from mim_core.devices import Compute
from mim_core.tasks.answers import OneClass, Predicts, answer
from mim_core.tasks.classify import Labelled, LabelledFetch
from mim_core.tasks.confusion import draw_classes, draw_presence
from mim_core.tasks.features import Blocks, Frozen, Poolings, Rates, Reader, Tap, said, taps
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment

Norm = Literal["batch", "layer", "none"]


class Probes(Frozen):
    """A frozen encoder with linear layers on its features: for each tap, one for each rate."""

    def __init__(self, encoder: Any, taps: Sequence[Tap], rates: int, classes: int, norm: Norm, std: float) -> None:
        super().__init__(encoder, taps)
        self.heads = nn.ModuleList()
        for tap, _ in itertools.product(taps, range(rates)):
            linear = nn.Linear(tap.width, classes)
            nn.init.trunc_normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
            norms: dict[Norm, nn.Module] = {
                "batch": nn.BatchNorm1d(tap.width, eps=1e-6, affine=False),
                "layer": nn.LayerNorm(tap.width, eps=1e-6, elementwise_affine=False),
                "none": nn.Identity(),
            }
            self.heads.append(nn.Sequential(norms[norm], linear))
        self.rates = rates

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k"]:
        """Score by the head that was chosen."""
        at = int(self.chosen)
        out: Tensor = self.heads[at](self.features(images)[at // self.rates])
        return out

    def scores(self, features: Sequence[Float[Tensor, "b d"]]) -> list[Float[Tensor, "b k"]]:
        """Score each tap's features by each of its heads."""
        return [head(features[at // self.rates]) for at, head in enumerate(self.heads)]


@dataclass(frozen=True)
class Featured:
    """A batch of features that are known: for each tap [b, d], with the labels."""

    features: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FeaturedFetch:
    """Look a batch's features up; `chosen` are the images that they are of, ascending."""

    features: list[Tensor]
    labels: Tensor
    chosen: np.ndarray

    def __call__(self, addresses: Sequence[Address]) -> Featured:
        rows = torch.from_numpy(np.searchsorted(self.chosen, [index for _, index in addresses]))
        return Featured([array[rows] for array in self.features], self.labels[rows])


class Probe:
    """Train linear layers on frozen features, side by side: the best on validation images is the probe.

    `blocks` and `pooling` say which features are tried, each with each; `rates` multiply the row's learning rate, and
    each gets layers of its own. `norm` stands before a layer, without parameters. Each layer follows its own loss (what
    is reported is their sum), but `optim.clip` would bind them together: leave it out. Without `augment` features are
    computed once and kept in memory, 4 bytes a number; with it they are computed at each step.

    Among the metrics `block`, `pooling` (0 mean, 1 class, 2 both) and `rate` name the best.
    """

    needs: tuple[str, ...] = ("labels", "presence")
    score = "accuracy"
    trains = True

    def __init__(
        self,
        encoder: Any,
        facts: Facts,
        compute: Compute,
        *,
        predicts: Predicts = "class",
        blocks: Blocks = (-1,),
        pooling: Poolings = ("mean",),
        norm: Norm = "batch",
        rates: Rates = (1.0,),
        init_std: Annotated[float, Field(gt=0)] = 0.01,
    ) -> None:
        """Build; raises ValueError for blocks and poolings that the encoder has not."""
        self.answer = answer(predicts)
        self.needs, self.score = self.answer.needs, self.answer.score
        tapped = taps(encoder, blocks, pooling)
        self.model = Probes(encoder, tapped, len(rates), len(facts.classes), norm, init_std)
        self.tried = list(itertools.product(tapped, rates))
        self.facts, self.compute = facts, compute
        self.reader = Reader(self.model, facts, compute)
        self.chosen = np.array([], np.int64)

    def labelled(self, split: Split) -> np.ndarray:
        return self.answer.labelled(split)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        self.chosen = chosen

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        if augment:
            return LabelledFetch(split, augment, seed, self.answer)
        labels = self.answer.labels(split, self.chosen)
        return FeaturedFetch(self.reader.read(split, self.chosen), labels, self.chosen)

    def factor(self, name: str) -> float:
        """What multiplies the learning rate of a parameter."""
        return self.tried[int(name.split(".")[1])][1]

    def losses(self, batch: Featured | Labelled, step: int) -> Iterator[tuple[str, Tensor]]:
        device = self.compute.device
        if isinstance(batch, Featured):
            features = [one.to(device) for one in batch.features]
        else:
            features = self.reader.of(batch.images)
        labels = batch.labels.to(device)
        yield "model", torch.stack([self.answer.loss(one, labels) for one in self.model.scores(features)]).sum()

    def logits(self, images: Tensor) -> Tensor:
        """Score uint8 images [b, c, H, W] by class [b, k], by the head that was chosen."""
        at = int(self.model.chosen)
        out: Tensor = self.model.heads[at](self.reader.of(images)[at // self.model.rates])
        return out

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give the chosen head's metrics. On the validation split the best is chosen first, and all scores given."""
        labels = self.answer.labels(split, self.labelled(split))
        every: dict[str, float] = {}
        if split.folder.name == "validation":
            scores = [self.answer.metrics(self._scores(split, at), labels)[self.score] for at in range(len(self.tried))]
            self.model.chosen.fill_(int(np.argmax(scores)))
            if len(scores) > 1:
                names = [f"{self.score}_{tap}_rate_{rate:g}" for tap, rate in self.tried]
                every = dict(zip(names, scores, strict=True))
        at = int(self.model.chosen)
        tap, rate = self.tried[at]
        return {**self.answer.metrics(self._scores(split, at), labels), **said(tap), "rate": rate, **every}

    def draw(self, split: Split, path: Path) -> None:
        """Draw what is taken for what beside the worst mistakes."""
        draw = draw_classes if isinstance(self.answer, OneClass) else draw_presence
        labelled = self.labelled(split)
        logits = self._scores(split, int(self.model.chosen))
        draw(split, labelled, logits, self.answer.labels(split, labelled), self.facts.classes, path)

    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        return self.answer.told(self.logits(images), self.facts.classes)

    @torch.no_grad()
    def _scores(self, split: Split, at: int) -> Tensor:
        """Score a split's labelled images by one head: logits [n, k]."""
        self.model.eval()
        features = self.reader.read(split, self.labelled(split))[at // self.model.rates]
        logits: Tensor = self.model.heads[at](features.to(self.compute.device)).cpu()
        self.model.train()
        return logits
