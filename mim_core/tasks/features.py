"""Features of a frozen encoder: which blocks are tapped, how an image's are pooled, and reading those of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from mim_core.data.pack import Split, batched
from mim_core.devices import Compute
from mim_core.tasks.classify import need_class_token
from mim_core.tasks.task import Facts
from mim_core.transforms import normalise

BATCH = 256
"""Images that are read at once."""
Pooling = Literal["mean", "class", "both"]
"""Mean of the patches; the class token; the class token's and the mean, one after the other."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def _several(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (int, float, str)) else value


Blocks = Annotated[tuple[int, ...], Field(min_length=1), BeforeValidator(_several)]
"""Blocks counted from 1, or from the end: -1 is the last. YAML writes a list, or one."""
Poolings = Annotated[tuple[Pooling, ...], Field(min_length=1), BeforeValidator(_several)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1), BeforeValidator(_several)]


@dataclass(frozen=True)
class Tap:
    """Where features are taken: after a block, counted from 1, and how they are pooled; `width` numbers an image."""

    block: int
    pooling: Pooling
    width: int

    def __str__(self) -> str:
        return f"block_{self.block}_{self.pooling}"


def taps(encoder: Any, blocks: Sequence[int], poolings: Sequence[Pooling]) -> list[Tap]:
    """Give every block's features in every pooling.

    Raises ValueError for a block that is not there or stands twice, and for a class token that is not there.
    """
    depth = len(encoder.block_widths)
    found = []
    for block in blocks:
        counted = block if block > 0 else depth + 1 + block
        if not 1 <= counted <= depth or block == 0:
            raise ValueError(
                f"blocks: found {block}; the encoder's are 1 to {depth}, or -{depth} to -1 from the end; choose of them"
            )
        found.append(counted)
    both: tuple[tuple[str, list[Any]], ...] = (("blocks", found), ("pooling", list(poolings)))
    for name, several in both:
        twice = [one for one in several if several.count(one) > 1]
        if twice:
            raise ValueError(f"{name}: found {twice[0]} twice; each is tried once; delete one")
    if set(poolings) - {"mean"}:
        need_class_token(encoder)
    widths = encoder.block_widths
    return [
        Tap(block, pooling, widths[block - 1] * (2 if pooling == "both" else 1))
        for block in found
        for pooling in poolings
    ]


class Frozen(nn.Module):
    """An encoder that never trains: its parameters take no gradient and it stays in evaluation mode."""

    chosen: Tensor
    """Which tap (of a probe, which head) is best on validation images: kept with the weights."""

    def __init__(self, encoder: Any, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.taps = tuple(taps)
        self.register_buffer("chosen", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b d"]]:
        """Give each tap's features of normalised images, in fp32; the last block's are after the final norm."""
        blocks = self.encoder.blocks(images)
        return [_pooled(blocks[tap.block - 1], tap.pooling) for tap in self.taps]


def _pooled(given: tuple[Float[Tensor, "b n d"], Float[Tensor, "b p d"]], pooling: Pooling) -> Tensor:
    features, summary = given
    mean = features.float().mean(1)
    if pooling == "mean":
        return mean
    token = summary[:, 0].float()
    return token if pooling == "class" else torch.cat([token, mean], 1)


class Reader:
    """Reads the features of a split's images, once: arrays of float32 [n, d], a tap each, in the machine's memory."""

    def __init__(self, model: Frozen, facts: Facts, compute: Compute) -> None:
        self.model, self.facts, self.compute = model, facts, compute
        self.known: dict[tuple[Path, int], list[Tensor]] = {}

    def of(self, images: Tensor) -> list[Tensor]:
        """Give the features of uint8 images [b, c, H, W], on the device."""
        with self.compute.autocast():
            return self.model.features(normalise(images.to(self.compute.device), self.facts.mean, self.facts.std))

    def read(self, split: Split, indices: np.ndarray) -> list[Tensor]:
        """Give the features of images at `indices`; the encoder is frozen, so they are kept for the next time."""
        key = (split.folder, hash(indices.tobytes()))
        if key not in self.known:
            arrays = [torch.empty(len(indices), tap.width) for tap in self.model.taps]
            done = 0
            for some in batched(map(int, indices), BATCH):
                images = torch.from_numpy(np.stack([split.images[index] for index in some]))
                for array, found in zip(arrays, self.of(images), strict=True):
                    array[done : done + len(some)] = found.cpu()
                done += len(some)
            self.known[key] = arrays
        return self.known[key]


def said(tap: Tap) -> dict[str, float]:
    """Name a tap among metrics, which are numbers: its block, and its pooling's place in POOLINGS."""
    return {"block": float(tap.block), "pooling": float(POOLINGS.index(tap.pooling))}
