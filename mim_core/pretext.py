"""Masked image modelling: hide patches, encode, predict what was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mim_core import ranks
from mim_core.adversarial import Critic
from mim_core.data.order import Address, placings, read_images
from mim_core.data.pack import Pack, Split
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.grid import (
    Entries,
    Grid,
    Wanted,
    chosen,
    entries_hidden,
    near,
    patchify,
    replaced,
    rows_at,
    rows_of,
    unpatchify,
)
from mim_core.heads import HEADS
from mim_core.masks import generators
from mim_core.spec import Piece, build
from mim_core.targets import TARGETS
from mim_core.transforms import Augment, normalise, place

Box = tuple[slice, slice]
RECORDED = 60_000_000
"""Parameters up to which a GPU waits for launches, and the memory of a recorded step is small.

A ViT-S with MAE's decoder has 47 million.
"""


class MaskedModel(nn.Module):
    """Encoder, fill and head: everything of a method that has parameters."""

    def __init__(self, encoder: Any, fill: Any, head: Any) -> None:
        super().__init__()
        self.encoder, self.fill, self.head = encoder, fill, head

    def forward(
        self, images: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b n"], wanted: Wanted
    ) -> Float[Tensor, "m v"]:
        """Predict the wanted positions of images whose hidden patches the encoder does not see.

        `hidden` may be on the CPU whatever the device of the images, or be what `Drop.tokens` takes instead; see
        `rows_of` for the form of `wanted`.
        """
        rows = None
        if self.head.alone and getattr(self.encoder, "selects", False) and not self.fill.drops:
            rows = None if wanted is None or wanted.dtype == torch.bool else wanted
        features, kept, summary = self.encode(images, hidden, rows)
        out: Tensor = self.head(features, wanted if rows is None else None, kept, summary)
        return out

    def encode(
        self, images: Tensor, hidden: Tensor, rows: Int[Tensor, "b m"] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode masked images: features [b, n, d], which patches they are of (None: all), class tokens [b, p, d].

        With `rows`, for encoders that select, the features are those patches' [b, m, d], and there is no class token.
        """
        tokens = self.encoder.embed(self.fill.pixels(images, hidden))
        tokens, kept = self.fill.tokens(tokens, hidden)
        features, summary = self.encoder.encode(tokens, kept, *(() if rows is None else (rows,)))
        return features, kept, summary


@dataclass(frozen=True)
class Masked:
    """A batch: uint8 images [b, c, H, W] and their hidden patches [b, n].

    Where that is left to the device: `boxes` [b, 5], how to place each image, and in place of hidden patches the
    samples' `addresses` [b, 2].
    """

    images: Tensor
    hidden: Tensor | None
    boxes: Tensor | None = None
    addresses: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Masked:
        """For torch's loader: memory that a GPU copies from while other work goes on."""
        hidden, boxes, addresses = (
            one if one is None else one.pin_memory() for one in (self.hidden, self.boxes, self.addresses)
        )
        return Masked(self.images.pin_memory(), hidden, boxes, addresses)


class Sent(NamedTuple):
    """A batch on the device, with all settled there that depends on numbers of hidden patches.

    `hidden`: as the model takes it, None where the device draws it by `addresses`. `wanted`: see `rows_of`; `weights`
    [m, k], of the wanted entries. `entries`: how many there are, where ranks have to know. While `wanted` is no mask,
    batches of equal shapes go through equal operations.
    """

    images: Tensor
    hidden: Tensor | None
    boxes: Tensor | None = None
    addresses: Tensor | None = None
    wanted: Tensor | None = None
    weights: Tensor | None = None
    entries: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """Masks that the device draws for a whole batch: of `count` hidden patches in every image."""

    mask: Callable[[Tensor, Grid], Tensor]
    count: int


@dataclass(frozen=True)
class MaskedFetch:
    """Make a masked batch; picklable, so that loader workers can have it.

    `on_device` leaves crop and flip, drawn here, to a device that does them faster (see `transforms.place`); without a
    `mask` the device draws that too.
    """

    split: Split
    grid: Grid
    mask: Callable[[np.random.Generator, Grid], np.ndarray] | None
    augment: Augment | None
    seed: int
    on_device: bool = False

    def __call__(self, addresses: Sequence[Address]) -> Masked:
        left = self.augment if self.on_device and self.augment and self.augment.only_places else None
        images = read_images(self.split, addresses, None if left else self.augment, self.seed)
        hidden, boxes, drawn_by = None, None, None
        if self.mask:
            at = generators(self.seed)
            drawn = [self.mask(at(*address), self.grid).reshape(-1) for address in addresses]
            hidden = torch.from_numpy(np.stack(drawn))
        else:
            drawn_by = torch.tensor(addresses, dtype=torch.int64)
        if left:
            boxes = torch.tensor(placings(left, addresses, self.seed, *images.shape[-2:]), dtype=torch.int64)
        return Masked(images, hidden, boxes, drawn_by)


@dataclass(frozen=True)
class Scope:
    """What the loss is taken over: the `hidden` part, a `ring` of visible px round it too, or `all`.

    Errors on visible entries count `visible_weight` times (10 in Context Encoder's ring, section 3.2 and its code).
    """

    part: Literal["hidden", "ring", "all"] = "hidden"
    ring_px: int = 0
    visible_weight: float = 1.0


class Pretext(nn.Module):
    """The objective of a masked model: its prediction against a target, over the scope's entries.

    The mean runs over the entries of the whole batch, as in the published code of all these methods, and not over each
    image first. With a `critic` there are two players. On several ranks the batch is that of all of them, and `shared`
    is the model as they train it.
    """

    def __init__(
        self,
        model: MaskedModel,
        target: Any,
        loss: Callable[[Tensor, Tensor], Tensor],
        scope: Scope,
        pack: Pack,
        compute: Compute,
        critic: Critic | None = None,
        critic_weight: float = 0.0,
        critic_sees: Box | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        super().__init__()
        self.model, self.target = model, target
        self.loss, self.scope, self.pack, self.compute = loss, scope, pack, compute
        self.critic, self.critic_weight, self.critic_sees = critic, critic_weight, critic_sees
        self.drawn = drawn
        self.shared: nn.Module | None = None

    def losses(self, batch: Masked, step: int) -> Iterator[tuple[str, Tensor]]:
        return self.losses_of(self.sent(batch))

    def sent(self, batch: Masked) -> Sent:
        """Bring a batch to the device. What is wanted is settled on the CPU, where masks are: no GPU is waited for."""
        images, boxes, addresses = map(self._send, (batch.images, batch.boxes, batch.addresses))
        assert images is not None
        if batch.hidden is None:
            assert addresses is not None
            assert self.drawn
            entries = torch.tensor(self.drawn.count * len(batch)) if self.shared else None
            return Sent(images, None, boxes, addresses, entries=self._send(entries))
        mask, weights = self.wanted(batch.hidden)
        wanted = rows_of(mask)
        weighed = None if weights is None else chosen(weights, wanted)
        entries = (mask.sum() if weighed is None else (weighed > 0).sum()) if self.shared else None
        hidden = self.model.fill.kept(batch.hidden) if self.model.fill.drops else batch.hidden
        return Sent(images, *map(self._send, (hidden, boxes, addresses, wanted, weighed, entries)))

    @property
    def records(self) -> bool:
        """Whether a step on a batch that was sent may be recorded as a CUDA graph (see `train`), and gains by it."""
        parameters = sum(one.numel() for one in self.model.parameters())
        return self.compute.device.type == "cuda" and self.shared is None and parameters <= RECORDED

    def _send(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else self.compute.send(values)

    def losses_of(self, sent: Sent) -> Iterator[tuple[str, Tensor]]:
        """Give the losses of a batch on the device; nothing is read from there, and nothing more sent."""
        images, hidden, wanted = sent.images, sent.hidden, sent.wanted
        if hidden is None:
            hidden, wanted = self._draw(sent)
        if sent.boxes is not None:
            images = place(images, sent.boxes)
        images = normalise(images, self.pack.mean, self.pack.std)
        target = self.target(images)
        together = self.shared if self.model.training else None
        with self.compute.autocast():
            prediction = (together or self.model)(images, hidden, wanted)
        prediction = prediction.float()
        loss = self.mean_loss(prediction, chosen(target, wanted), sent.weights)
        if together and sent.entries is not None:
            # The mean of the ranks' losses is to be that over all entries, however many of them each rank has.
            entries = sent.entries.float()
            loss = loss * entries / ranks.mean(entries)
        if self.critic:
            real, fake = self.views(prediction, target, wanted)
            with self.compute.autocast():
                critic_loss = self.critic.loss(real, fake)
            yield "critic", critic_loss
            with self.compute.autocast():
                fooled = self.critic.fooled(fake)
            loss = (1 - self.critic_weight) * loss + self.critic_weight * fooled
        yield "model", loss

    def _draw(self, sent: Sent) -> tuple[Tensor, Tensor]:
        """Draw the masks: what the model takes of them, and the hidden positions of each image."""
        assert self.drawn
        assert sent.addresses is not None
        encoder, count = self.model.encoder, self.drawn.count
        hidden = self.drawn.mask(sent.addresses, encoder.grid).flatten(1)
        at_output = hidden
        if encoder.output != encoder.grid:
            at_output = self.drawn.mask(sent.addresses, encoder.output).flatten(1)
        wanted = rows_at(at_output, count * encoder.output.count // encoder.grid.count)
        return rows_at(~hidden, encoder.grid.count - count) if self.model.fill.drops else hidden, wanted

    def wanted(self, hidden: Bool[Tensor, "b n"]) -> tuple[Bool[Tensor, "b p"], Float[Tensor, "b p k"] | None]:
        """Tell which positions to predict, and the weight of each entry there (None: 1 throughout)."""
        encoder, entries, scope = self.model.encoder, self.target.entries, self.scope
        same = encoder.grid == encoder.output
        if scope.part == "all":
            wanted = hidden.new_ones(len(hidden), encoder.output.count)
            if scope.visible_weight == 1:
                return wanted, None
            inside = entries_hidden(hidden, encoder.grid, encoder.output, entries)
            return wanted, torch.where(inside, 1.0, scope.visible_weight)
        if scope.part == "hidden" and same:
            return hidden, None
        if scope.part == "hidden" and (whole := _whole(hidden, encoder.grid, encoder.output)) is not None:
            return whole, None
        inside = entries_hidden(hidden, encoder.grid, encoder.output, entries)
        if scope.part == "hidden":
            return inside.any(-1), inside.float()
        around = near(hidden, encoder.grid, scope.ring_px)
        around = entries_hidden(around, encoder.grid, encoder.output, entries) & ~inside
        return (inside | around).any(-1), inside + scope.visible_weight * around

    def mean_loss(
        self, prediction: Float[Tensor, "m v"], target: Tensor, weights: Float[Tensor, "m k"] | None
    ) -> Float[Tensor, ""]:
        """Take the loss of predictions [m, v] against true entries [m, k], as the mean over those with a weight."""
        entries = self.target.entries
        if entries.classes:
            logits = entries.logits(prediction).flatten(0, 1)
            each = self.loss(logits, target.reshape(-1, entries.side**2)).reshape(target.shape)
        else:
            each = self.loss(prediction, target)
        if weights is None:
            return each.mean()
        # Over the number of entries and not the sum of weights: as published, weights scale gradients only.
        return (each * weights).sum() / (weights > 0).sum().clamp(min=1)

    def views(self, prediction: Tensor, target: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
        """Give what the critic compares: real pictures, and the same with predictions in the wanted positions."""
        shape, side = self.model.encoder.output.shape, self.target.entries.side
        mixed = replaced(target, wanted, prediction)
        box = self.critic_sees or (slice(None), slice(None))
        real, fake = (unpatchify(patches, shape, side)[..., box[0], box[1]] for patches in (target, mixed))
        return real, fake

    @torch.no_grad()
    def recover(self, batch: Masked) -> dict[str, Tensor]:
        """Predict every position; gives pictures in [0, 1]: originals, predictions, composites, and hidden pixels."""
        assert batch.hidden is not None
        images = normalise(batch.images.to(self.compute.device), self.pack.mean, self.pack.std)
        hidden = batch.hidden.to(self.compute.device)
        encoder = self.model.encoder
        everywhere = hidden.new_ones(len(hidden), encoder.output.count)
        with self.compute.autocast():
            prediction = self.model(images, hidden, everywhere).float()
        pictures = self.target.render(prediction.reshape(*everywhere.shape, -1), images)
        originals = batch.images.to(self.compute.device).float() / 255
        pixels = encoder.grid.pixels(hidden)
        composites = torch.where(pixels[:, None], pictures, originals)
        return {"originals": originals, "predictions": pictures, "composites": composites, "hidden": pixels}


def assemble(
    row: Any,
    size: tuple[int, int],
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tokenizer: nn.Module | None = None,
) -> tuple[MaskedModel, Any]:
    """Build a row's pieces, wired to each other: the model and the target, which has no trained parameters.

    `tokenizer`: for a target that is fitted. Raises ValueError, beginning with the piece, where pieces do not fit.
    """
    fitted = (tokenizer,) if "fitted" in row.target.params() else ()
    encoder = _named("encoder", lambda: build(ENCODERS, row.encoder, size, channels))
    target = _named("target", lambda: build(TARGETS, row.target, encoder.output, mean, std, *fitted))
    fill = _named("fill", lambda: fill_of(row.fill, encoder, mean, std))
    head = _named("head", lambda: head_of(row.head, encoder, target.entries))
    return MaskedModel(encoder, fill, head), target


def fill_of(piece: Piece, encoder: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Build the fill of an encoder's input; raises ValueError where they do not fit."""
    return build(FILLS, piece, encoder.embed_width, encoder.grid, mean, std)


def head_of(piece: Piece, encoder: Any, entries: Entries) -> Any:
    """Build the head that predicts `entries` from an encoder's output; raises ValueError where they do not fit."""
    return build(HEADS, piece, encoder.width, encoder.output, entries, getattr(encoder, "feature_shape", None))


def _named(piece: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{piece}: {error}") from None


def _whole(hidden: Bool[Tensor, "b n"], masked: Grid, positions: Grid) -> Bool[Tensor, "b p"] | None:
    """Tell which positions are hidden where each is so as a whole or not at all, else None."""
    side, rest = divmod(positions.patch_px, masked.patch_px)
    if rest:
        return None
    cells = patchify(hidden.reshape(-1, 1, *masked.shape), side)
    whole = cells.all(-1)
    return whole if torch.equal(whole, cells.any(-1)) else None


def hole(wanted: Bool[Tensor, " p"], grid: Grid, side: int) -> Box:
    """Find the box round the wanted positions, in a picture that has `side` px for each of `grid`'s cells."""
    cells = wanted.reshape(grid.shape)
    rows, columns = cells.any(1).nonzero().flatten(), cells.any(0).nonzero().flatten()
    return (
        slice(int(rows[0]) * side, (int(rows[-1]) + 1) * side),
        slice(int(columns[0]) * side, (int(columns[-1]) + 1) * side),
    )
