"""The picture of reconstructions: input, masked, prediction, composite, a row an image, with hole-only PSNR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mim_core.metrics.pictures import hole_psnr

COLUMNS = ("input", "masked", "prediction", "composite")
GREY = 0.55
INK, PAPER = (34, 34, 34), (255, 255, 255)
GAP, TOP = 4, 54
"""Px between tiles, and above the first row of them: a caption and the names of columns."""


@dataclass(frozen=True)
class Cell:
    """The size in px of a tile: a whole multiple of the images'."""

    height: int
    width: int

    @classmethod
    def of(cls, images: Tensor, tile: int) -> Cell:
        """Give the tiles of images [b, c, H, W] that are nearest to `tile` px wide."""
        height, width = images.shape[-2:]
        scale = max(1, round(tile / width))
        return cls(height * scale, width * scale)


class Sheet:
    """A page of tiles below a caption, with a note at the foot; with `fit` no narrower than either."""

    def __init__(self, width: int, height: int, caption: str, note: str = "", fit: bool = False) -> None:
        """`height` is without the foot."""
        font, self.small = ImageFont.load_default(15), ImageFont.load_default(12)
        if fit:
            width = max(width, 20 + round(font.getlength(caption)), 20 + round(self.small.getlength(note)))
        self.image = Image.new("RGB", (width, height + (26 if note else 8)), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.pen.text((10, 8), caption, INK, font)
        if note:
            self.say(note, 10, self.image.height - 20)

    def say(self, text: str, left: int, top: int) -> None:
        self.pen.text((left, top), text, INK, self.small)

    def paste(self, image: Tensor, left: int, top: int, cell: Cell) -> None:
        """Put one picture [c, H, W] in [0, 1] at a place."""
        self.image.paste(to_image(image).resize((cell.width, cell.height), Image.Resampling.NEAREST), (left, top))


def draw(pictures: Mapping[str, Tensor], caption: str, note: str = "", tile: int = 112, across: int = 2) -> Image.Image:
    """Lay pictures out, `across` groups of four columns side by side.

    `pictures` holds originals, predictions and composites [b, c, H, W] in [0, 1] and hidden [b, H, W]; `note` stands
    at the foot. Tiles are about `tile` px wide, whole multiples of small images.
    """
    originals, hidden = pictures["originals"], pictures["hidden"]
    columns = (originals, _masked(pictures), pictures["predictions"], pictures["composites"])
    label, rows = 20, -(-len(originals) // across)
    cell = Cell.of(originals, tile)
    group = 4 * (cell.width + GAP) + 16
    sheet = Sheet(across * group + 8, TOP + rows * (cell.height + label), caption, note)
    for index in range(len(originals)):
        row, side = index % rows, index // rows
        left, top = 10 + side * group, TOP + row * (cell.height + label)
        for column, images in enumerate(columns):
            at = left + column * (cell.width + GAP)
            if row == 0:
                sheet.say(COLUMNS[column], at, 34)
            sheet.paste(images[index], at, top, cell)
        one = slice(index, index + 1)
        psnr = hole_psnr(pictures["composites"][one], originals[one], hidden[one])
        sheet.say(f"hole PSNR {psnr:.1f} dB", left, top + cell.height + 2)
    return sheet.image


def draw_recoveries(
    kinds: Mapping[str, Mapping[str, Tensor]], caption: str, note: str = "", tile: int = 96
) -> Image.Image:
    """Lay out how images were recovered under several kinds of mask: an image a row, masked and recovered a kind.

    `kinds` maps a mask's name to pictures as `draw` takes them, of the same images in the same order.
    """
    first = next(iter(kinds.values()))["originals"]
    cell, aside, head = Cell.of(first, tile), 12, 52
    first_group, group = cell.width + GAP + aside, 2 * (cell.width + GAP) + aside
    size = (10 + first_group + len(kinds) * group, head + len(first) * (cell.height + GAP))
    sheet = Sheet(*size, caption, note)

    def paste(images: Tensor, left: int) -> None:
        for row, image in enumerate(images):
            sheet.paste(image, left, head + row * (cell.height + GAP), cell)

    sheet.say("original", 10, 34)
    paste(first, 10)
    for order, (kind, pictures) in enumerate(kinds.items()):
        left = 10 + first_group + order * group
        sheet.say(f"{kind.replace('_', ' ')}: masked, recovered", left, 34)
        paste(_masked(pictures), left)
        paste(pictures["composites"], left + cell.width + GAP)
    return sheet.image


def _masked(pictures: Mapping[str, Tensor]) -> Tensor:
    """Grey out what is hidden."""
    hidden = pictures["hidden"][:, None]
    return pictures["originals"] * ~hidden + GREY * hidden


def to_image(image: Tensor) -> Image.Image:
    """Turn one picture [c, H, W] in [0, 1] into an RGB image; one channel is grey, further ones are left out."""
    array = (image.detach().cpu().float().clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    shown = array[:3] if len(array) >= 3 else array[:1].repeat(3, 0)
    return Image.fromarray(shown.transpose(1, 2, 0))
