"""A page of images with their true and predicted maps, and a legend of the classes that are on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mim_core.data.pack import NOT_JUDGED
from mim_core.gallery import GAP, INK, TOP, Cell, Sheet
from mim_core.tasks.segment.palette import BACKGROUND, UNJUDGED, Colour, palette

COLUMNS = ("image", "true", "predicted")
TILE, LABEL, LINE, SWATCH = 96, 20, 20, 12
"""Px: a tile's width, the text below one, a line of the legend, a colour in it."""
EDGE = (150, 150, 150)
"""Of tiles: what is not judged is white, as is the page."""


@dataclass(frozen=True)
class Row:
    """An image [c, H, W] in [0, 1], its true map (255 not judged) and predicted one [H, W], and its IoU."""

    image: Tensor
    true: Tensor
    predicted: Tensor
    iou: float


def draw(
    rows: Sequence[Row],
    names: Sequence[str],
    caption: str,
    note: str = "",
    ious: Sequence[float] | None = None,
    across: int = 3,
) -> Image.Image:
    """Lay images out, `across` groups of three tiles side by side.

    `names` are those of the maps' values, `ious` what the legend says of each (NaN: nothing). Colours go to the classes
    on the page, the most frequent first, so that a page of few classes has colours that lie far apart. The first class
    is drawn as background where it has that name.
    """
    colours = legend(rows, names)
    cell = _cell(rows[0].image)
    across = min(across, len(rows))
    group = 3 * (cell.width + GAP) + 16
    foot = TOP + -(-len(rows) // across) * (cell.height + LABEL)
    page = Sheet(across * group + 8, foot, caption, note, fit=True)
    entries = [(_entry(value, names, ious), colours[value]) for value in sorted(colours)]
    column = 3 * SWATCH + max(round(page.small.getlength(name)) for name, _ in entries)
    columns = max(1, (page.image.width - 20) // column)
    page = Sheet(page.image.width, foot + 6 + -(-len(entries) // columns) * LINE, caption, note)
    for index, row in enumerate(rows):
        left, top = 10 + index % across * group, TOP + index // across * (cell.height + LABEL)
        for at, picture in enumerate((row.image, _paint(row.true, colours), _paint(row.predicted, colours))):
            place = left + at * (cell.width + GAP)
            if index < across:
                page.say(COLUMNS[at], place, 34)
            page.paste(_shrink(picture, cell), place, top, cell)
            page.pen.rectangle((place - 1, top - 1, place + cell.width, top + cell.height), outline=EDGE)
        page.say(f"IoU {row.iou:.2f}", left + 2 * (cell.width + GAP), top + cell.height + 2)
    for index, (name, colour) in enumerate(entries):
        left, top = 10 + index % columns * column, foot + 6 + index // columns * LINE
        page.pen.rectangle((left, top, left + SWATCH, top + SWATCH), colour, INK)
        page.say(name, left + SWATCH + 5, top - 1)
    return page.image


def legend(rows: Sequence[Row], names: Sequence[str]) -> dict[int, Colour]:
    """Give a colour to each value of the maps that are shown."""
    shown: Counter[int] = Counter()
    for row in rows:
        for values in (row.true, row.predicted):
            times = torch.bincount(values.flatten().cpu().long()).tolist()
            shown.update({value: count for value, count in enumerate(times) if count})
    fixed = {NOT_JUDGED: UNJUDGED} | ({0: BACKGROUND} if names[0].lower() == "background" else {})
    classes = [value for value, _ in shown.most_common() if value not in fixed]
    given = dict(zip(classes, palette(len(classes)), strict=True))
    return {value: given.get(value) or fixed[value] for value in shown}


def _entry(value: int, names: Sequence[str], ious: Sequence[float] | None) -> str:
    if value == NOT_JUDGED:
        return "not judged"
    return names[value] if ious is None or math.isnan(ious[value]) else f"{names[value]} ({ious[value]:.2f})"


def _paint(values: Int[Tensor, "H W"], colours: Mapping[int, Colour]) -> Float[Tensor, "3 H W"]:
    table = torch.zeros(256, 3)
    for value, colour in colours.items():
        table[value] = torch.tensor(colour) / 255
    return table[values.cpu().long()].permute(2, 0, 1)


def _cell(image: Tensor) -> Cell:
    """Give the tiles: a whole multiple of small images, about TILE px of large ones."""
    height, width = image.shape[-2:]
    return Cell.of(image[None], TILE) if width <= TILE else Cell(max(1, round(height * TILE / width)), TILE)


def _shrink(picture: Tensor, cell: Cell) -> Tensor:
    """Make a picture that is larger than its tile smaller, smoothly."""
    if picture.shape[-1] <= cell.width:
        return picture
    return F.interpolate(picture[None], (cell.height, cell.width), mode="bilinear", antialias=True)[0]
