"""The contract of heads, and the errors that they share."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from mim_core.grid import Entries, Grid, Wanted


class Head(nn.Module):
    """Predicts `entries` at positions of `grid` from features of `width`.

    `restores`: whether it can work from the features of kept tokens only. `features` in a constructor: (rows, columns)
    of the encoder's feature map, None where they are the grid's.
    """

    restores: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    """Whether a prediction reads its own position's features only, so that the encoder need not give the others."""

    def __init__(
        self, width: int, grid: Grid, entries: Entries, features: tuple[int, int] | None = None, **params: Any
    ) -> None:
        super().__init__()
        self.grid = grid
        self.entries = entries

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        wanted: Wanted,
        kept: Int[Tensor, "b n"] | None = None,
        summary: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "m v"]:
        """Predict at the wanted positions: m rows in the order of a full [b, p, entries.values] indexed by `wanted`.

        `wanted`: see `mim_core.grid.chosen`.
        `kept`: each feature's position where the encoder read some tokens only; raises ValueError where the head needs
        all. `summary`: class tokens.
        """
        raise NotImplementedError


def one_each(grid: Grid, features: tuple[int, int] | None) -> None:
    """Raise ValueError where the feature map is not the positions' grid."""
    if features not in (None, grid.shape):
        raise ValueError(
            f"head: found a feature map of {features} for {grid.shape} positions; this head needs a feature at each "
            "position; choose channelwise_decoder, or an encoder whose output is a map of the image"
        )


def all_present(kept: Tensor | None) -> None:
    """Raise ValueError where the features are those of kept tokens only."""
    if kept is not None:
        raise ValueError(
            "head: found features of kept tokens only; this head needs every token; choose transformer_decoder, or a "
            "fill that drops none"
        )
