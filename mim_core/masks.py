"""Masks: which part of an image the encoder may not see.

`mask(rng, grid, **params) -> Bool[h, w]`, True = hidden, on the grid of the encoder's patches (of pixels, patch_px 1,
for a convolutional encoder). A mask is a pure function of its generator, and `generator(seed, epoch, index)` gives each
sample its own: the same masks come out in any process, with any number of loader workers, and after a resume.

Masks that are drawn do not look at the image. `OBJECT_MASKS` do: they are for pictures, and take pixel labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Int, UInt8
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

from mim_core import philox
from mim_core.grid import Grid
from mim_core.spec import Range


def _shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] < 1:
        raise ValueError(f"found {list(value)}; both shares must lie above 0 and below 1; choose such as [0.2, 0.3]")
    return value


def _above_zero(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] <= 0:
        raise ValueError(f"found {list(value)}; a ratio of height to width must lie above 0; choose such as [0.5, 2]")
    return value


Ratio = Annotated[float, Field(gt=0, lt=1)]
Shares = Annotated[Range, AfterValidator(_shares)]

ATTEMPTS = 10
"""Failed draws in a row after which a mask made of blocks is left as it is."""


def generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """Give the random generator of one sample in one epoch.

    Philox is counter-based, so its key is the address itself and nothing is drawn to make it. `stream` separates uses
    (0 masks, 1 augmentation, 2 order) so that changing one leaves the others' draws as they were.
    """
    return generators(seed, stream)(epoch, index)


def generators(seed: int, stream: int = 0) -> Callable[[int, int], np.random.Generator]:
    """Give `generator` for one (epoch, index) after the other.

    What it gives is the same object, set anew: a sample's draws end before the next one's begin. To make one each time
    takes longer than to draw from it.
    """
    philox = np.random.Philox(key=0)
    drawing, begin = np.random.Generator(philox), philox.state

    def at(epoch: int, index: int) -> np.random.Generator:
        begin["state"]["key"][:] = _key(seed, epoch, index, stream)
        philox.state = begin
        return drawing

    return at


def _key(seed: int, epoch: Any, index: Any, stream: int) -> tuple[int, Any]:
    return seed << 8 | stream, epoch << 40 | index


def random(
    rng: np.random.Generator, grid: Grid, *, ratio: Ratio = 0.6, unit_px: PositiveInt = 32
) -> Bool[np.ndarray, "h w"]:
    """Hide ceil(ratio * cells) cells of `unit_px` px, uniformly (SimMIM, section 3.2; its code rounds up).

    `ratio` is a share of the cells, so the share of hidden pixels is the next one that whole cells allow. Raises
    ValueError where units do not fit (see `unit_patches`).
    """
    unit = unit_patches(grid, unit_px)
    rows, columns = grid.shape[0] // unit, grid.shape[1] // unit
    hidden = np.zeros(rows * columns, bool)
    # The lowest of equal-length noise, rather than a permutation: the same arithmetic runs in a batch on a device.
    hidden[np.argsort(rng.random(rows * columns))[: math.ceil(ratio * rows * columns)]] = True
    return _enlarge(hidden.reshape(rows, columns), unit)


def random_of(
    addresses: Int[Tensor, "b 2"], grid: Grid, *, seed: int, ratio: Ratio = 0.6, unit_px: PositiveInt = 32
) -> Bool[Tensor, "b h w"]:
    """Give what `random` gives under `generator(seed, epoch, index)`, for many (epoch, index) at once where they are.

    On a grid whose cells are unions of another's, in whole units, it hides the same part of the image as on the other.
    """
    unit = unit_patches(grid, unit_px)
    rows, columns = grid.shape[0] // unit, grid.shape[1] // unit
    first, second = _key(seed, addresses[:, 0], addresses[:, 1], 0)
    keys = torch.stack([torch.full_like(second, first), second], dim=1)
    count = math.ceil(ratio * rows * columns)
    lowest = philox.draws(keys, rows * columns).topk(count, dim=1, largest=False, sorted=False).indices
    hidden = torch.zeros(len(keys), rows * columns, dtype=torch.bool, device=keys.device).scatter_(1, lowest, True)
    cells = hidden.view(-1, rows, 1, columns, 1).expand(-1, rows, unit, columns, unit)
    return cells.reshape(-1, rows * unit, columns * unit)


def square(
    rng: np.random.Generator, grid: Grid, *, ratio: Ratio = 0.6, unit_px: PositiveInt = 32
) -> Bool[np.ndarray, "h w"]:
    """Hide one square at a random place, in whole units of `unit_px` px (SimMIM, section 3.2: a movable region).

    Its side is the whole number of units that comes nearest to the share `ratio` of the area. Raises ValueError where
    units do not fit (see `unit_patches`), or such a square does not fit the image or leaves nothing visible.
    """
    unit = unit_patches(grid, unit_px)
    rows, columns = grid.shape[0] // unit, grid.shape[1] // unit
    side = max(1, round(math.sqrt(ratio * rows * columns)))
    if side > min(rows, columns) or side**2 == rows * columns:
        raise ValueError(
            f"ratio: found {ratio}; a square of that share is {side} units a side, and of {rows} x {columns} units of "
            f"{unit_px} px some must stay visible; choose a smaller ratio or unit_px"
        )
    hidden = np.zeros((rows, columns), bool)
    _place(rng, hidden, side, side)[:] = True
    return _enlarge(hidden, unit)


def central(rng: np.random.Generator, grid: Grid, *, area: Ratio = 0.25) -> Bool[np.ndarray, "h w"]:
    """Hide the rectangle in the middle that has the share `area` of the image and its shape (Context Encoder, 3.3).

    Each side is sqrt(area) of the image's, in whole cells and at least one; it lies one cell nearer to the top or left
    where an equal distance to both edges is no whole number of cells. Nothing is drawn. Raises ValueError where no cell
    would stay visible.
    """
    (height, width), share = grid.shape, math.sqrt(area)
    h, w = _middle(height, share), _middle(width, share)
    if (h, w) == grid.shape:
        raise ValueError(
            f"area: found {area}; on a grid of {height} x {width} it leaves no cell visible; choose a smaller one"
        )
    hidden = np.zeros(grid.shape, bool)
    top, left = (height - h) // 2, (width - w) // 2
    hidden[top : top + h, left : left + w] = True
    return hidden


def random_block(
    rng: np.random.Generator,
    grid: Grid,
    *,
    area: Ratio = 0.25,
    side: Shares = (0.1, 0.3),
) -> Bool[np.ndarray, "h w"]:
    """Hide squares at random places that may overlap, together never more than `area` (Context Encoder, 3.3).

    `side`: a square's side as a share of the image's shorter side, uniform between the two and in whole cells. Squares
    are added until ten in a row would pass the area or add nothing. The paper gives no sizes: the defaults are ours.
    Raises ValueError where even the smallest square passes the area.
    """
    budget = math.floor(area * grid.count)
    shorter = min(grid.shape)
    least, most = (max(1, round(share * shorter)) for share in side)
    if least**2 > budget:
        raise ValueError(
            f"side: found {list(side)}; a square of {least} cells a side passes the area {area} of the grid "
            f"{grid.shape[0]} x {grid.shape[1]}; choose smaller sides or a larger area"
        )
    # So that the first square always fits.
    most = min(most, math.isqrt(budget))
    hidden = np.zeros(grid.shape, bool)
    failures = 0
    while failures < ATTEMPTS and (left := budget - hidden.sum()):
        length = int(rng.integers(least, most + 1))
        block = _place(rng, hidden, length, length)
        if fits := 0 < block.size - block.sum() <= left:
            block[:] = True
        failures = 0 if fits else failures + 1
    return hidden


def random_region(
    rng: np.random.Generator,
    grid: Grid,
    *,
    area: Shares = (0.2, 0.3),
    roughness: Annotated[float, Field(ge=1, le=256)] = 7.7,
) -> Bool[np.ndarray, "h w"]:
    """Hide regions of arbitrary shape that do not follow the image (Context Encoder, 3.3, as in its released code).

    Uniform noise is enlarged by cubic splines and cut at the level in the middle of `area` (0.25); windows of it are
    drawn until one has a share within `area`. `roughness` is how many cells of noise lie across the image's shorter
    side: 7.7 as published (cells of 16.7 px under crops of 128 px); on a coarse grid fewer keep regions connected.
    Shares lean to the lower end, as enlarged noise passes the level less often than noise does. The released code
    shares one mask in a batch; here each image has its own.
    After ten windows the last is cut at the level that hides the middle of `area`, so the draw always ends. Raises
    ValueError where no whole number of cells lies within `area`.
    """
    # Slack as 0.07 * 100 is not 7 in binary.
    least = max(1, math.ceil(area[0] * grid.count - 1e-9))
    most = math.floor(area[1] * grid.count + 1e-9)
    if least > most:
        raise ValueError(
            f"area: found {list(area)}; no whole number of the grid's {grid.count} cells lies within; widen it"
        )
    level = sum(area) / 2
    step = roughness / min(grid.shape)
    # Splines reach a few cells: with a margin the texture is the same at the edges as in the middle.
    margin = 4
    shape = [math.ceil(cells * step) + 1 + 2 * margin for cells in grid.shape]
    for _ in range(ATTEMPTS):
        window = margin + rng.random(2)
        texture = scipy.ndimage.affine_transform(
            rng.random(shape), [step, step], window, grid.shape, order=3, mode="mirror"
        )
        hidden: Bool[np.ndarray, "h w"] = texture < level
        if least <= hidden.sum() <= most:
            return hidden
    hidden = np.zeros(grid.count, bool)
    hidden[np.argsort(texture, axis=None)[: min(most, max(least, round(level * grid.count)))]] = True
    return hidden.reshape(grid.shape)


def block_wise(
    rng: np.random.Generator,
    grid: Grid,
    *,
    ratio: Ratio | None = None,
    count: PositiveInt | None = None,
    least: PositiveInt = 16,
    most: PositiveInt | None = None,
    aspect: Annotated[Range, AfterValidator(_above_zero)] = (0.3, 1 / 0.3),
    unit_px: PositiveInt | None = None,
) -> Bool[np.ndarray, "h w"]:
    """Hide rectangles that may overlap, up to a wanted number of units (BEiT, algorithm 1, as in its released code).

    Wanted is `count`, or floor(ratio * units) (MaskFeat's 78 of 196 are 0.4; BEiT's 75 are given as a count); one is
    often missed by a unit or so and never passed. `least` and `most` bound the area of a rectangle before its sides are
    rounded, `aspect` its height over width, log-uniform. Units, which all counts are in, are patches, or squares of
    `unit_px` px (SimMIM's ablation). On a grid of 8 x 8, `least` 4 leaves room for more than one rectangle.

    One cell is hidden where no first rectangle fits in ten draws, so that no image is left whole. Raises ValueError
    where units do not fit (see `unit_patches`), or numbers contradict each other or the grid.
    """
    if (ratio is None) == (count is None):
        raise ValueError(
            f"ratio: found {ratio} beside count {count}; exactly one says how much to hide; give one, delete the other"
        )
    unit = 1 if unit_px is None else unit_patches(grid, unit_px)
    rows, columns = grid.shape[0] // unit, grid.shape[1] // unit
    # Slack as 0.29 * 100 is not 29 in binary.
    wanted = count or math.floor((ratio or 0.0) * rows * columns + 1e-9)
    if not 0 < wanted < rows * columns:
        raise ValueError(
            f"{'count' if ratio is None else 'ratio'}: found {ratio or count}, that is {wanted} of {rows} x {columns} "
            "units; some must be hidden and some visible; choose another"
        )
    most = wanted if most is None else most
    if least > min(wanted, most):
        raise ValueError(
            f"least: found {least}; it may exceed neither the {wanted} units to hide nor most {most}; choose a smaller "
            "one"
        )
    # The aspects, within those allowed, at which a block of the least area is shorter and narrower than the grid.
    low, high = max(aspect[0], least / (columns - 0.5) ** 2), min(aspect[1], (rows - 0.5) ** 2 / least)
    if min(rows, columns) < 2 or low > high:
        raise ValueError(
            f"least: found {least}; no block of that area with an aspect in {list(aspect)} is shorter and narrower "
            f"than {rows} x {columns} units; choose a smaller one"
        )
    hidden = np.zeros((rows, columns), bool)
    while (left := wanted - int(hidden.sum())) and add_block(rng, hidden, least, min(left, most), aspect):
        pass
    if not hidden.any():
        _place(rng, hidden, 1, 1)[:] = True
    return _enlarge(hidden, unit)


def add_block(
    rng: np.random.Generator,
    hidden: Bool[np.ndarray, "h w"],
    least: int,
    budget: int,
    aspect: tuple[float, float],
) -> bool:
    """Hide one more rectangle in place, of 1 to `budget` cells not yet hidden; False where ten draws gave none.

    A rectangle is shorter and narrower than the grid. Its area is uniform between `least` and `budget`, in whichever
    order they are.
    """
    for _ in range(ATTEMPTS):
        area = least + (budget - least) * rng.random()
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < hidden.shape[0] and w < hidden.shape[1]:
            block = _place(rng, hidden, h, w)
            if 0 < block.size - block.sum() <= budget:
                block[:] = True
                return True
    return False


def whole_object(rng: np.random.Generator, grid: Grid, instances: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "h w"]:
    """Hide every cell that a labelled pixel (`instances` above 0) touches.

    Raises ValueError where nothing is labelled, or the labels are not of the image's size.
    """
    if instances.shape != (grid.height, grid.width):
        raise ValueError(
            f"instances: found {instances.shape} px; labels must have the image's ({grid.height}, {grid.width}) px; "
            "resize them with the image"
        )
    (h, w), p = grid.shape, grid.patch_px
    hidden: Bool[np.ndarray, "h w"] = np.asarray((instances > 0).reshape(h, p, w, p).any(axis=(1, 3)))
    if not hidden.any():
        raise ValueError("instances: found no labelled pixel; there is no object to hide; choose an image with one")
    return hidden


def most_of_object(
    rng: np.random.Generator, grid: Grid, instances: UInt8[np.ndarray, "H W"], *, share: Ratio = 0.75
) -> Bool[np.ndarray, "h w"]:
    """Hide ceil(share * cells) of the object's cells, drawn uniformly; one stays visible where there are two or more.

    Raises ValueError as `whole_object`.
    """
    cells = np.flatnonzero(whole_object(rng, grid, instances))
    count = min(math.ceil(share * len(cells)), max(1, len(cells) - 1))
    hidden = np.zeros(grid.count, bool)
    hidden[rng.choice(cells, count, replace=False)] = True
    return hidden.reshape(grid.shape)


def avg_distance(hidden: Bool[np.ndarray, "h w"], grid: Grid) -> float:
    """Mean distance in px from a hidden pixel to the nearest visible one (SimMIM, section 4.1.2: AvgDist).

    Distances are Euclidean and between pixels' centres, so the least is 1. 0.0 where nothing is hidden; nan where
    everything is, as then no distance is defined.
    """
    if hidden.all():
        return math.nan
    if not hidden.any():
        return 0.0
    pixels = _enlarge(hidden, grid.patch_px)
    return float(scipy.ndimage.distance_transform_edt(pixels)[pixels].mean())


def unit_patches(grid: Grid, unit_px: int) -> int:
    """Give a mask unit's side in patches; raises ValueError where unit, patch and image do not divide."""
    fits = [u for u in range(grid.patch_px, min(grid.height, grid.width) + 1, grid.patch_px)
            if grid.height % u == 0 and grid.width % u == 0]  # fmt: skip
    if unit_px not in fits:
        raise ValueError(
            f"unit_px: found {unit_px}; it must be a multiple of the encoder's patch_px {grid.patch_px} and divide the "
            f"image's {grid.height} x {grid.width} px; choose one of {fits}"
        )
    return unit_px // grid.patch_px


def _enlarge(cells: Bool[np.ndarray, "r c"], times: int) -> Bool[np.ndarray, "h w"]:
    return cells.repeat(times, 0).repeat(times, 1)


def _place(
    rng: np.random.Generator, cells: Bool[np.ndarray, "h w"], height: int, width: int
) -> Bool[np.ndarray, "r c"]:
    """Give a view of a rectangle of that size at a random place."""
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(cells.shape, (height, width), strict=True))
    return cells[top : top + height, left : left + width]


def _middle(cells: int, share: float) -> int:
    """Give the whole number of cells nearest to a share of them; of two equally near, the one that can be centred."""
    exact = share * cells
    near = min((math.floor(exact), math.ceil(exact)), key=lambda part: (abs(part - exact), (cells - part) % 2))
    return max(1, near)


MASKS: dict[str, Callable[..., Any]] = {
    "random": random,
    "square": square,
    "central": central,
    "random_block": random_block,
    "random_region": random_region,
    "block_wise": block_wise,
}
MASKS_OF_MANY: dict[str, Callable[..., Any]] = {"random": random_of}
"""Masks that hide equally many cells of every image, in a form that a device draws for a whole batch."""
OBJECT_MASKS: dict[str, Callable[..., Any]] = {"object": whole_object, "most_of_object": most_of_object}
