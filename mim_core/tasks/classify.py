"""Classification by fine-tuning: mean of the patch features, LayerNorm, one linear layer; or the class token's.

The protocol of BEiT (section 3.1), MAE (appendix A.1) and SimMIM (section 4.1): the whole encoder is trained with
layer-wise learning-rate decay, under mixup and cutmix; their further augmentation is the row's `augment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from timm.data.mixup import Mixup
from torch import Tensor, nn

from mim_core.data.order import Address, read_images
from mim_core.data.pack import Split, batched
from mim_core.devices import Compute
from mim_core.tasks.answers import Answer, OneClass, Predicts, answer
from mim_core.tasks.confusion import draw_classes, draw_presence
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment, normalise, seeded

BATCH = 256
"""Images that are evaluated at once."""


class Classifier(nn.Module):
    """An encoder with a classification layer on its mean feature, or on its class token."""

    def __init__(
        self, encoder: Any, classes: int, pooling: Literal["mean", "class"] = "mean", head_init_scale: float = 1.0
    ) -> None:
        """Build; raises ValueError where there is no class token to pool."""
        super().__init__()
        if pooling == "class":
            need_class_token(encoder)
        self.encoder, self.pooling = encoder, pooling
        # The class token's feature comes out of the encoder's own last norm.
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6) if pooling == "mean" else nn.Identity()
        self.classify = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)
        with torch.no_grad():
            self.classify.weight.mul_(head_init_scale)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k"]:
        features, summary = self.encoder.encode(self.encoder.embed(images))
        pooled = features.mean(1) if self.pooling == "mean" else summary[:, 0]
        out: Tensor = self.classify(self.norm(pooled))
        return out


def need_class_token(encoder: Any) -> None:
    """Raise ValueError where an encoder has no class token."""
    if getattr(getattr(encoder, "backbone", None), "cls_token", None) is None:
        kind = type(encoder).__name__
        raise ValueError(f"pooling: found the class token's; the encoder, a {kind}, has none; choose mean")


@dataclass(frozen=True)
class Labelled:
    """A batch: uint8 images [b, c, H, W] and their labels, class numbers [b] or presence [b, k]."""

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
    answer: Answer

    def __call__(self, addresses: Sequence[Address]) -> Labelled:
        images = read_images(self.split, addresses, self.augment, self.seed)
        return Labelled(images, self.answer.labels(self.split, np.array([index for _, index in addresses])))


class Classify:
    """Fine-tune for classes.

    `predicts`: the image's one class, by cross-entropy with label `smoothing`, or the `presence` of each class, by
    binary cross-entropy and VOC 2007's mAP. `pooling`: the patches' mean, normed (BEiT, SimMIM, MAE), or the class
    token. `head_init_scale` shrinks the first weights of the classification layer (BEiT: 0.001). `mixup` and `cutmix`
    are the parameters of their beta distributions (papers: 0.8 and 1.0), 0 for off; with both, each batch gets one of
    them, as in timm.
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
        pooling: Literal["mean", "class"] = "mean",
        smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        mixup: Annotated[float, Field(ge=0)] = 0.0,
        cutmix: Annotated[float, Field(ge=0)] = 0.0,
        head_init_scale: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        """Build; raises ValueError where params do not go together."""
        self.answer = answer(predicts, smoothing)
        self.needs, self.score = self.answer.needs, self.answer.score
        if predicts == "presence" and (mixup or cutmix):
            name, found = ("mixup", mixup) if mixup else ("cutmix", cutmix)
            raise ValueError(f"{name}: found {found} with predicts presence; it mixes one class an image; delete it")
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=len(facts.classes))
        self.model = Classifier(encoder, len(facts.classes), pooling, head_init_scale)
        self.facts, self.compute = facts, compute

    def labelled(self, split: Split) -> np.ndarray:
        return self.answer.labelled(split)

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        return LabelledFetch(split, augment, seed, self.answer)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        pass

    def losses(self, batch: Labelled, step: int) -> Iterator[tuple[str, Tensor]]:
        images, labels = self._normalised(batch.images), batch.labels.to(self.compute.device)
        if self.mix:
            if len(images) % 2:
                raise ValueError(
                    f"optim.batch: found {len(images)} images a step; mixup and cutmix mix them in pairs; choose an "
                    "even number, also of labels where they are fewer"
                )
            # The loop names torch's stream by the step alone, and so this one.
            with seeded(np.random.default_rng(int(torch.randint(2**62, ())))):
                images, labels = self.mix(images, labels)
        yield "model", self.answer.loss(self._scored(images), labels)

    def logits(self, images: Tensor) -> Tensor:
        """Score uint8 images [b, c, H, W] by class [b, k], in fp32."""
        return self._scored(self._normalised(images))

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give top-1 accuracy, top-5, the mean over classes and cross-entropy, or mAP, over labelled images."""
        logits, labels = self._scores(split)
        return self.answer.metrics(logits, labels)

    def draw(self, split: Split, path: Path) -> None:
        """Draw what is taken for what beside the worst mistakes."""
        draw = draw_classes if isinstance(self.answer, OneClass) else draw_presence
        draw(split, self.labelled(split), *self._scores(split), self.facts.classes, path)

    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        return self.answer.told(self.logits(images), self.facts.classes)

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.compute.device), self.facts.mean, self.facts.std)

    def _scored(self, images: Tensor) -> Tensor:
        with self.compute.autocast():
            logits = self.model(images)
        return logits.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def _scores(self, split: Split) -> tuple[Tensor, Tensor]:
        """Score a split's labelled images: logits [n, k] and their labels."""
        self.model.eval()
        labelled = self.labelled(split)
        logits = []
        for indices in batched(map(int, labelled), BATCH):
            images = torch.from_numpy(np.stack([split.images[index] for index in indices]))
            logits.append(self.logits(images).cpu())
        self.model.train()
        return torch.cat(logits), self.answer.labels(split, labelled)
