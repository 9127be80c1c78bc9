"""The picture of reconstructions: input, masked, prediction, composite, a row an image, with hole-only PSNR."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mim_core.metrics import hole_psnr

COLUMNS = ("input", "masked", "prediction", "composite")
GREY = 0.55
INK, PAPER = (34, 34, 34), (255, 255, 255)


def draw(pictures: Mapping[str, Tensor], caption: str, note: str = "", tile: int = 112, across: int = 2) -> Image.Image:
    """Lay pictures out, `across` groups of four columns side by side.

    `pictures` holds originals, predictions and composites [b, c, H, W] in [0, 1] and hidden [b, H, W]; `note` stands
    at the foot. Tiles are about `tile` px wide, whole multiples of small images.
    """
    originals, hidden = pictures["originals"], pictures["hidden"]
    masked = originals * ~hidden[:, None] + GREY * hidden[:, None]
    columns = (originals, masked, pictures["predictions"], pictures["composites"])
    height, width = originals.shape[-2:]
    scale = max(1, round(tile / width))
    cell_h, cell_w = height * scale, width * scale
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    gap, head, foot, label = 4, 34, 26 if note else 8, 20
    group = 4 * (cell_w + gap)
    rows = -(-len(originals) // across)
    sheet = Image.new("RGB", (across * (group + 16) + 8, head + 20 + rows * (cell_h + label) + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), caption, INK, font)
    for index in range(len(originals)):
        row, side = index % rows, index // rows
        left, top = 10 + side * (group + 16), head + 20 + row * (cell_h + label)
        for column, images in enumerate(columns):
            at = left + column * (cell_w + gap)
            if row == 0:
                pen.text((at, head), COLUMNS[column], INK, small)
            sheet.paste(to_image(images[index]).resize((cell_w, cell_h), Image.Resampling.NEAREST), (at, top))
        one = slice(index, index + 1)
        psnr = hole_psnr(pictures["composites"][one], originals[one], hidden[one])
        pen.text((left, top + cell_h + 2), f"hole PSNR {psnr:.1f} dB", INK, small)
    if note:
        pen.text((10, sheet.height - 20), note, INK, small)
    return sheet


def draw_recoveries(
    kinds: Mapping[str, Mapping[str, Tensor]], caption: str, note: str = "", tile: int = 96
) -> Image.Image:
    """Lay out how images were recovered under several kinds of mask: an image a row, masked and recovered a kind.

    `kinds` maps a mask's name to pictures as `draw` takes them, of the same images in the same order.
    """
    first = next(iter(kinds.values()))["originals"]
    count, (height, width) = len(first), first.shape[-2:]
    scale = max(1, round(tile / width))
    cell_h, cell_w = height * scale, width * scale
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    gap, aside, head = 4, 12, 52
    group = 2 * (cell_w + gap) + aside
    size = (10 + cell_w + gap + aside + len(kinds) * group, head + count * (cell_h + gap) + (26 if note else 8))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 8), caption, INK, font)
    pen.text((10, 34), "original", INK, small)

    def paste(image: Tensor, left: int, row: int) -> None:
        tile = to_image(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, head + row * (cell_h + gap)))

    for row in range(count):
        paste(first[row], 10, row)
    for order, (kind, pictures) in enumerate(kinds.items()):
        left = 10 + cell_w + gap + aside + order * group
        pen.text((left, 34), f"{kind.replace('_', ' ')}: masked, recovered", INK, small)
        hidden = pictures["hidden"][:, None]
        masked = pictures["originals"] * ~hidden + GREY * hidden
        for row in range(count):
            paste(masked[row], left, row)
            paste(pictures["composites"][row], left + cell_w + gap, row)
    if note:
        pen.text((10, sheet.height - 20), note, INK, small)
    return sheet


def to_image(image: Tensor) -> Image.Image:
    """Turn one picture [c, H, W] in [0, 1] into an RGB image; one channel is grey, further ones are left out."""
    array = (image.detach().cpu().float().clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    shown = array[:3] if len(array) >= 3 else array[:1].repeat(3, 0)
    return Image.fromarray(shown.transpose(1, 2, 0))
