"""How an image is cut: into patches where masks hide, into positions where heads predict.

Letters in shapes, here and everywhere: b batch, n patches, d width, h w grid, H W pixels, c channels, k entries or
values a position, m predicted positions of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_CELLS = 2**20
"""Of an image: what masks, positions and relations between them are computed for."""


@dataclass(frozen=True)
class Grid:
    """Square cells of an image: `height` x `width` px in cells of `patch_px` px a side."""

    height: int
    width: int
    patch_px: int

    def __post_init__(self) -> None:
        if self.height * self.width > MOST_CELLS * self.patch_px**2:
            raise ValueError(
                f"image: found {self.height} x {self.width} px in cells of {self.patch_px} px; an image may have "
                f"{MOST_CELLS:,} at most; take a larger patch_px or a smaller size_px"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side % self.patch_px:
                raise ValueError(
                    f"image {name}: found {side} px; it must be a multiple of the encoder's patch_px {self.patch_px}; "
                    f"try {side // self.patch_px * self.patch_px or self.patch_px}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Cells down and across."""
        return self.height // self.patch_px, self.width // self.patch_px

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def pixels(self, hidden: Bool[Tensor, "b n"]) -> Bool[Tensor, "b H W"]:
        """Give the pixels of the cells that are hidden."""
        cells = hidden.reshape(-1, *self.shape)
        return cells.repeat_interleave(self.patch_px, 1).repeat_interleave(self.patch_px, 2)


@dataclass(frozen=True)
class Level:
    """A map of an encoder's pyramid: its channels, and the px of the image from one of its cells to the next."""

    width: int
    stride: int


def no_taps(taps: Sequence[int] | None, encoder: str) -> None:
    """Raise ValueError where blocks are chosen of an encoder whose pyramid is given by its architecture."""
    if taps:
        raise ValueError(
            f"taps: found {list(taps)}; only a ViT's blocks can be chosen; a {encoder} has stages; delete it"
        )


@dataclass(frozen=True)
class Entries:
    """What a target holds at one position: `depth` entries in each of `side` x `side` parts of the position's cell.

    An entry is a number where `classes` is 0, else one of so many classes. Entries are in the order (depth, row,
    column), and a head's values in the order (depth, class, row, column): pixel shuffle's order, so that values of all
    positions can be laid out as one map.
    """

    depth: int
    side: int
    classes: int = 0

    @property
    def count(self) -> int:
        """Entries a position."""
        return self.depth * self.side**2

    @property
    def maps(self) -> int:
        """Channels of the values when laid out as one map."""
        return self.depth * max(1, self.classes)

    @property
    def values(self) -> int:
        """Values that a head gives a position."""
        return self.maps * self.side**2

    def logits(self, values: Float[Tensor, "... v"]) -> Float[Tensor, "... depth classes parts"]:
        """Order a head's values by entry, with the classes of an entry in the dimension before the last."""
        return values.reshape(*values.shape[:-1], self.depth, self.classes, self.side**2)


Wanted = Bool[Tensor, "b p"] | Int[Tensor, "b r"] | None
"""Positions of a batch: a mask, or the indices of each image's where all have equally many, or None, which is all."""


def rows_of(mask: Bool[Tensor, "b p"]) -> Wanted:
    """Give a mask as indices in order (or as None) where every image has equally many, else as it is.

    What shape comes out then depends on no value, so that a GPU need not be waited for where the mask is on the CPU.
    """
    fewest, most = (int(count) for count in mask.sum(1).aminmax())
    if fewest != most:
        return mask
    return None if most == mask.shape[1] else mask.nonzero()[:, 1].view(len(mask), most)


def rows_at(mask: Bool[Tensor, "b p"], count: int) -> Int[Tensor, "b m"]:
    """Give a mask as indices in order where every image is known to have `count`: no value is read for that."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def chosen(values: Float[Tensor, "b p ..."], wanted: Wanted) -> Float[Tensor, "m ..."]:
    """Take the wanted positions of all images, one after the other."""
    if wanted is None:
        return values.flatten(0, 1)
    if wanted.dtype == torch.bool:
        return values[wanted]
    return values.flatten(0, 1).index_select(0, _flat(wanted, values.shape[1]))


def replaced(values: Float[Tensor, "b p k"], wanted: Wanted, by: Float[Tensor, "m k"]) -> Float[Tensor, "b p k"]:
    """Put others in place of the wanted positions' values: what `chosen` takes out."""
    if wanted is None:
        return by.reshape(values.shape)
    flat = values.flatten(0, 1)
    rows = wanted.flatten().nonzero().flatten() if wanted.dtype == torch.bool else _flat(wanted, values.shape[1])
    return flat.index_copy(0, rows, by).view(values.shape)


def _flat(wanted: Int[Tensor, "b r"], positions: int) -> Int[Tensor, " m"]:
    first = torch.arange(len(wanted), device=wanted.device)[:, None] * positions
    return (wanted + first).flatten()


def patchify(images: Float[Tensor, "b c H W"], patch_px: int) -> Float[Tensor, "b n k"]:
    """Cut images into patches; k runs over (channel, row, column), pixel shuffle's order (SimMIM's, not MAE's)."""
    b, c, height, width = images.shape
    p = patch_px
    cut = images.reshape(b, c, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)


def unpatchify(patches: Float[Tensor, "b n k"], shape: tuple[int, int], side: int) -> Float[Tensor, "b c H W"]:
    """Put patches of `side` x `side` back on a grid of `shape`: the inverse of `patchify`."""
    b, (h, w) = len(patches), shape
    cut = patches.reshape(b, h, w, -1, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h * side, w * side)


def resize(maps: Float[Tensor, "b k h w"], shape: tuple[int, int]) -> Float[Tensor, "b k h2 w2"]:
    """Take each map's mean over the cells of a coarser grid, or repeat it on a finer one."""
    if maps.shape[-2:] == shape:
        return maps
    return F.adaptive_avg_pool2d(maps, shape)


def entries_hidden(
    hidden: Bool[Tensor, "b n"], masked: Grid, positions: Grid, entries: Entries
) -> Bool[Tensor, "b m k"]:
    """Tell which entries of each position are hidden: those with half of their part of the image or more.

    `masked` is the grid of the mask, `positions` that of the predictions (coarser in a Swin).
    """
    shape = (positions.shape[0] * entries.side, positions.shape[1] * entries.side)
    parts = resize(hidden.reshape(-1, 1, *masked.shape).float(), shape) >= 0.5
    return patchify(parts, entries.side).repeat(1, 1, entries.depth)


def near(hidden: Bool[Tensor, "b n"], grid: Grid, reach_px: int) -> Bool[Tensor, "b n"]:
    """Grow the hidden part by `reach_px` px (whole cells) in all directions."""
    reach = reach_px // grid.patch_px
    if reach < 1:
        return hidden
    grown: Tensor = F.max_pool2d(hidden.reshape(-1, 1, *grid.shape).float(), 2 * reach + 1, stride=1, padding=reach)
    return grown.reshape(hidden.shape).to(torch.bool)
