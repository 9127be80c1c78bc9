"""Detect objects: fine-tune an encoder within a detector, judged as COCO or as PASCAL VOC judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from mim_core.data.pack import Split, batched
from mim_core.devices import Compute
from mim_core.metrics.boxes import Found, coco_ap, decode, encode, voc_ap
from mim_core.spec import build
from mim_core.tasks.detect import sheet
from mim_core.tasks.detect.batch import Boxed, BoxedFetch, truth
from mim_core.tasks.detect.detectors import DETECTORS, Detector, DetectorPiece
from mim_core.tasks.detect.necks import NECKS, NeckPiece, usual
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment, normalise

SCORES = {"coco": "ap", "voc07": "voc07_ap"}
PIXELS, FEWEST = 2**18, 4
"""Pixels that are evaluated at once, and images at least."""
DRAWN = 24
"""Images that are drawn at most."""


class Detect:
    """Learn to find objects: the sum of a detector's losses.

    `neck`: left out, it goes with the encoder (see `necks.usual`). `metric`: the score, COCO's AP or VOC 2007's.
    `visible`: share of a box's area that a crop must leave, else the object is no longer learned from; 0 keeps whatever
    has a px left, as large-scale jitter does. An image without objects is all background.
    """

    needs: tuple[str, ...] = ("boxes",)
    score = "ap"
    trains = True

    def __init__(
        self,
        encoder: Any,
        facts: Facts,
        compute: Compute,
        *,
        detector: DetectorPiece = "faster_rcnn",  # type: ignore[assignment]
        neck: NeckPiece | None = None,
        metric: Literal["coco", "voc07"] = "coco",
        visible: Annotated[float, Field(ge=0, lt=1)] = 0.25,
    ) -> None:
        """Build for an encoder. Raises ValueError where neck, detector, encoder or annotations do not go together."""
        self.masks = detector.name == "mask_rcnn"
        if self.masks:
            self.needs = ("instances",)
        if self.masks and facts.annotations and "instances" not in facts.annotations:
            raise ValueError(
                f"detector: found mask_rcnn on a dataset annotated with {list(facts.annotations)}; it learns from "
                "instances; choose faster_rcnn"
            )
        if neck is None:
            made = NECKS[usual(encoder, detector.name)](encoder, facts.size)
        else:
            made = build(NECKS, neck, encoder, facts.size)
        parts = build(DETECTORS, detector, made, facts.size, len(facts.classes))
        self.model = Detector(encoder, made, *parts)
        self.facts, self.compute, self.score, self.visible = facts, compute, SCORES[metric], visible

    def labelled(self, split: Split) -> np.ndarray:
        """All images: one without a box has no object. Raises ValueError where the pack has no boxes."""
        split.array("instances" if self.masks else "boxes")
        return np.arange(len(split))

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        return BoxedFetch(split, augment, seed, self.masks, self.visible)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        pass

    def losses(self, batch: Boxed, step: int) -> Iterator[tuple[str, Tensor]]:
        device = self.compute.device
        targets = [{name: one.to(device) for name, one in target.items()} for target in batch.targets]
        with self.compute.autocast():
            losses = self.model(self._normalise(batch.images), targets)
        yield "model", sum(losses.values())  # type: ignore[misc]

    def predict(self, images: UInt8[Tensor, "b c H W"]) -> list[dict[str, Any]]:
        """Say what is on each image: `objects`, each with `class`, `score`, `left`, `top`, `right`, `bottom` in px.

        The best come first. Leaves the model in evaluation mode.
        """
        height, width = self.facts.size
        parts = torch.split(images, max(FEWEST, PIXELS // (height * width)))
        answers = []
        for one in (each for part in parts for each in self.find(part)):
            objects = []
            for box, score, label in zip(*(one[name].tolist() for name in ("boxes", "scores", "labels")), strict=True):
                sides = dict(zip(("left", "top", "right", "bottom"), box, strict=True))
                objects.append({"class": self.facts.classes[label - 1], "score": score, **sides})
            answers.append({"objects": objects})
        return answers

    @torch.no_grad()
    def find(self, images: UInt8[Tensor, "b c H W"]) -> list[dict[str, Tensor]]:
        """Find objects: for each image boxes [m, 4] in px, scores [m] in falling order, labels [m] (class + 1), and
        masks [m, H, W] of Mask R-CNN. Leaves the model in evaluation mode."""
        self.model.eval()
        with self.compute.autocast():
            found: list[dict[str, Tensor]] = self.model(self._normalise(images))
        return found

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give average precisions over a split: COCO's `ap`, `ap50`, `ap75` and by area, VOC's `voc07_ap` and
        `voc10_ap`, and COCO's of masks as `mask_ap` and so on."""
        found = self._find_all(split)
        real = [truth(split, index, self.masks) for index in range(len(split))]
        classes, size = len(self.facts.classes), self.facts.size
        scores = coco_ap(found, real, classes, size) | voc_ap(found, real, classes)
        if self.masks:
            scores |= {f"mask_{name}": value for name, value in coco_ap(found, real, classes, size, "masks").items()}
        return scores

    def draw(self, split: Split, path: Path) -> None:
        """Draw images at even steps from the best found to the worst."""
        real = [truth(split, index, masks=False) for index in range(len(split))]
        found, least = sheet.best(self._find_all(split), real)
        qualities = [sheet.quality(one, objects) for one, objects in zip(found, real, strict=True)]
        examples = []
        for index in sheet.spread(qualities, DRAWN):
            masks = decode(found[index].masks or [], self.facts.size) if self.masks else None
            examples.append(sheet.Example(split.tensor(index) / 255, real[index], found[index], masks))
        caption = (
            f"Detections on {len(split):,} images, from the best found to the worst (mean {np.mean(qualities):.2f})"
        )
        note = f"Shown are as many as there are objects: scores from {least:.0%}."
        sheet.draw(examples, self.facts.classes, caption, note).save(path)

    def _normalise(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.compute.device), self.facts.mean, self.facts.std)

    def _find_all(self, split: Split) -> list[Found]:
        """Find objects in all images of a split; leaves the model in training mode."""
        height, width = self.facts.size
        found = []
        for indices in batched(range(len(split)), max(FEWEST, PIXELS // (height * width))):
            for one in self.find(torch.from_numpy(np.stack([split.images[index] for index in indices]))):
                runs = encode(one["masks"].cpu().numpy()) if self.masks else None
                boxes, scores, labels = (one[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
                found.append(Found(boxes, labels - 1, scores, runs))
        self.model.train()
        return found
