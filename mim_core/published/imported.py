"""What published weights become: pieces as a row names them, and weights under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor, nn

from mim_core.devices import unreal
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.grid import Entries
from mim_core.heads import HEADS
from mim_core.pretext import MaskedModel, fill_of, head_of
from mim_core.spec import OneOf, Piece, Strict, build
from mim_core.tokenizers import TOKENIZERS

State = dict[str, Tensor]
Params = dict[str, Any]
Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation by channel, in units of [0, 1]."""

IMAGENET: Colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REBUILT = re.compile(r"(^|\.)(relative_position_index|attn_mask|num_batches_tracked|k_bias)$")
"""Tensors that published files hold though they follow from the architecture."""
HEADS_OF_CLASSES = ("head.", "classify.")
"""How the names of a fine-tuned model's classification layer begin."""


class Pieces(Strict):
    """Pieces of a row, as far as weights tell them."""

    encoder: Annotated[Piece, OneOf(ENCODERS)] | None = None
    fill: Annotated[Piece, OneOf(FILLS)] | None = None
    head: Annotated[Piece, OneOf(HEADS)] | None = None
    tokenizer: Annotated[Piece, OneOf(TOKENIZERS)] | None = None


def halves(channels: int) -> Colours:
    """Colours of images scaled to [-1, 1]."""
    return (0.5,) * channels, (0.5,) * channels


def imagenet(channels: int) -> Colours:
    """ImageNet's colours, or those of images scaled to [-1, 1] where there are other channels than three."""
    return IMAGENET if channels == 3 else halves(channels)


@dataclass(frozen=True)
class Hints:
    """What a user says of a model because shapes do not: (height, width) in px, attention heads."""

    size: tuple[int, int] | None = None
    heads: int | None = None
    decoder_heads: int | None = None


@dataclass(frozen=True)
class Imported:
    """A published model under our names.

    `weights` holds each piece's by the piece's name. `size` (height, width) in px, the `colours` that its images were
    normalised by and `entries`, what the head predicts at a position, are None where they do not apply. `unused`: names
    in the file that nothing here has a place for. `notes`: what a user must know.
    """

    family: str
    pieces: Pieces
    weights: Mapping[str, State]
    channels: int
    size: tuple[int, int] | None = None
    colours: Colours | None = None
    entries: Entries | None = None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Names:
    """A state dict that is read piece by piece; what nobody took is left over."""

    state: State
    taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str) -> Tensor:
        """Give a tensor; raises ValueError where it is missing."""
        if name not in self.state:
            raise ValueError(f"weights: {name} is missing; it belongs to this architecture; import the whole file")
        self.taken.add(name)
        return self.state[name]

    def below(self, *prefixes: str) -> State:
        """Take every tensor whose name begins with one of `prefixes`, but for those that are rebuilt."""
        names = [name for name in self.state if name.startswith(prefixes) and not REBUILT.search(name)]
        return {name: self.take(name) for name in names}

    def counted(self, pattern: str) -> int:
        """Count the numbers that stand for `#` in the names that begin so."""
        start = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
        return len({match.group(1) for name in self.state if (match := start.match(name))})

    def left(self, *spare: str) -> tuple[str, ...]:
        """Give what was not taken; raises ValueError unless it is rebuilt here or begins with one of `spare`."""
        left = sorted(self.state.keys() - self.taken)
        foreign = [name for name in left if not REBUILT.search(name) and not name.startswith(spare)]
        if foreign:
            few = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
            raise ValueError(
                f"weights: found {few}; the architectures here have no such parts, and without them its features would "
                "be others; drop these names only if they are no part of the encoder"
            )
        return tuple(left)

    def notes(self) -> tuple[str, ...]:
        """Say where the file has a classification layer: it is of its own classes and not of the encoder."""
        head = [name for name in self.state if name.startswith(HEADS_OF_CLASSES)]
        if not head:
            return ()
        return (f"The classification layer ({', '.join(head[:2])}) is left out: a task makes its own.",)


def model(imported: Imported) -> MaskedModel:
    """Build the pieces with their weights, in evaluation mode; a fill or head that is not there is None.

    Raises ValueError where weights do not fit, or there is no encoder.
    """
    if imported.pieces.encoder is None:
        raise ValueError(f"model: found {imported.family}; it has no encoder; build it with tokenizer()")
    built = _loaded(imported)
    return MaskedModel(built["encoder"], built.get("fill"), built.get("head")).eval()


def tokenizer(imported: Imported) -> Any:
    """Build a tokenizer with its weights, in evaluation mode; raises ValueError where there is none."""
    if imported.pieces.tokenizer is None:
        raise ValueError(f"tokenizer: found {imported.family}; it is no tokenizer; build it with model()")
    return _loaded(imported)["tokenizer"].eval()


def verified(imported: Imported) -> Imported:
    """Build the modules where they take no memory; raises ValueError where weights do not fit."""
    with unreal():
        _built(imported)
    return imported


def _loaded(imported: Imported) -> dict[str, nn.Module]:
    built = _built(imported)
    for name, module in built.items():
        module.load_state_dict(imported.weights[name])
    return built


def _built(imported: Imported) -> dict[str, nn.Module]:
    pieces, channels, built = imported.pieces, imported.channels, {}
    if pieces.tokenizer:
        built["tokenizer"] = build(TOKENIZERS, pieces.tokenizer, channels)
    if pieces.encoder:
        encoder = built["encoder"] = build(ENCODERS, pieces.encoder, imported.size, channels)
        if pieces.fill:
            colours = imported.colours or halves(channels)
            built["fill"] = fill_of(pieces.fill, encoder, *colours)
        if pieces.head:
            assert imported.entries, "a head comes with what it predicts"
            built["head"] = head_of(pieces.head, encoder, imported.entries)
    for name, module in built.items():
        _compare(module, imported.weights[name], name)
    return built


def _compare(module: nn.Module, weights: State, where: str) -> None:
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} has no place" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {list(weights[name].shape)} in the file and {list(own[name].shape)} here"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if faults:
        few = "; ".join(sorted(faults)[:4]) + ("; ..." if len(faults) > 4 else "")
        raise ValueError(
            f"{where}: found weights of another architecture: {few}; sizes are inferred from shapes; give `size` and "
            "`heads` where the images are not square or shapes do not tell"
        )
