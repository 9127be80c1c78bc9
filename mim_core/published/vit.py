"""Published ViTs: with relative positions (BEiT, SimMIM's, timm's `beit`) and plain (MAE, timm's `vit`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from mim_core.grid import Entries, Grid
from mim_core.positions import sincos
from mim_core.published.imported import Hints, Imported, Names, Params, Pieces, State, halves, imagenet
from mim_core.spec import check

STANDARD_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Attention heads of the published widths that do not have one for every 64."""
DECODER_HEAD_WIDTH = 32
"""Of MAE's decoder: 512 in 16 heads."""
CLOSE = 2e-3
"""Published tables of sines and cosines may be rounded to float16."""
SPARE = ("head.", "fc_norm.", "cls_pt_layers.", "lm_head.", "mask_token")


def relative(names: Names, hints: Hints) -> Imported:
    """Read a ViT with relative positions: encoder, and mask token and head where the file has them.

    One table for all blocks or one in each; the grid follows from its rows. `decoder.0` is SimMIM's head for pixels,
    `lm_head` BEiT's for tokens.
    """
    shared = "rel_pos_bias.relative_position_bias_table" in names
    where = "rel_pos_bias." if shared else "blocks.0.attn."
    table = names.take(f"{where}relative_position_bias_table")
    encoder, channels, patch_px = _blocks(names, int(table.shape[1]))
    # Three rows more: class token to patch, patch to class token, class token to itself.
    grid = _grid(hints, patch_px, table.shape[0] - 3, lambda h, w: (2 * h - 1) * (2 * w - 1))
    encoder["positions"] = "relative" if shared else "relative_per_block"
    if "blocks.0.gamma_1" in names:
        # What it began with; the factors themselves are in the weights.
        encoder["layer_scale"] = 0.1 if encoder["width"] <= 768 else 1e-5
    own, notes = _encoder_state(names, "rel_pos_bias.")
    weights = {"encoder": own}
    found: Params = {"encoder": encoder}
    entries, family, colours = None, "ViT with relative positions (BEiT, timm's beit)", halves(channels)
    if "decoder.0.weight" in names:
        entries = pixel_entries(names.take("decoder.0.weight"), channels)
        weights["head"] = {"project.weight": names.take("decoder.0.weight").flatten(1)}
        weights["head"]["project.bias"] = names.take("decoder.0.bias")
        found["head"], family, colours = "linear", "ViT as SimMIM pretrains it", imagenet(channels)
    elif "lm_head.weight" in names:
        entries = Entries(1, 1, len(names.take("lm_head.weight")))
        weights["head"] = {f"project.{name}": names.take(f"lm_head.{name}") for name in ("weight", "bias")}
        found["head"], family = "linear", "ViT as BEiT pretrains it"
    if "mask_token" in names and "head" in found:
        weights["fill"], found["fill"] = {"token": names.take("mask_token")}, "mask_token"
    unused, notes = names.left(*SPARE), notes + names.notes()
    size = (grid.height, grid.width)
    return Imported(family, check(Pieces, found, "imported"), weights, channels, size, colours, entries, unused, notes)


def plain(names: Names, hints: Hints) -> Imported:
    """Read a ViT with absolute positions: encoder, and MAE's decoder where the file has it.

    MAE's values run over (row, column, channel) and are put in the order of this project, (channel, row, column).
    """
    if "dist_token" in names:
        raise ValueError(
            "weights: found dist_token; distilled DeiTs have a second class token, which the ViT here has not; take a "
            "DeiT without distillation"
        )
    width = int(names.take("patch_embed.proj.weight").shape[0])
    heads = hints.heads or _heads(width)
    encoder, channels, patch_px = _blocks(names, heads)
    table = names.take("pos_embed")
    grid = _grid(hints, patch_px, table.shape[1] - 1, lambda h, w: h * w)
    fixed = _is_sincos(table, grid)
    encoder["positions"] = "sincos" if fixed else "learned"
    if "blocks.0.ls1.gamma" in names:
        encoder["layer_scale"] = 1e-5
    own, notes = _encoder_state(names, "pos_embed")
    if hints.heads is None:
        notes += (f"{heads} attention heads are assumed for a width of {width}: shapes do not tell.",)
    if not fixed:
        notes += ("Its images are taken to have been normalised by ImageNet's colours.",)
    weights, found = {"encoder": own}, {"encoder": encoder}
    entries, family = None, "ViT as MAE pretrains it" if fixed else "ViT (timm's vit)"
    if "decoder_pred.weight" in names:
        entries = Entries(channels, patch_px)
        weights["head"], head, more = _decoder(names, hints, grid, entries)
        weights["fill"], notes = {}, notes + more
        found |= {"head": head, "fill": {"name": "drop"}}
    unused, notes = names.left(*SPARE), notes + names.notes()
    colours = imagenet(channels)
    size = (grid.height, grid.width)
    return Imported(family, check(Pieces, found, "imported"), weights, channels, size, colours, entries, unused, notes)


def pixel_entries(convolution: Tensor, channels: int) -> Entries:
    """Tell the pixels that a 1 x 1 convolution predicts before a pixel shuffle; raises ValueError where they fit none.

    Its values are in the shuffle's order, which is this project's.
    """
    side = math.isqrt(len(convolution) // channels)
    if channels * side**2 != len(convolution):
        raise ValueError(
            f"decoder.0: found {len(convolution)} values; they must be square patches of {channels} channels; import "
            "the encoder alone"
        )
    return Entries(channels, side)


def _blocks(names: Names, heads: int) -> tuple[Params, int, int]:
    """Give the encoder's params that shapes tell, the channels and the patch's side in px."""
    width, channels, patch_px, across = names.take("patch_embed.proj.weight").shape
    if patch_px != across:
        raise ValueError(f"patch_embed: found patches of {patch_px} x {across} px; here they are square")
    hidden = len(names.take("blocks.0.mlp.fc1.weight"))
    piece = {
        "name": "vit",
        "patch_px": int(patch_px),
        "width": int(width),
        "depth": names.counted("blocks.#."),
        "heads": heads,
        "mlp_ratio": hidden / width,
    }
    return piece, int(channels), int(patch_px)


def _encoder_state(names: Names, positions: str) -> tuple[State, tuple[str, ...]]:
    """Take the encoder's weights, under timm's names; these are the published ones."""
    state = names.below("cls_token", "patch_embed.", "blocks.", positions)
    notes: tuple[str, ...] = ()
    norm = "norm."
    if "norm.weight" not in names and "fc_norm.weight" in names:
        norm = "fc_norm."
        notes = (
            "The model was fine-tuned to normalise after the mean over patches: that norm stands before the mean here, "
            "so that features differ from its own in scale.",
        )
    state |= {f"norm.{name}": names.take(f"{norm}{name}") for name in ("weight", "bias")}
    return {f"backbone.{name}": tensor for name, tensor in state.items()}, notes


def _decoder(names: Names, hints: Hints, grid: Grid, entries: Entries) -> tuple[State, Params, tuple[str, ...]]:
    width = len(names.take("decoder_embed.weight"))
    if not _is_sincos(names.take("decoder_pos_embed"), grid):
        raise ValueError(
            "decoder_pos_embed: found positions that are not MAE's fixed sines and cosines; here a decoder has these "
            "only; import the encoder alone, without the names that begin with decoder_"
        )
    heads = hints.decoder_heads or width // DECODER_HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ValueError(f"decoder_heads: shapes do not tell them for a decoder of width {width}; give decoder_heads")
    notes: tuple[str, ...] = ()
    if hints.decoder_heads is None:
        notes = (f"{heads} attention heads are assumed in the decoder of width {width}: shapes do not tell.",)
    state = {"token": names.take("mask_token")}
    for ours, theirs in (("embed", "decoder_embed"), ("norm", "decoder_norm"), ("project", "decoder_pred")):
        state |= {f"{ours}.{name}": names.take(f"{theirs}.{name}") for name in ("weight", "bias")}
    blocks = names.below("decoder_blocks.")
    state |= {re.sub(r"^decoder_", "", name): tensor for name, tensor in blocks.items()}
    for name in ("project.weight", "project.bias"):
        rows = state[name].reshape(entries.side, entries.side, entries.depth, -1)
        state[name] = rows.movedim(2, 0).reshape(state[name].shape)
    hidden = len(names.take("decoder_blocks.0.mlp.fc1.weight"))
    head: Params = {
        "name": "transformer_decoder",
        "width": width,
        "depth": names.counted("decoder_blocks.#."),
        "heads": heads,
        "mlp_ratio": hidden / width,
    }
    return state, head, notes


def _grid(hints: Hints, patch_px: int, rows: int, expected: Callable[[int, int], int]) -> Grid:
    """Find the grid whose positions take so many rows: the one of the size that is given, else a square one."""
    if hints.size:
        grid = Grid(*hints.size, patch_px)
        if expected(*grid.shape) == rows:
            return grid
        raise ValueError(
            f"size: found {list(hints.size)}, which is {list(grid.shape)} patches of {patch_px} px; the file's table "
            f"of positions has {rows} rows and that takes {expected(*grid.shape)}; leave size out or give the size in "
            "training"
        )
    side = next((side for side in range(1, rows + 2) if expected(side, side) >= rows), 1)
    if expected(side, side) != rows:
        raise ValueError(f"size: a table of positions of {rows} rows is of no square image; give size")
    return Grid(side * patch_px, side * patch_px, patch_px)


def _heads(width: int) -> int:
    if width in STANDARD_HEADS:
        return STANDARD_HEADS[width]
    if width % 64:
        raise ValueError(f"heads: shapes do not tell the attention heads of a ViT of width {width}; give heads")
    return width // 64


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    """Tell whether a table [1, 1 + n, width] is the fixed one, with zeros for the class token."""
    width = table.shape[-1]
    if width % 4:
        return False
    fixed = torch.from_numpy(sincos(grid, width))
    close = (table[0, 1:].double() - fixed).abs().max() < CLOSE
    return bool(close) and bool((table[0, 0].abs() < CLOSE).all())
