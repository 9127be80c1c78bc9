"""The picture of a classifier's answers: what is taken for what, or each class's precision; and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mim_core.data.pack import Split
from mim_core.gallery import GAP, INK, PAPER, Cell, Sheet
from mim_core.metrics import classes

MISTAKES, ACROSS = 24, 6
"""Mistakes that are drawn at most, and in a row."""
SHOWN = 16
"""Classes that are drawn at most."""
TILE, CELL, NAME, TOP = 96, 30, 120, 64
"""Px: about a mistake's width, a matrix cell's side, a class name's length at most, above the panels."""
BLUE = (33, 84, 148)


@dataclass(frozen=True)
class Mistake:
    """An image by its index in the split, with two lines of text: what it is, what it was taken for."""

    index: int
    is_: str
    taken: str


def draw_classes(
    split: Split, indices: np.ndarray, logits: Float[Tensor, "n k"], labels: Tensor, names: Sequence[str], path: Path
) -> None:
    """Draw answers of one class an image: `labels` are class numbers [n] of the images at `indices`."""
    taken, shares = logits.argmax(-1), logits.softmax(-1)
    order = shares.gather(1, labels[:, None]).squeeze(1).argsort(stable=True)
    worst = [int(at) for at in order if taken[at] != labels[at]]
    mistakes = [
        Mistake(
            int(indices[at]),
            names[int(labels[at])],
            f"taken for {names[int(taken[at])]}, {shares[at, taken[at]].item():.0%}",
        )
        for at in worst[:MISTAKES]
    ]
    matrix = classes.confusion(taken, labels, len(names))
    caption = f"{1 - len(worst) / len(labels):.1%} of {len(labels):,} images are right"
    title = "Of each class's images, % taken for each class"
    if len(names) > SHOWN:
        title = f"The {SHOWN} of {len(names):,} classes that are confused most: % taken for each (-: no image)"
    draw(split, mistakes, _matrix_panel(matrix, names), caption, title, path)


def draw_presence(
    split: Split,
    indices: np.ndarray,
    logits: Float[Tensor, "n k"],
    presence: Int[Tensor, "n k"],
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw answers of which classes are present: each class's average precision, and the surest wrong answers."""
    mean, each = classes.presence_map(logits, presence)
    wrong = logits.sigmoid().where(presence == 0, 1 - logits.sigmoid()).where(presence >= 0, 0.0)
    sureness, at_class = wrong.max(1)
    mistakes = []
    for at in sureness.argsort(descending=True, stable=True)[:MISTAKES]:
        name, there = names[int(at_class[at])], bool(presence[at, at_class[at]])
        if sureness[at] > 0.5:
            chance = logits[at, at_class[at]].sigmoid().item()
            mistakes.append(Mistake(int(indices[at]), name if there else f"no {name}", f"{name}: {chance:.0%}"))
    caption = f"VOC 2007's mean average precision {mean:.1%} over {len(presence):,} images"
    title = "Average precision by class, %"
    if len(names) > SHOWN:
        title = f"The {SHOWN} of {len(names):,} classes of least average precision, %"
    draw(split, mistakes, _bars_panel(each, names), caption, title, path)


def draw(split: Split, mistakes: Sequence[Mistake], panel: Image.Image, caption: str, title: str, path: Path) -> None:
    """Save a panel with its title, and the mistakes beside it."""
    images = [split.tensor(one.index) / 255 for one in mistakes]
    cell = Cell.of(images[0][None], TILE) if images else Cell(0, TILE)
    wide = max(cell.width, TILE)
    titled = round(ImageFont.load_default(12).getlength(title))
    rows, left = -(-len(images) // ACROSS), max(panel.width, titled) + 40
    height = TOP + max(panel.height, rows * (cell.height + 36))
    sheet = Sheet(left + ACROSS * (wide + 2 * GAP) + 10, height, caption, fit=True)
    sheet.say(title, 10, 38)
    sheet.image.paste(panel, (10, TOP))
    sheet.say("Worst mistakes: what it is, and what it was taken for" if images else "No mistakes", left, 38)
    for at, (mistake, image) in enumerate(zip(mistakes, images, strict=True)):
        row, column = divmod(at, ACROSS)
        x, y = left + column * (wide + 2 * GAP), TOP + row * (cell.height + 36)
        sheet.paste(image, x, y, cell)
        for line, text in enumerate((mistake.is_, mistake.taken)):
            sheet.say(_cut(text, wide, sheet.small), x, y + cell.height + 1 + 15 * line)
    sheet.image.save(path)


def most_confused(matrix: Int[np.ndarray, "k k"], count: int) -> np.ndarray:
    """Choose classes, ascending: those of the pairs that are confused in the largest share of a class's images."""
    shares = _shares(matrix)
    np.fill_diagonal(shares, -1)
    chosen: dict[int, None] = {}
    for flat in np.argsort(-shares, axis=None, kind="stable"):
        for one in divmod(int(flat), len(matrix)):
            if len(chosen) < count:
                chosen[one] = None
        if len(chosen) == count:
            break
    return np.array(sorted(chosen))


def _shares(matrix: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """Row by row; a class without images has a row of zeros."""
    shares: np.ndarray = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return shares


def _matrix_panel(matrix: Int[np.ndarray, "k k"], names: Sequence[str]) -> Image.Image:
    shown: list[int] = most_confused(matrix, SHOWN).tolist() if len(names) > SHOWN else list(range(len(names)))
    shares, counts, font = _shares(matrix), matrix.sum(1), ImageFont.load_default(12)
    said = [_cut(names[at], NAME, font) for at in shown]
    aside = 8 + round(max(font.getlength(text) for text in said))
    panel = Image.new("RGB", (aside + len(shown) * CELL + 1, aside + len(shown) * CELL + 1), PAPER)
    pen = ImageDraw.Draw(panel)
    upright = Image.new("RGB", (panel.height, panel.width), PAPER)
    beside = ImageDraw.Draw(upright)
    for place, text in enumerate(said):
        middle = aside + place * CELL + CELL // 2
        pen.text((aside - 6, middle), text, INK, font, anchor="rm")
        # On its side, read from the bottom: rotated below, so that long names fit their column.
        beside.text((panel.height - aside + 6, middle), text, INK, font, anchor="lm")
    panel.paste(upright.rotate(90, expand=True).crop((aside, 0, panel.width, aside)), (aside, 0))
    for row, own in enumerate(shown):
        for column, other in enumerate(shown):
            share = shares[own, other]
            left, top = aside + column * CELL, aside + row * CELL
            shade = tuple(round(white + share * (blue - white)) for white, blue in zip(PAPER, BLUE, strict=True))
            pen.rectangle((left, top, left + CELL, top + CELL), fill=shade, outline=(225, 225, 225))
            number = "-" if counts[own] == 0 else f"{100 * share:.0f}"
            if counts[own] == 0 or matrix[own, other]:
                pen.text((left + CELL / 2, top + CELL / 2), number, PAPER if share > 0.5 else INK, font, anchor="mm")
    return panel


def _bars_panel(values: Sequence[float], names: Sequence[str]) -> Image.Image:
    """Bars of the classes that occur, the least first where not all are shown."""
    known = [at for at, value in enumerate(values) if value == value]
    if len(known) > SHOWN:
        known = sorted(known, key=lambda at: values[at])[:SHOWN]
    font = ImageFont.load_default(12)
    said = [_cut(names[at], NAME, font) for at in known]
    aside, full = 8 + round(max((font.getlength(text) for text in said), default=0)), 240
    panel = Image.new("RGB", (aside + full + 40, 22 * max(1, len(known))), PAPER)
    pen = ImageDraw.Draw(panel)
    for row, (at, text) in enumerate(zip(known, said, strict=True)):
        top, length = 22 * row, round(full * values[at])
        pen.text((aside - 6, top + 11), text, INK, font, anchor="rm")
        pen.rectangle((aside, top + 3, aside + length, top + 18), fill=BLUE)
        pen.text((aside + length + 6, top + 11), f"{100 * values[at]:.0f}", INK, font, anchor="lm")
    return panel


def _cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Shorten a text to a width in px."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}..") > width:
        text = text[:-1]
    return f"{text}.."
