"""Fit trained weights to images of another size: absolute positions and tables of relative bias.

`shape` is (rows, columns) of a grid of patches, or of an attention window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mim_core.grid import Grid
from mim_core.positions import sincos

Shape = tuple[int, int]
Way = Literal["geometric", "bicubic"]
POSITIONS = "pos_embed"
TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
# Names in a message before it says only how many more there are.
LISTED = 6


def positions(table: Float[Tensor, "1 m d"], before: Shape, after: Shape, prefix: int = 1) -> Float[Tensor, "1 n d"]:
    """Resize absolute positions by bicubic interpolation on the grid, as MAE's code does for fine-tuning.

    The first `prefix` rows (class token) stay as they are. Raises ValueError where the table is not one of `before`.
    """
    _check_rows("positions", table.shape[1] - prefix, before, _cells(before))
    if before == after:
        return table
    maps = table[:, prefix:].reshape(1, *before, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps.float(), after, mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:, :prefix], maps.flatten(2).transpose(1, 2)], dim=1)


def relative_bias(
    table: Float[Tensor, "m heads"], before: Shape, after: Shape, extra: int = 0, *, way: Way = "geometric"
) -> Float[Tensor, "n heads"]:
    """Resize a table of relative bias, which has a row for each of (2 h - 1) x (2 w - 1) offsets, rows first.

    The last `extra` rows (pairs with the class token) stay as they are. `way`: "geometric", the spline of BEiT's and
    SimMIM's code, under which near offsets keep their bias and far ones are spread out; or "bicubic", a plain resize as
    in Swin Transformer's code. Raises ValueError where the table is not one of `before`.
    """
    _check_rows("relative bias", len(table) - extra, before, _offsets(before))
    if before == after:
        return table
    inner, rest = table[: _offsets(before)], table[_offsets(before) :]
    maps = inner.reshape(2 * before[0] - 1, 2 * before[1] - 1, -1)
    if way == "bicubic":
        sides = (2 * after[0] - 1, 2 * after[1] - 1)
        maps = F.interpolate(maps.permute(2, 0, 1)[None].float(), sides, mode="bicubic")[0].permute(1, 2, 0)
    else:
        rows, columns = (
            torch.from_numpy(_spline(*sides)).to(table.device) for sides in zip(before, after, strict=True)
        )
        maps = torch.einsum("ri,cj,ijh->rch", rows, columns, maps.double())
    return torch.cat([maps.flatten(0, 1).to(table.dtype), rest])


def adapt(
    weights: Mapping[str, Tensor], encoder: Any, before: Shape | None = None, *, way: Way = "geometric"
) -> dict[str, Tensor]:
    """Make the weights saved from one ViT or Swin fit another of the same width and depth; gives its state dict.

    The two may differ in image size or window, and weights with one shared table of relative bias fit an encoder with a
    table in each block, where each gets a copy (BEiT and SimMIM fine-tune so). Positions of sines and cosines are the
    encoder's own. `before` is the (height, width) in px of the images that the weights were trained on; without it, a
    grid or window that is not the encoder's is taken to be square.

    Raises ValueError where anything else does not fit, with the names.
    """
    wanted = encoder.state_dict()
    adapted = _spread(weights, wanted)
    _check_fit(adapted, wanted)
    for name, table in adapted.items():
        if _leaf(name) == POSITIONS:
            adapted[name] = _fit_positions(name, table, wanted[name], encoder, before)
        elif _leaf(name) == TABLE:
            adapted[name] = _fit_bias(name, table, wanted[name], encoder, before, way)
    return adapted


def _fit_positions(name: str, table: Tensor, wanted: Tensor, encoder: Any, before: Shape | None) -> Tensor:
    after = encoder.grid.shape
    shape = _find(name, table.shape[1] - 1, _cells, after, before and _grid_before(encoder, before))
    if encoder.positions != "sincos":
        return positions(table, shape, after)
    fixed = torch.from_numpy(sincos(Grid(*shape, 1), table.shape[2])).to(table.device)
    if not torch.allclose(table[0, 1:].double(), fixed, atol=1e-2):
        raise ValueError(
            f"{name}: found learned positions; the encoder's are fixed sines and cosines, which the weights were not "
            "trained with; set the encoder's positions to learned"
        )
    return wanted


def _fit_bias(name: str, table: Tensor, wanted: Tensor, encoder: Any, before: Shape | None, way: Way) -> Tensor:
    owner = name.removesuffix(f".{TABLE}")
    after = tuple(encoder.get_submodule(owner).window_size)
    # The class token's entries tell a table for the whole grid from one for windows.
    extra = len(wanted) - _offsets(after)
    known = None
    if before and extra:
        known = _grid_before(encoder, before)
    elif before:
        block = encoder.get_submodule(owner.rpartition(".")[0])
        known = _windows(Grid(*before, encoder.grid.height // block.input_resolution[0]).shape)
    shape = _find(name, len(table) - extra, _offsets, after, known)
    return relative_bias(table, shape, after, extra, way=way)


def _grid_before(encoder: Any, before: Shape) -> list[Shape]:
    return [Grid(*before, encoder.grid.patch_px).shape]


def _windows(shape: Shape) -> list[Shape]:
    """Windows on a map: square, but that they shrink to the map along a side that is shorter."""
    return [(min(shape[0], side), min(shape[1], side)) for side in range(1, max(shape) + 1)]


def _spread(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a shared table of relative bias to each block where the encoder has a table in each."""
    spread = dict(weights)
    for name in weights:
        if name.endswith(SHARED) and name not in wanted:
            blocks = name.removesuffix(SHARED) + "blocks."
            own = [key for key in wanted if key.startswith(blocks) and key.endswith(f".{TABLE}")]
            if own:
                shared = spread.pop(name)
                spread |= {key: shared.clone() for key in own}
    return spread


def _spline(before: int, after: int) -> Float[np.ndarray, "m n"]:
    """Weights of the source's offsets (2 before - 1) in each wanted one (2 after - 1), along one side.

    Source offsets are set apart by powers of q >= 1.01, so that the outermost come to the wanted range, and a cubic
    spline (not-a-knot, as FITPACK's interpolating one) runs through them; beyond them it keeps their value. Of one or
    two cells a side, which the published code does not take, it is of degree 0 or 2.
    """
    if before == after:
        return np.eye(2 * after - 1)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (before - 1)) / (1 - q) > after - 1 else (q, high)
    reach = np.cumsum(q ** np.arange(before - 1))
    source = np.concatenate([-reach[::-1], [0.0], reach])
    asked = np.arange(1 - after, after).clip(source[0], source[-1])
    spline = scipy.interpolate.make_interp_spline(source, np.eye(len(source)), k=min(3, len(source) - 1))
    weights: np.ndarray = spline(asked)
    return weights


def _cells(shape: Shape) -> int:
    return shape[0] * shape[1]


def _offsets(shape: Shape) -> int:
    return (2 * shape[0] - 1) * (2 * shape[1] - 1)


def _check_rows(what: str, found: int, before: Shape, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{what}: found {found} rows; a grid of {before[0]} x {before[1]} has {expected}")


def _find(name: str, rows: int, count: Callable[[Shape], int], after: Shape, known: list[Shape] | None) -> Shape:
    """Find the grid that a table was made for: of the known ones, or else the encoder's or a square one."""
    for shape in known or [after, *((side, side) for side in range(1, rows + 1))]:
        if count(shape) == rows:
            return shape
    fit = "none of images of the size before" if known else "neither the encoder's grid nor a square one"
    raise ValueError(
        f"{name}: found {rows} rows, which fit {fit}; give as the size before the height and width in px of the images "
        "that the weights were trained on"
    )


def _check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check names and shapes, but for how many rows there are of positions or relative bias."""

    def fits(name: str) -> bool:
        have, want = found[name].shape, wanted[name].shape
        if _leaf(name) in (POSITIONS, TABLE):
            return len(have) == len(want) and have[-1] == want[-1]
        return have == want

    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name].shape)} for {list(wanted[name].shape)}"
            for name in found
            if name in wanted and not fits(name)
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {_list(names)}" for what, names in faults.items() if names)
        raise ValueError(
            f"weights: they do not fit the encoder; {told}; only the size of the images or windows may differ, and a "
            "table of relative bias shared by all blocks may become one in each"
        )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
