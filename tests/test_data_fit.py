"""Images, boxes and masks fitted to one size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from mim_core.data.fit import place

SIZES = [((40, 80), (20, 20)), ((80, 40), (20, 20)), ((37, 91), (16, 24)), ((16, 24), (37, 91)), ((5, 5), (7, 7))]


@pytest.mark.parametrize(("frame", "size"), SIZES)
def test_images_are_pillows(frame: tuple[int, int], size: tuple[int, int]) -> None:
    """`cover` is ImageOps.fit, `contain` is a resize beside black, `stretch` is a resize."""
    pixels = np.random.default_rng(0).integers(0, 256, (*frame, 3), np.uint8)
    image, planes = Image.fromarray(pixels), pixels.transpose(2, 0, 1)
    cover = np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(place(frame, size, "cover").image(planes).astype(int) - cover).max() <= 1
    stretch = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (place(frame, size, "stretch").image(planes) == stretch).all()
    contain = place(frame, size, "contain")
    inner = np.asarray(image.resize(contain.inner[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    whole = contain.image(planes)
    assert (whole[:, : contain.inner[0], : contain.inner[1]] == inner).all()
    assert whole.sum(dtype=int) == inner.sum(dtype=int)
    assert contain.inner[0] == size[0] or contain.inner[1] == size[1]


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_each_channel_is_fitted_for_itself(fit: str) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (5, 12, 30), np.uint8)
    placing = place((12, 30), (9, 8), fit)  # type: ignore[arg-type]
    together = placing.image(planes)
    assert together.shape == (5, 9, 8)
    for plane, fitted in zip(planes, together, strict=True):
        assert (placing.image(plane[None])[0] == fitted).all()
    assert (placing.image(planes[:3]) == together[:3]).all()


# An image of 40 x 80 px becomes one of 20 x 20: `cover` keeps its columns 20 to 60 at half the size, `contain` has it
# at a quarter in the upper half, `stretch` at a half down and a quarter across.
BOXES = np.array([[30, 10, 50, 30, 4], [0, 0, 24, 8, 5], [60, 20, 80, 40, 6], [16, 0, 24, 40, 7]], np.float64)
FITTED = {
    "cover": [[5, 5, 15, 15, 4], [0, 0, 2, 20, 7]],
    "contain": [[7.5, 2.5, 12.5, 7.5, 4], [0, 0, 6, 2, 5], [15, 5, 20, 10, 6], [4, 0, 6, 10, 7]],
    "stretch": [[7.5, 5, 12.5, 15, 4], [0, 0, 6, 4, 5], [15, 10, 20, 20, 6], [4, 0, 6, 20, 7]],
}


@pytest.mark.parametrize("fit", FITTED)
def test_boxes_move_along(fit: str) -> None:
    """Of the second box a sixth remains under `cover`, of the third nothing, of the last a half."""
    boxes, kept = place((40, 80), (20, 20), fit).boxes(BOXES)  # type: ignore[arg-type]
    assert boxes.tolist() == FITTED[fit]
    assert kept.tolist() == [row[4] in boxes[:, 4] for row in BOXES.tolist()]
    nothing, none = place((40, 80), (20, 20), fit).boxes(np.zeros((0, 5)))  # type: ignore[arg-type]
    assert nothing.shape == (0, 5)
    assert none.shape == (0,)


def test_masks_move_along() -> None:
    values = np.arange(40 * 80).reshape(40, 80) % 251
    cover = place((40, 80), (20, 20), "cover").mask(values, 255)
    assert (cover == values[1::2, 21:60:2]).all()
    contain = place((40, 80), (20, 20), "contain").mask(values, 255)
    assert (contain[:10] == values[2::4, 2::4]).all()
    assert (contain[10:] == 255).all()
    stretch = place((40, 80), (20, 20), "stretch").mask(values, 255)
    assert (stretch == values[1::2, 2::4]).all()
    for fit in ("cover", "contain", "stretch"):
        assert (place((6, 9), (6, 9), fit).mask(values[:6, :9], 0) == values[:6, :9]).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("frame", "size"), SIZES)
@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_a_mask_lies_in_its_box(fit: str, frame: tuple[int, int], size: tuple[int, int]) -> None:
    """Fitting the mask, or the box around it, gives the same within half a pixel."""
    placing = place(frame, size, fit)  # type: ignore[arg-type]
    top, left, bottom, right = frame[0] // 4, frame[1] // 4, frame[0] - frame[0] // 4, frame[1] - frame[1] // 4
    mask = np.zeros(frame, np.uint8)
    mask[top:bottom, left:right] = 1
    box = placing.boxes(np.array([[left, top, right, bottom, 0]], np.float64))[0][0]
    rows, columns = np.nonzero(placing.mask(mask, 0))
    tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(box[:4] - tight).max() <= 0.5 + 1e-6
