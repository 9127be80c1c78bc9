"""The Context Encoder's inpainting net (Pathak et al., CVPR 2016), as re-expressed in torch from its Lua code.

Names are those of the Lua code's nested sequences: `0.<i>` the encoder with its bottleneck, 1 the bottleneck's norm,
from 3 on the decoder. A convolution is followed by its batch norm, if any, and an activation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mim_core.devices import unreal
from mim_core.encoders import ENCODERS
from mim_core.grid import Entries
from mim_core.published.imported import Hints, Imported, Names, Params, Pieces, State, halves
from mim_core.spec import build, check

NAME = re.compile(r"(0\.)?(\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)$")


def is_inpainting(names: Names) -> bool:
    """Tell whether every name is a place in those sequences."""
    return {"0.0.weight", "1.weight", "3.weight"} <= names.state.keys() and all(map(NAME.match, names.state))


def inpainting(names: Names, hints: Hints) -> Imported:
    """Read the generator: the encoder `conv` and its decoder, which draws the central part of half the side.

    The code's variant for random regions, with one layer more, has widths that no head here has, and is refused.
    Norms that have no running moments in the file get none: they work in training mode only. A bias before a norm does
    nothing but shift the running mean, and goes into it where there is no place for it.
    """
    inside = [f"0.{index}" for index in sorted(_indices(names, "0."))]
    outside = [str(index) for index in sorted(_indices(names, ""))]
    encoder = [*_layers(names, inside[:-1]), _layers(names, [inside[-1], outside[0]])[0]]
    decoder = _layers(names, outside[1:])
    entry, bottleneck = names.take("0.0.weight"), names.take(f"{inside[-1]}.weight")
    base, channels, layers = len(entry), int(entry.shape[1]), len(encoder) - 1
    side = 4 * 2**layers
    height, width = hints.size or (side, side)
    last = names.take(f"{decoder[-1][0]}.weight")
    found: Params = {
        "encoder": {"name": "conv", "base": base, "layers": layers, "bottleneck": len(bottleneck)},
        "head": {
            "name": "channelwise_decoder",
            "base": int(last.shape[0]),
            "layers": len(decoder) - 1,
            "norm": "batch",
            "final": "tanh",
            "region": "centre" if 4 * 2 ** (len(decoder) - 1) == side // 2 else "whole",
        },
    }
    weights: dict[str, State] = {"encoder": {}, "head": {}}
    for index, (conv, norm) in enumerate(encoder):
        place = f"stages.{index}"
        weights["encoder"] |= {f"{place}.0.{part}": names.take(f"{conv}.{part}") for part in ("weight", "bias")}
        if norm:
            weights["encoder"] |= _norm(names, norm, f"{place}.1")
    for conv, norm in decoder:
        place = f"decoder.{int(conv) - 3}"
        weights["head"][f"{place}.weight"] = names.take(f"{conv}.weight")
        bias = names.take(f"{conv}.bias")
        if norm:
            weights["head"] |= _norm(names, norm, f"decoder.{int(norm) - 3}", bias)
        else:
            weights["head"][f"{place}.bias"] = bias
    pieces = check(Pieces, found, "imported")
    assert pieces.encoder
    with unreal():
        cell_px = build(ENCODERS, pieces.encoder, (height, width), channels).output.patch_px
    notes = ("Its images are scaled to [-1, 1], and holes are filled with a colour of its own: give it filled images.",)
    return Imported(
        "Context Encoder's inpainting net",
        pieces,
        weights,
        channels,
        (height, width),
        halves(channels),
        Entries(int(last.shape[1]), cell_px),
        names.left(),
        notes,
    )


def _indices(names: Names, prefix: str) -> set[int]:
    matches = [match for name in names.state if (match := NAME.match(name))]
    return {int(match[2]) for match in matches if (match[1] or "") == prefix}


def _layers(names: Names, places: Sequence[str]) -> list[tuple[str, str | None]]:
    """Pair each convolution's place with its norm's."""
    layers: list[tuple[str, str | None]] = []
    for place in places:
        if names.take(f"{place}.weight").ndim == 4:
            layers.append((place, None))
        else:
            layers[-1] = (layers[-1][0], place)
    return layers


def _norm(names: Names, place: str, ours: str, bias: Tensor | None = None) -> State:
    state = {f"{ours}.{part}": names.take(f"{place}.{part}") for part in ("weight", "bias")}
    width = state[f"{ours}.weight"]
    tracked = f"{place}.running_mean" in names
    mean = names.take(f"{place}.running_mean") if tracked else torch.zeros_like(width)
    variance = names.take(f"{place}.running_var") if tracked else torch.ones_like(width)
    moments = {
        "running_mean": mean - bias if tracked and bias is not None else mean,
        "running_var": variance,
        "num_batches_tracked": torch.tensor(int(tracked)),
    }
    return state | {f"{ours}.{part}": value for part, value in moments.items()}
