"""Published image tokenizers: DALL-E's, and the small one that BEiT's code offers beside it."""

from __future__ import annotations

import re

import torch

from mim_core.devices import unreal
from mim_core.published.imported import Hints, Imported, Names, Params, Pieces, State
from mim_core.spec import build, check
from mim_core.tokenizers import TOKENIZERS

FIRST = "blocks.group_1.block_1.res_path.conv_1"


def is_large(names: Names) -> bool:
    """Tell whether names are of DALL-E's tokenizer, or of one half of it."""
    return any(f"{FIRST}." in name for name in names.state)


def half(state: State) -> State:
    """Put `encoder.` or `decoder.` before the names of a file that holds one half: its entry tells which.

    The encoder begins with a convolution of 7 x 7, the decoder with one of 1 x 1. Other files stay as they are.
    """
    entry = state.get("blocks.input.w", state.get("blocks.input.weight"))
    if entry is None:
        return state
    prefix = "encoder" if entry.shape[-1] > 1 else "decoder"
    return {f"{prefix}.{name}" if name.startswith("blocks.") else name: tensor for name, tensor in state.items()}


def large(names: Names, hints: Hints) -> Imported:
    """Read DALL-E's tokenizer: `w` and `b` become `weight` and `bias`.

    Encoder and decoder are published apart. Where one is not there its weights are zeros: without the decoder, tokens
    are drawn as grey.
    """
    state = half(names.state)
    ours = {re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name)): tensor for name, tensor in state.items()}
    halves = [name for name in ("encoder", "decoder") if f"{name}.{FIRST}.weight" in ours]
    reader = Names(ours)
    where = halves[0]
    entry, output = (reader.take(f"{where}.blocks.{end}.weight") for end in ("input", "output.conv"))
    if where == "encoder":
        base, channels, codes = len(entry), int(entry.shape[1]), len(output)
    else:
        base, channels, codes = int(output.shape[1]), len(output) // 2, int(entry.shape[1])
    piece: Params = {
        "name": "dvae",
        "codes": codes,
        "base": base,
        "blocks": reader.counted(f"{where}.blocks.group_1.block_#."),
    }
    pieces = check(Pieces, {"tokenizer": piece}, "imported")
    assert pieces.tokenizer
    weights = reader.below("encoder.blocks.", "decoder.blocks.")
    notes: tuple[str, ...] = ()
    if len(halves) == 1:
        (absent,) = {"encoder", "decoder"} - {where}
        with unreal():
            whole = build(TOKENIZERS, pieces.tokenizer, channels).state_dict()
        missing = {name: tensor for name, tensor in whole.items() if name.startswith(f"{absent}.")}
        weights |= {name: torch.zeros(tensor.shape) for name, tensor in missing.items()}
        use = "cannot tell tokens" if absent == "encoder" else "draws every token as grey"
        notes = (f"The {absent} is not in the file: its weights are zeros, and the tokenizer {use}.",)
    family = f"DALL-E's tokenizer ({' and '.join(halves)})"
    return Imported(family, pieces, {"tokenizer": weights}, channels, unused=reader.left(), notes=notes)


def is_small(names: Names) -> bool:
    """Tell whether names are of the small tokenizer."""
    return {"codebook.weight", "encoder.0.0.weight", "decoder.0.0.weight"} <= names.state.keys()


def small(names: Names, hints: Hints) -> Imported:
    """Read the small tokenizer, whose names are ours. Its likelihood follows from the maps that it draws."""
    entry = names.take("encoder.0.0.weight")
    codes, code_width = names.take("codebook.weight").shape
    layers = sum(f"encoder.{index}.0.weight" in names for index in range(len(names.state)))
    residuals = names.counted("encoder.#.net.")
    last = max(int(match[1]) for name in names.state if (match := re.match(r"decoder\.(\d+)\.", name)))
    drawn, channels = len(names.take(f"decoder.{last}.weight")), int(entry.shape[1])
    piece: Params = {
        "name": "dvae_small",
        "codes": int(codes),
        "layers": layers,
        "width": len(entry),
        "code_width": int(code_width),
        "blocks": residuals // layers,
        "likelihood": "l2" if drawn == channels else "laplace",
    }
    weights = names.below("encoder.", "decoder.", "codebook.")
    pieces = check(Pieces, {"tokenizer": piece}, "imported")
    return Imported("small discrete VAE", pieces, {"tokenizer": weights}, channels, unused=names.left())
