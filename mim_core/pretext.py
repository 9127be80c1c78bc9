"""Masked image modelling: hide patches, encode, predict what was there.

Letters in shapes, here and everywhere: b batch, n patches, d width, h w grid of patches, H W pixels, c channels, p
patch side in px, k values or classes a position, m predicted positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mim_core.data.order import Address
from mim_core.data.pack import Pack, Split
from mim_core.devices import Compute
from mim_core.masks import Grid, generator
from mim_core.transforms import Augment, normalise


class MaskedModel(nn.Module):
    """Encoder, fill and head: everything of a method that has parameters."""

    def __init__(self, encoder: Any, fill: Any, head: Any) -> None:
        super().__init__()
        self.encoder, self.fill, self.head = encoder, fill, head

    def forward(
        self, images: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b n"], wanted: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "m k"]:
        """Predict the wanted positions of images whose hidden patches the encoder does not see."""
        tokens = self.encoder.embed(self.fill.pixels(images, hidden))
        tokens, kept = self.fill.tokens(tokens, hidden)
        out: Tensor = self.head(self.encoder(tokens, kept), wanted)
        return out


@dataclass(frozen=True)
class Masked:
    """A batch: uint8 images [b, c, H, W] and their hidden patches [b, n]."""

    images: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class MaskedFetch:
    """Make a masked batch; picklable, so that loader workers can have it."""

    split: Split
    grid: Grid
    mask: Callable[[np.random.Generator, Grid], np.ndarray]
    augment: Augment | None
    seed: int

    def __call__(self, addresses: Sequence[Address]) -> Masked:
        images, hidden = [], []
        for epoch, index in addresses:
            image = self.split.tensor(index)
            if self.augment:
                image = self.augment(image, generator(self.seed, epoch, index, stream=1))
            images.append(image)
            hidden.append(self.mask(generator(self.seed, epoch, index), self.grid).reshape(-1))
        return Masked(torch.stack(images), torch.from_numpy(np.stack(hidden)))


class Pretext(nn.Module):
    """The objective of a masked model: its prediction against a target, over the hidden positions or all."""

    def __init__(
        self,
        model: MaskedModel,
        target: Any,
        loss: Callable[[Tensor, Tensor], Tensor],
        scope: str,
        pack: Pack,
        compute: Compute,
    ) -> None:
        super().__init__()
        self.model, self.target = model, target
        self.loss, self.scope, self.pack, self.compute = loss, scope, pack, compute

    def losses(self, batch: Masked) -> Iterator[tuple[str, Tensor]]:
        images = normalise(batch.images.to(self.compute.device), self.pack.mean, self.pack.std)
        hidden = batch.hidden.to(self.compute.device)
        wanted = hidden if self.scope == "hidden" else torch.ones_like(hidden)
        with self.compute.autocast():
            prediction = self.model(images, hidden, wanted)
        yield "model", self.loss(prediction.float(), self.target(images)[wanted])

    @torch.no_grad()
    def recover(self, batch: Masked) -> dict[str, Tensor]:
        """Predict every position; gives pictures in [0, 1]: originals, predictions, composites, and hidden pixels."""
        images = normalise(batch.images.to(self.compute.device), self.pack.mean, self.pack.std)
        hidden = batch.hidden.to(self.compute.device)
        with self.compute.autocast():
            prediction = self.model(images, hidden, torch.ones_like(hidden)).float()
        pictures = self.target.render(prediction.reshape(*hidden.shape, -1), images)
        originals = batch.images.to(self.compute.device).float() / 255
        grid = self.model.encoder.grid
        pixels = hidden.reshape(-1, *grid.shape)
        pixels = pixels.repeat_interleave(grid.patch_px, 1).repeat_interleave(grid.patch_px, 2)
        composites = torch.where(pixels[:, None], pictures, originals)
        return {"originals": originals, "predictions": pictures, "composites": composites, "hidden": pixels}
