"""Heads that see one position at a time. Only wanted positions are computed: exact, as none reads another."""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import PositiveInt
from timm.layers import Mlp
from torch import Tensor, nn

from mim_core.grid import Entries, Grid, Wanted, chosen
from mim_core.heads.head import Head, all_present, one_each


class Linear(Head):
    """One linear layer a position (SimMIM, section 3.3: a 1x1 convolution and pixel shuffle).

    The same values in the same order as the published convolution; the shuffle itself is the target's `render`.
    `norm`: a LayerNorm before it (MaskFeat's head).
    """

    alone = True

    def __init__(
        self,
        width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        norm: bool = False,
    ) -> None:
        super().__init__(width, grid, entries)
        one_each(grid, features)
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity()
        self.project: nn.Module = nn.Linear(width, entries.values)

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        wanted: Wanted,
        kept: Int[Tensor, "b n"] | None = None,
        summary: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "m v"]:
        all_present(kept)
        out: Tensor = self.project(self.norm(chosen(features, wanted)))
        return out


class MLP(Linear):
    """Two linear layers with a GELU between (SimMIM, section 4.2, "2-layer MLP").

    `hidden`: width between them, the features' own by default: at Swin-B 1.05 M parameters more than one layer, where
    the paper's table has 90.9 M against 89.9 M.
    """

    def __init__(
        self,
        width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        hidden: PositiveInt | None = None,
    ) -> None:
        super().__init__(width, grid, entries, features)
        self.project = Mlp(width, hidden or width, entries.values)
