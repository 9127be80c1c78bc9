"""The order of batches, as a pure function of the step, and the one loader of every stage."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mim_core.data.pack import Split
from mim_core.masks import generator, generators
from mim_core.transforms import Augment, Crop, placed

Address = tuple[int, int]
"""(epoch, index of the image): what a sample's random draws are addressed by."""


@dataclass(frozen=True)
class Order(Sampler[list[Address]]):
    """Batches of addresses from step `start` to step `steps`; each epoch has its own permutation.

    The incomplete batch at an epoch's end is left out, as in the papers' code. Of `ranks` ranks, `rank` gets its share
    of each batch: together they see what one alone would.
    """

    indices: np.ndarray
    batch: int
    seed: int
    start: int
    steps: int
    rank: int = 0
    ranks: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.indices) // self.batch)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Address]]:
        shuffled: tuple[int, np.ndarray] | None = None
        for step in range(self.start, self.steps):
            epoch, at = divmod(step, self.steps_per_epoch)
            if shuffled is None or shuffled[0] != epoch:
                shuffled = epoch, generator(self.seed, epoch, 0, stream=2).permutation(self.indices)
            for_step = shuffled[1][at * self.batch : (at + 1) * self.batch]
            yield [(epoch, int(index)) for index in for_step[self.rank :: self.ranks]]


def read_images(
    split: Split, addresses: Sequence[Address], augment: Augment | None, seed: int
) -> UInt8[Tensor, "b c H W"]:
    """Read a batch's images, each augmented by its own generator."""
    images = split.tensors([index for _, index in addresses])
    if augment and augment.only_places:
        # All is drawn first: in turns with the resizing either would find the other's code in the processor's caches.
        size = images.shape[-2:]
        for image, crop in zip(images, placings(augment, addresses, seed, *size), strict=True):
            image.copy_(placed(image, crop))
    elif augment:
        at = generators(seed, stream=1)
        for image, address in zip(images, addresses, strict=True):
            image.copy_(augment(image, at(*address)))
    return images


def placings(augment: Augment, addresses: Sequence[Address], seed: int, height: int, width: int) -> list[Crop]:
    """Draw how each of a batch's images is cropped and flipped."""
    at = generators(seed, stream=1)
    return [augment.placing(at(*address), height, width) for address in addresses]


class Fetched(Dataset[Any]):
    """A dataset that makes a whole batch from its addresses at once."""

    def __init__(self, fetch: Callable[[Sequence[Address]], Any]) -> None:
        self.fetch = fetch

    def __getitem__(self, address: Address) -> Any:
        return self.fetch([address])

    def __getitems__(self, addresses: Sequence[Address]) -> Any:
        return self.fetch(addresses)


def loader(
    fetch: Callable[[Sequence[Address]], Any], order: Order, workers: int = 0, pinned: bool = False
) -> DataLoader[Any]:
    """Load batches in order; `pinned` has them where a GPU can copy from.

    Workers come from a fork server: forked children of a process that runs orchestrator threads die at the epoch's end.
    """
    return DataLoader(
        Fetched(fetch),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_same,
        multiprocessing_context=_server(fetch) if workers else None,
        pin_memory=pinned,
    )


def _server(fetch: Any) -> Any:
    server = multiprocessing.get_context("forkserver")
    # Workers begin with what they need, rather than each to import torch for itself.
    server.set_forkserver_preload([type(fetch).__module__])
    return server


def _same(batch: Any) -> Any:
    return batch
