"""Files in and out: published weights as a run's products, and a run's encoder as a file for timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_core import checkpoint
from mim_core.published import export
from mim_core.published.imported import Imported, Pieces, model, tokenizer
from mim_core.published.read import read_state
from mim_core.published.recognise import convert
from mim_core.published.tokenizers import half
from mim_core.spec import check


@dataclass(frozen=True)
class Report:
    """What was written, in words for people: `checks` were made and passed, `notes` is what to know, and `call` builds
    the model in Python (None where nothing but this project does)."""

    family: str
    pieces: Mapping[str, Any]
    parameters: int
    files: Sequence[Path]
    checks: Sequence[str]
    notes: Sequence[str] = ()
    unused: Sequence[str] = ()
    call: str | None = None


def import_file(
    path: Path,
    out: Path,
    *,
    decoder: Path | None = None,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Report:
    """Write published weights into the folder `out` as a run's products.

    An encoder becomes `encoder.safetensors`, which a downstream row can begin from, and with its fill and head, where
    they are there, `model.safetensors`; a tokenizer becomes `tokenizer.safetensors`. `decoder` is the second file of a
    tokenizer whose halves are apart. Other hints as in `convert`. What was written is read again and must give the same
    numbers on random images. Raises ValueError where the file cannot be read, is of no known family, or fails a check.
    """
    state = read_state(path)
    if decoder:
        state = half(state) | half(read_state(decoder))
    imported = convert(state, size=size, heads=heads, decoder_heads=decoder_heads)
    for name, tensor in (pair for weights in imported.weights.values() for pair in weights.items()):
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: found numbers in {name} that are not finite; fetch the file again")
    files, checks, call = (_tokenizer if imported.pieces.tokenizer else _encoder)(imported, out)
    return Report(
        imported.family,
        imported.pieces.model_dump(mode="json", exclude_none=True),
        sum(tensor.numel() for weights in imported.weights.values() for tensor in weights.values()),
        files,
        checks,
        imported.notes,
        imported.unused,
        call,
    )


def export_row(weights: Path, out: Path) -> Report:
    """Write the encoder of a run's file (of an encoder or a classifier) into the folder `out`, as timm loads it.

    Raises ValueError where the file says no encoder, timm has none of the kind, or its features are not ours.
    """
    state, about = checkpoint.read_weights(weights)
    if not about.get("encoder"):
        raise ValueError(
            f"{weights}: found no encoder in the header; it must be encoder.safetensors or classifier.safetensors of a "
            "run; run the row again"
        )
    encoder = check(Pieces, {"encoder": about["encoder"]}, str(weights)).encoder
    assert encoder
    notes: tuple[str, ...] = ()
    if any(name.startswith("encoder.") for name in state):
        inside = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
        notes = (f"{len(state) - len(inside)} tensors of the task's own layers are left out.",)
        state = {name.removeprefix("encoder."): tensor for name, tensor in inside.items()}
    size, channels = _pair(about["size"]), about["channels"]
    found = export.to_timm(encoder, state, size, channels)
    path = out / "timm.safetensors"
    call = export.create_call(found, path)
    checkpoint.write_weights(path, found.weights, {**about, "timm": call})
    try:
        difference = export.check(encoder, state, size, channels, found, path)
    except ValueError:
        path.unlink()
        raise
    return Report(
        f"timm's {found.name}",
        {"encoder": encoder.model_dump(mode="json")},
        sum(tensor.numel() for tensor in state.values()),
        [path],
        [f"features of {export.IMAGES} random images: timm's differ from ours by {difference:.1g} at most"],
        (*notes, f"Images are normalised by mean {about.get('mean')} and deviation {about.get('std')}, of [0, 1]."),
        call=call,
    )


def _encoder(imported: Imported, out: Path) -> tuple[list[Path], list[str], str | None]:
    pieces, size, channels, found = imported.pieces, imported.size, imported.channels, model(imported)
    assert pieces.encoder
    assert size
    assert imported.colours
    mean, std = imported.colours
    about = {"encoder": pieces.encoder.model_dump(mode="json"), "size": list(size), "channels": channels}
    about |= {"mean": list(mean), "std": list(std)}
    files = [out / "encoder.safetensors"]
    checkpoint.write_weights(files[0], found.encoder.state_dict(), about)
    images = export.random_images(channels, size)
    ours, again = export.features(found.encoder, images), export.features(_reread(files[0]), images)
    checks = [_told("features", export.compare(ours, again, f"{files[0]}, read again"))]
    if pieces.head:
        files.append(out / "model.safetensors")
        said = {"pieces": pieces.model_dump(mode="json", exclude_none=True), "family": imported.family, **about}
        checkpoint.write_weights(files[1], found.state_dict(), said)
        whole = model(imported)
        whole.load_state_dict(checkpoint.read_weights(files[1])[0])
        difference = export.compare(_predict(found, images), _predict(whole, images), f"{files[1]}, read again")
        checks.append(_told("predictions", difference))
    try:
        call = export.create_call(export.to_timm(pieces.encoder, {}, size, channels), "timm.safetensors")
    except ValueError:
        call = None
    return files, checks, call


def _tokenizer(imported: Imported, out: Path) -> tuple[list[Path], list[str], str | None]:
    pieces, found = imported.pieces, tokenizer(imported)
    assert pieces.tokenizer
    path = out / "tokenizer.safetensors"
    about = {"tokenizer": pieces.tokenizer.model_dump(mode="json"), "channels": imported.channels}
    checkpoint.write_weights(path, found.state_dict(), about)
    again = tokenizer(imported)
    again.load_state_dict(checkpoint.read_weights(path)[0])
    side = 4 * found.stride
    images = export.random_images(imported.channels, (side, side)).sigmoid()
    with torch.no_grad():
        difference = export.compare(found.logits(images), again.logits(images), f"{path}, read again")
    return [path], [_told("logits", difference)], None


def _reread(path: Path) -> Any:
    """Build an encoder from nothing but its file, as a job does."""
    weights, about = checkpoint.read_weights(path)
    pieces = check(Pieces, {"encoder": about["encoder"]}, str(path))
    return model(Imported("", pieces, {"encoder": weights}, about["channels"], _pair(about["size"]))).encoder


@torch.no_grad()
def _predict(found: Any, images: Tensor) -> Tensor:
    """Predict at every position, with every other patch hidden."""
    encoder = found.encoder
    hidden = (torch.arange(encoder.grid.count) % 2 == 0).expand(len(images), -1)
    wanted = torch.ones(len(images), encoder.output.count, dtype=torch.bool)
    if found.fill:
        out: Tensor = found(images, hidden, wanted)
        return out
    features, summary = encoder.encode(encoder.embed(images))
    decoded: Tensor = found.head(features, wanted, None, summary)
    return decoded


def _told(what: str, difference: float) -> str:
    return f"{what} on {export.IMAGES} random images: the written file's differ by {difference:.1g}"


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return height, width
