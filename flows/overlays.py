"""Pictures of answers: a semantic map or boxes laid over the image that they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mim_core.gallery import INK, PAPER
from mim_core.tasks.segment.palette import palette

LONGEST = 1600
"""Px of an overlay's longer side at most."""
OPACITY, UNSEEN = 0.55, 0.6
SURE = 0.3
"""Score from which a box is drawn or told at the terminal; tables have them all."""
LINE, SWATCH = 20, 12


def overlay(planes: np.ndarray, answer: dict[str, Any], names: list[str]) -> Image.Image | None:
    """Draw an answer over its image [c, H, W]; None for answers that have no place in it.

    `names` are the classes of boxes or the values of maps.
    """
    shown = planes[:3] if len(planes) >= 3 else planes[:1].repeat(3, 0)
    image = Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))
    scale = min(1.0, LONGEST / max(image.size))
    # Small images are enlarged by a whole factor: a name would not fit beside a box.
    scale = scale if max(image.size) > 256 else float(max(1, 512 // max(image.size)))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    if "map" in answer:
        return _map(image, answer["map"], answer["shares"], names)
    if "objects" in answer:
        return _boxes(image, answer["objects"], scale, names)
    return None


def _map(image: Image.Image, values: np.ndarray, shares: list[dict[str, Any]], names: list[str]) -> Image.Image:
    """Tint an image by class, the largest first in the legend below. Background is left as it is, and what the model
    did not see is lightened."""
    clear = names[0].lower() == "background"
    colours = dict(zip(names[clear:], palette(len(names) - clear), strict=True))
    table = np.full((256, 4), (255, 255, 255, UNSEEN), np.float32)
    for value, name in enumerate(names):
        table[value] = (*colours[name], OPACITY) if name in colours else (0, 0, 0, 0)
    values = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.NEAREST))
    colour, share = np.split(table[values], [3], axis=-1)
    pixels = np.asarray(image, np.float32) * (1 - share) + colour * share
    page = Image.new("RGB", (max(image.width, 200), image.height + 8 + LINE * len(shares)), PAPER)
    page.paste(Image.fromarray(pixels.round().astype(np.uint8)))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for index, one in enumerate(shares):
        top = image.height + 6 + LINE * index
        pen.rectangle((6, top, 6 + SWATCH, top + SWATCH), colours.get(one["segment"], PAPER), INK)
        pen.text((12 + SWATCH, top - 1), f"{one['segment']}  {one['share']:.1%}", INK, font)
    return page


def _boxes(image: Image.Image, objects: list[dict[str, Any]], scale: float, names: list[str]) -> Image.Image:
    """Draw boxes with class and score, the surest last, so that they lie on top."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    colours = dict(zip(names, palette(len(names)), strict=True))
    for one in sorted((one for one in objects if one["score"] >= SURE), key=lambda one: float(one["score"])):
        left, top, right, bottom = (one[side] * scale for side in ("left", "top", "right", "bottom"))
        colour = colours[one["class"]]
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        text = f"{one['class']} {one['score']:.2f}"
        place = (left, max(0.0, top - 15))
        pen.rectangle(pen.textbbox(place, text, font), colour)
        pen.text(place, text, INK, font)
    return image
