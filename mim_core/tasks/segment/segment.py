"""Semantic segmentation: a class for each pixel, by fine-tuning the whole encoder with a head on its maps.

The protocols: SETR-PUP in BEiT's paper (section 3.2) and UPerNet with an auxiliary FCN in its code; FCN in the Context
Encoder's (section 5.2). What makes them differ is the head; the loss is cross-entropy over a batch's judged pixels. The
papers' training crops are drawn so that no class fills over three quarters of one; ours are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision import tv_tensors

from mim_core.data.order import Address
from mim_core.data.pack import NOT_JUDGED, Split, batched, semantic_map
from mim_core.devices import Compute
from mim_core.encoders.swin import Swin
from mim_core.masks import generators
from mim_core.metrics.segments import confusion, ious, mean_accuracy, miou, pixel_accuracy
from mim_core.spec import OneOf, Pair, Piece, build
from mim_core.tasks.segment import sheet
from mim_core.tasks.segment.heads import SEGMENT_HEADS
from mim_core.tasks.segment.heads.fcn import FCN
from mim_core.tasks.segment.heads.layers import resize
from mim_core.tasks.segment.windows import slide
from mim_core.tasks.task import Facts, Fetch
from mim_core.transforms import Augment, normalise

AT_ONCE = 2**26
"""Logits that are computed at once in evaluation."""
DRAWN = 12
"""Images that are drawn at most."""
Tap = PositiveInt


class Segmenter(nn.Module):
    """An encoder with a head on the maps of its pyramid.

    A Swin's maps go through a LayerNorm each, as in its code for segmentation, but the last, which comes normed. With
    `auxiliary` an FCN stands on the last map but one.
    """

    def __init__(
        self, encoder: Any, classes: int, head: Piece, taps: Sequence[int] | None = None, auxiliary: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.taps = encoder, taps
        levels = encoder.levels(taps)
        norms = [LayerNorm2d(level.width) if isinstance(encoder, Swin) else nn.Identity() for level in levels[:-1]]
        self.norms = nn.ModuleList([*norms, nn.Identity()])
        self.head = build(SEGMENT_HEADS, head, levels, classes)
        self.middle = max(0, len(levels) - 2)
        self.auxiliary = FCN([levels[self.middle]], classes) if auxiliary else None

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k H W"]:
        """Score each pixel by class, in fp32."""
        return self._scores(self.head, self._maps(images), images)

    def both(self, images: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b k H W"]]:
        """Give the head's scores and, where there is one, the auxiliary head's: what is trained."""
        maps = self._maps(images)
        out = [self._scores(self.head, maps, images)]
        if self.auxiliary is not None:
            out.append(self._scores(self.auxiliary, [maps[self.middle]], images))
        return out

    def _maps(self, images: Tensor) -> list[Tensor]:
        return [norm(each) for norm, each in zip(self.norms, self.encoder.pyramid(images, self.taps), strict=True)]

    def _scores(self, head: nn.Module, maps: list[Tensor], images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        return resize(head(maps, size).float(), size)


@dataclass(frozen=True)
class Mapped:
    """A batch: uint8 images [b, c, H, W] and semantic maps uint8 [b, H, W], 255 not judged."""

    images: Tensor
    maps: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class MappedFetch:
    """Make a batch of images and their maps, augmented together; picklable, so that loader workers can have it.

    `window` (height, width) in px: how much is cut out of each, at a place drawn at random; None leaves them whole.
    """

    split: Split
    augment: Augment | None
    seed: int
    window: tuple[int, int] | None = None

    def __call__(self, addresses: Sequence[Address]) -> Mapped:
        at = generators(self.seed, stream=1)
        pairs = [self._read(index, at(epoch, index)) for epoch, index in addresses]
        return Mapped(torch.stack([image for image, _ in pairs]), torch.stack([each for _, each in pairs]))

    def _read(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image = self.split.tensor(index)
        semantic: Tensor = tv_tensors.Mask(_map(self.split, index)[None])
        if self.augment:
            image, semantic = self.augment.jointly(rng, image, semantic)
        if self.window:
            (height, width), (whole_height, whole_width) = self.window, image.shape[-2:]
            top, left = int(rng.integers(whole_height - height + 1)), int(rng.integers(whole_width - width + 1))
            image, semantic = (one[..., top : top + height, left : left + width] for one in (image, semantic))
        return image, semantic.as_subclass(Tensor)[0]


class Segment:
    """Fine-tune for semantic maps.

    `taps`: blocks of a ViT, counted from 1, whose maps the head gets (BEiT's base model: 4, 6, 8, 12). `auxiliary`:
    weight of the loss of a further FCN on the last map but one (UPerNet in BEiT's code: 0.4). `window_px`: (height,
    width) of what the encoder sees at once, cut out at random in training; in evaluation such windows lie `stride_px`
    apart, two thirds of a window by default, and scores are averaged (BEiT's code: 640 and 426).
    """

    needs = ("semantic", "instances")
    score = "miou"
    trains = True

    def __init__(
        self,
        encoder: Any,
        facts: Facts,
        compute: Compute,
        *,
        head: Annotated[Piece, OneOf(SEGMENT_HEADS)],
        taps: Annotated[list[Tap], Field(min_length=1)] | None = None,
        auxiliary: Annotated[float, Field(ge=0)] = 0.0,
        window_px: Pair | None = None,
        stride_px: Pair | None = None,
    ) -> None:
        """Raises ValueError for windows that do not fit, and for a dataset without classes of pixels."""
        if not 1 < len(facts.segments) <= NOT_JUDGED:
            raise ValueError(
                f"name: found segment for a dataset with {len(facts.segments)} classes of pixels; it needs 2 to "
                f"{NOT_JUDGED}; choose a dataset with semantic maps or instances"
            )
        self.window = window_px
        self.stride = _stride(facts.size, (encoder.grid.height, encoder.grid.width), window_px, stride_px)
        self.model = Segmenter(encoder, len(facts.segments), head, taps, auxiliary > 0)
        self.facts, self.compute, self.auxiliary = facts, compute, auxiliary

    def labelled(self, split: Split) -> np.ndarray:
        if "semantic" not in split.names:
            return np.arange(len(split))
        maps = split.array("semantic")
        # A part of the rows tells it of nearly every image, and reads so much less.
        judged = [(each[::16] != NOT_JUDGED).any() or (each != NOT_JUDGED).any() for each in maps]
        return np.flatnonzero(judged)

    def fetch(self, split: Split, augment: Augment | None, seed: int) -> Fetch:
        return MappedFetch(split, augment, seed, self.window)

    def begin(self, images: Split, chosen: np.ndarray) -> None:
        pass

    def losses(self, batch: Mapped, step: int) -> Iterator[tuple[str, Tensor]]:
        with self.compute.autocast():
            scores = self.model.both(self._normalised(batch.images))
        maps = batch.maps.to(self.compute.device)
        loss, *others = (pixel_loss(logits, maps) for logits in scores)
        yield "model", loss + self.auxiliary * others[0] if others else loss

    def logits(self, images: Tensor) -> Float[Tensor, "b k H W"]:
        """Score each pixel of uint8 images [b, c, H, W] by class, in fp32; by windows where the task has them."""
        with self.compute.autocast():
            if self.window:
                return slide(self.model, self._normalised(images), self.window, self.stride)
            return self.model(self._normalised(images))  # type: ignore[no-any-return]

    def evaluate(self, split: Split) -> dict[str, float]:
        """Give mean IoU, accuracies and cross-entropy over the judged pixels of a split's labelled images."""
        counts, total = torch.zeros(len(self.facts.segments), len(self.facts.segments), dtype=torch.int64), 0.0
        for _, maps, logits in self._judge(split, self.labelled(split)):
            counts += self._counts(logits, maps)
            total += F.cross_entropy(logits, maps.long(), ignore_index=NOT_JUDGED, reduction="sum").item()
        if not counts.any():
            raise ValueError(f"{split.folder}: no pixel of its semantic maps is judged; give it maps of classes")
        return {
            "miou": miou(counts),
            "pixel_accuracy": pixel_accuracy(counts),
            "mean_accuracy": mean_accuracy(counts),
            "cross_entropy": total / int(counts.sum()),
        }

    def draw(self, split: Split, path: Path) -> None:
        """Draw images from the worst to the best, in equal steps of their rank by IoU, with true and predicted maps."""
        labelled = self.labelled(split)
        counts, found = torch.zeros(len(self.facts.segments), len(self.facts.segments), dtype=torch.int64), []
        for _, maps, logits in self._judge(split, labelled):
            each = [self._counts(*one) for one in zip(logits, maps, strict=True)]
            found += [miou(one) for one in each]
            counts += torch.stack(each).sum(0)
        ranked = np.argsort(np.array(found), kind="stable")
        chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, DRAWN).round().astype(int))]
        rows: list[sheet.Row] = []
        for images, maps, logits in self._judge(split, labelled[chosen]):
            for image, true, predicted in zip(images, maps, logits.argmax(1).cpu(), strict=True):
                rows.append(sheet.Row(image / 255, true, predicted, found[int(chosen[len(rows)])]))
        caption = f"{len(rows)} of {len(labelled):,} images, from the worst to the best in equal steps of their rank"
        note = f"IoU: mean over the classes of the image; in brackets a class's in all images, mIoU {miou(counts):.3f}"
        sheet.draw(rows, self.facts.segments, caption, note, ious(counts).tolist()).save(path)

    def predict(self, images: Tensor) -> list[dict[str, Any]]:
        maps = [self.logits(some).argmax(1).to(torch.uint8).cpu() for some in torch.split(images, self._at_once())]
        return [{"map": one} for one in torch.cat(maps).numpy()]

    def _at_once(self) -> int:
        """How many images are evaluated together."""
        height, width = self.facts.size
        return max(1, min(256, AT_ONCE // (len(self.facts.segments) * height * width)))

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.compute.device), self.facts.mean, self.facts.std)

    def _counts(self, logits: Tensor, maps: Tensor) -> Int[Tensor, "k k"]:
        """Count judged pixels by true and predicted class; `logits` are [k, H, W], or a batch of them."""
        return confusion(logits.argmax(-3), maps, len(self.facts.segments), NOT_JUDGED).cpu()

    @torch.no_grad()
    def _judge(self, split: Split, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give images on the CPU, and maps and logits on the device, batch by batch."""
        self.model.eval()
        for some in batched(map(int, indices), self._at_once()):
            images = torch.stack([split.tensor(index) for index in some])
            maps = torch.stack([_map(split, index) for index in some]).to(self.compute.device)
            yield images, maps, self.logits(images)
        self.model.train()


def pixel_loss(logits: Float[Tensor, "b k H W"], maps: Int[Tensor, "b H W"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the judged pixels of a batch; 0 where there is none."""
    total = F.cross_entropy(logits, maps.long(), ignore_index=NOT_JUDGED, reduction="sum")
    return total / (maps != NOT_JUDGED).sum().clamp(min=1)


def _map(split: Split, index: int) -> Tensor:
    return torch.from_numpy(semantic_map(split, index).astype(np.uint8))


def _stride(
    size: tuple[int, int], sees: tuple[int, int], window: tuple[int, int] | None, stride: tuple[int, int] | None
) -> tuple[int, int]:
    """Check windows against images of `size` and an encoder that sees `sees`, all (height, width) in px; gives their
    step."""
    if window is None:
        if stride:
            raise ValueError(f"stride_px: found {list(stride)} without window_px; give both, or delete it")
        return size
    if any(part > whole for part, whole in zip(window, size, strict=True)):
        raise ValueError(f"window_px: found {list(window)}; images are {list(size)} px; choose windows within them")
    if window != sees:
        raise ValueError(f"window_px: found {list(window)}; the encoder is built for {list(sees)} px; make them equal")
    stride = stride or (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
    if any(step > part for step, part in zip(stride, window, strict=True)):
        raise ValueError(
            f"stride_px: found {list(stride)}; windows are {list(window)} px and must leave no gap; lower it"
        )
    return stride
