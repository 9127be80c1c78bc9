"""The picture of detections: images from the best found to the worst, with their objects and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as TF

from mim_core.gallery import GAP, Cell, Sheet
from mim_core.metrics.boxes import Found, Truth

TILE, ACROSS, HEAD, LABEL = 168, 6, 36, 20
"""Px of a tile's width, tiles a row, px above the first row and below each tile."""
TRUE, FOUND, WRONG = (255, 255, 255), (40, 220, 90), (255, 80, 60)
DASH = 4


@dataclass(frozen=True)
class Example:
    """An image [c, H, W] in [0, 1], what there is, what was found, and the found masks [m, H, W] or None."""

    image: Tensor
    truth: Truth
    found: Found
    masks: np.ndarray | None


def best(found: Sequence[Found], truth: Sequence[Truth]) -> tuple[list[Found], float]:
    """Keep the best of all images' detections, as many as there are objects; gives the score from which they are kept.

    A score fixed beforehand would show nothing of a weak detector, and of a strong one what it hardly believes.
    """
    count = sum(_clear(one) for one in truth)
    scores = np.sort(np.concatenate([one.scores for one in found]))[::-1][:count]
    least = float(scores[-1]) if len(scores) else 1.0
    kept = []
    for one in found:
        at = np.flatnonzero(one.scores >= least)
        masks = None if one.masks is None else [one.masks[int(index)] for index in at]
        kept.append(Found(one.boxes[at], one.classes[at], one.scores[at], masks))
    return kept, least


def quality(found: Found, truth: Truth) -> float:
    """Tell how well an image was found: 1 where the detections are its objects, 0 where none is.

    Detections take, by falling score, the object of their class that they overlap most; the sum of overlaps is divided
    by the mean of the numbers of objects and of detections. Difficult objects and crowds may be found or not.
    """
    overlaps, passed = _matched(found, truth)
    count = _clear(truth) + int((~passed).sum())
    return float(2 * overlaps[~passed].sum() / count) if count else 1.0


def spread(qualities: Sequence[float], count: int) -> list[int]:
    """Choose images at even steps of rank from the best to the worst."""
    order = np.argsort(-np.array(qualities), kind="stable")
    return [int(order[at]) for at in np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def draw(examples: Sequence[Example], names: Sequence[str], caption: str, note: str = "") -> Image.Image:
    """Lay examples out, `ACROSS` a row: objects dashed in white, detections of the right class that overlap one by half
    green, others red, each with its class and score."""
    height, width = examples[0].image.shape[-2:]
    cell = Cell.of(examples[0].image[None], TILE)
    if width > TILE:
        cell = Cell(round(height * TILE / width), TILE)
    rows = -(-len(examples) // ACROSS)
    note = f"Dashed: objects (grey: not counted). Green: of the right class, overlap 0.5 or more. Red: wrong. {note}"
    page = (10 + ACROSS * (cell.width + 2 * GAP), HEAD + rows * (cell.height + LABEL))
    sheet = Sheet(*page, caption, note, fit=True)
    for number, one in enumerate(examples):
        row, column = divmod(number, ACROSS)
        left, top = 10 + column * (cell.width + 2 * GAP), HEAD + row * (cell.height + LABEL)
        image = one.image if width <= TILE else TF.resize(one.image, [cell.height, cell.width], antialias=True)
        sheet.paste(image, left, top, cell)
        tile = sheet.image.crop((left, top, left + cell.width, top + cell.height))
        _objects(tile, one, names, (cell.width / width, cell.height / height), sheet)
        sheet.image.paste(tile, (left, top))
        sheet.say(f"quality {quality(one.found, one.truth):.2f}", left, top + cell.height + 2)
    return sheet.image


def _objects(tile: Image.Image, one: Example, names: Sequence[str], scale: tuple[float, float], sheet: Sheet) -> None:
    overlaps, passed = _matched(one.found, one.truth)
    colours = [FOUND if overlap >= 0.5 or over else WRONG for overlap, over in zip(overlaps, passed, strict=True)]
    if one.masks is not None:
        for drawn, colour in zip(one.masks, colours, strict=True):
            mask = Image.fromarray((drawn * 90).astype(np.uint8)).resize(tile.size)
            tile.paste(Image.new("RGB", tile.size, colour), (0, 0), mask)
    pen, stretch = ImageDraw.Draw(tile), np.array(scale * 2)
    for box, aside in zip(one.truth.boxes, one.truth.difficult | one.truth.crowd, strict=True):
        _dashed(pen, box * stretch - [0, 0, 1, 1], (150, 150, 150) if aside else TRUE)
    # The best last, so that it lies on top.
    for at, colour in reversed(list(enumerate(colours))):
        box = one.found.boxes[at] * stretch - [0, 0, 1, 1]
        pen.rectangle([*box], outline=colour, width=2)
        text = f"{names[one.found.classes[at]]} {one.found.scores[at]:.0%}"
        corner = (max(0.0, min(box[0], tile.width - 40)), box[1] - 13 if box[1] >= 13 else box[1] + 2)
        pen.text(corner, text, colour, sheet.small, stroke_width=2, stroke_fill=(0, 0, 0))


def _dashed(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw a rectangle's outline by dashes, black between them, so that it shows on any ground."""
    left, top, right, bottom = (float(side) for side in box)
    corners = [((left, top), (right, top)), ((right, top), (right, bottom))]
    corners += [((right, bottom), (left, bottom)), ((left, bottom), (left, top))]
    for begin, end in corners:
        length = abs(end[0] - begin[0]) + abs(end[1] - begin[1])
        along = np.arange(0, max(length, 1), DASH) / max(length, 1)
        points = [tuple(np.add(begin, np.subtract(end, begin) * share)) for share in (*along, 1.0)]
        for number in range(len(points) - 1):
            pen.line([*points[number], *points[number + 1]], (0, 0, 0) if number % 2 else colour, 1)


def _matched(found: Found, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Give the overlap of each detection with the object that it takes (0: none), and whether that does not count."""
    overlap = box_iou(torch.from_numpy(found.boxes).double(), torch.from_numpy(truth.boxes).double()).numpy()
    overlap = np.where(found.classes[:, None] == truth.classes[None], overlap, 0.0)
    taken = np.zeros(len(truth.boxes), bool)
    overlaps, passed = np.zeros(len(found.boxes)), np.zeros(len(found.boxes), bool)
    for at in range(len(found.boxes)):
        free = np.where(taken, 0.0, overlap[at])
        if free.size and free.max() > 0:
            which = int(free.argmax())
            overlaps[at], taken[which] = free[which], True
            passed[at] = truth.difficult[which] or truth.crowd[which]
    return overlaps, passed


def _clear(truth: Truth) -> int:
    """Count the objects that have to be found."""
    return int((~(truth.difficult | truth.crowd)).sum())
