"""Published Swin transformers: SimMIM's and Swin's own code, and timm's `swin`."""

from __future__ import annotations

import math

from mim_core.published.imported import Hints, Imported, Names, Params, Pieces, State, imagenet
from mim_core.published.vit import pixel_entries
from mim_core.spec import check

SIZES = (192, 224, 256, 384)
"""Sides in px that published models were trained with; shapes tell the size in part only."""
SPARE = ("head.", "mask_token")
TABLE = "attn.relative_position_bias_table"


def swin(names: Names, hints: Hints) -> Imported:
    """Read a Swin: encoder, and mask token and SimMIM's head where the file has them.

    The merging of patches ends a stage in the published code and begins the next in timm's, under whose names weights
    are kept. The window follows from the largest table; the size is the first of `SIZES` for which all tables are as
    large as in the file, unless it is given.
    """
    width, channels, patch_px, across = names.take("patch_embed.proj.weight").shape
    if patch_px != across:
        raise ValueError(f"patch_embed: found patches of {patch_px} x {across} px; here they are square")
    stages = names.counted("layers.#.blocks.")
    tables = [names.take(f"layers.{stage}.blocks.0.{TABLE}") for stage in range(stages)]
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    piece: Params = {
        "name": "swin",
        "patch_px": int(patch_px),
        "width": int(width),
        "depths": [names.counted(f"layers.{stage}.blocks.#.") for stage in range(stages)],
        "heads": [int(table.shape[1]) for table in tables],
        "window": max(windows),
        "mlp_ratio": len(names.take("layers.0.blocks.0.mlp.fc1.weight")) / width,
    }
    size, notes = _size(hints, patch_px, windows)
    found: Params = {"encoder": piece}
    weights = {"encoder": _encoder_state(names)}
    entries, family = None, "Swin"
    if "decoder.0.weight" in names:
        entries = pixel_entries(names.take("decoder.0.weight"), channels)
        weights["head"] = {"project.weight": names.take("decoder.0.weight").flatten(1)}
        weights["head"]["project.bias"] = names.take("decoder.0.bias")
        found["head"], family = "linear", "Swin as SimMIM pretrains it"
        if "mask_token" in names:
            weights["fill"], found["fill"] = {"token": names.take("mask_token")}, "mask_token"
    unused, notes = names.left(*SPARE), notes + names.notes()
    colours = imagenet(channels)
    return Imported(family, check(Pieces, found, "imported"), weights, channels, size, colours, entries, unused, notes)


def _encoder_state(names: Names) -> State:
    state = names.below("patch_embed.", "layers.", "norm.")
    moved = 1 if "layers.0.downsample.reduction.weight" in state else 0
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + moved)
        renamed[".".join(["backbone", *parts])] = tensor
    return renamed


def _size(hints: Hints, patch_px: int, windows: list[int]) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Find an image's size for which every stage's window is the one of its table, shrunk where its map is smaller."""

    def fits(height: int, width: int) -> bool:
        for stage, window in enumerate(windows):
            cell = patch_px * 2**stage
            # A table of a window that shrank is square only where the map is.
            if height % cell or width % cell or min(max(windows), height // cell, width // cell) != window:
                return False
            if any(side // cell > window and side // cell % window for side in (height, width)):
                return False
        return True

    if hints.size:
        if not fits(*hints.size):
            raise ValueError(
                f"size: found {list(hints.size)}; the tables of the stages are of windows of {windows} patches, which "
                "do not tile it; give the size in training"
            )
        return hints.size, ()
    coarsest = patch_px * 2 ** (len(windows) - 1)
    sides = [side for side in (*SIZES, windows[-1] * coarsest) if fits(side, side)]
    if not sides:
        raise ValueError(f"size: shapes do not tell it for windows of {windows} patches; give size")
    return (sides[0], sides[0]), (f"Images of {sides[0]} x {sides[0]} px are assumed: shapes do not tell.",)
