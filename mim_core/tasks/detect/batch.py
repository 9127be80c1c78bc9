"""Batches for detection: images with the objects on them, augmented together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from mim_core.data.order import Address
from mim_core.data.pack import CROWD, DIFFICULT, Split
from mim_core.masks import generators
from mim_core.metrics.boxes import Truth, encode
from mim_core.transforms import Augment

SIDE_PX = 1.0
"""Side in px below which a box that a crop cut is dropped."""


@dataclass(frozen=True)
class Boxed:
    """A batch: uint8 images [b, c, H, W] and for each its boxes [m, 4] in px, labels [m] (class + 1) and, where they
    are wanted, masks uint8 [m, H, W]."""

    images: Tensor
    targets: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class BoxedFetch:
    """Make a batch to learn from; picklable, so that loader workers can have it.

    Difficult objects and crowds are left out, as they are in training for VOC and COCO. A box that the crop cuts is
    clipped; it goes where less than `visible` of its area is left, or no px of a side, or nothing of its mask.
    """

    split: Split
    augment: Augment | None
    seed: int
    masks: bool
    visible: float

    def __call__(self, addresses: Sequence[Address]) -> Boxed:
        at = generators(self.seed, stream=1)
        read = (self._read(index, at(epoch, index)) for epoch, index in addresses)
        images, targets = zip(*read, strict=True)
        return Boxed(torch.stack(images), list(targets))

    def _read(self, index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.split.tensor(index)
        rows, flags = self.split.objects(index)
        learned = np.flatnonzero(flags & (DIFFICULT | CROWD) == 0)
        size = (image.shape[-2], image.shape[-1])
        # Unclipped, so that it can be told how much of a box is left.
        boxes = torch.from_numpy(np.array(rows[learned, :4]))
        beside: list[Tensor] = [tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, clamping_mode=None)]
        if self.masks:
            # As numbers of 32 bits, since torch cannot resize unsigned ones of 16.
            beside.append(tv_tensors.Mask(torch.from_numpy(self.split.array("instances")[index].astype(np.int32))))
        if self.augment:
            image, *beside = self.augment.jointly(rng, image, *beside)
        whole = beside[0].as_subclass(Tensor)
        left = torch.minimum(whole.clamp(min=0), whole.new_tensor([size[1], size[0]] * 2))
        sides = left[:, 2:] - left[:, :2]
        stays = (sides >= SIDE_PX).all(1) & (sides.prod(1) >= self.visible * (whole[:, 2:] - whole[:, :2]).prod(1))
        target = {"labels": torch.from_numpy(rows[learned, 4].astype(np.int64)) + 1, "boxes": left}
        if self.masks:
            numbers = torch.from_numpy(learned + 1)[:, None, None]
            target["masks"] = (beside[1].as_subclass(Tensor) == numbers).to(torch.uint8)
            stays &= target["masks"].flatten(1).amax(1) > 0
        return image, {name: one[stays] for name, one in target.items()}


def truth(split: Split, index: int, masks: bool) -> Truth:
    """Read what is to be found in an image."""
    rows, flags = split.objects(index)
    runs = None
    if masks:
        numbers = np.arange(1, len(rows) + 1)[:, None, None]
        runs = encode(split.array("instances")[index] == numbers)
    difficult, crowd = flags & DIFFICULT > 0, flags & CROWD > 0
    return Truth(np.array(rows[:, :4]), rows[:, 4].astype(np.int64), difficult, crowd, runs)
