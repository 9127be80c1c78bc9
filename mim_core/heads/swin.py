"""Swin's stages from its last to its first, as a head (SimMIM, section 4.2)."""

from __future__ import annotations

import functools
import math

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import PositiveInt
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from mim_core.grid import Entries, Grid, Wanted, chosen
from mim_core.heads.head import Head, all_present, one_each
from mim_core.spec import Counts


class InverseSwin(Head):
    """Swin's stages in reverse order, each but the first on a map of twice the side and half the width.

    An approximation: the paper gives no structure for its "inverse Swin" heads, and its code none of them. Parameter
    counts agree with its table within 1 %. A linear layer brings the features to `width` where theirs differs; the map
    is doubled between stages as long as its cells have an even side in px, and stages for which it cannot be are left
    out (a stride of 32 or 8 px allows all four stages, 4 px three). A LayerNorm and a linear layer then give each cell
    of the last map its block of entries; where the entries are coarser than that map, cells are averaged first.

    `width`, `heads`: of the first stage here, halved from stage to stage. `depths`: blocks a stage, in running order.
    `window`: side of the attention windows, in cells.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        width: PositiveInt,
        depths: Counts,
        heads: PositiveInt,
        window: PositiveInt,
    ) -> None:
        super().__init__(encoder_width, grid, entries)
        one_each(grid, features)
        halved = 2 ** (len(depths) - 1)
        if heads % halved or width % heads:
            raise ValueError(
                f"heads: found {heads} at width {width}; {len(depths)} stages need a multiple of {halved} that divides "
                "the width; change heads, width or depths"
            )
        self.embed = nn.Linear(encoder_width, width) if encoder_width != width else nn.Identity()
        # How often 2 divides the cell's side.
        halvings = (grid.patch_px & -grid.patch_px).bit_length() - 1
        stages: list[nn.Module] = []
        shape = grid.shape
        for stage, depth in enumerate(depths[: halvings + 1]):
            if stage:
                stages.append(Expand(width))
                width, heads, shape = width // 2, heads // 2, (2 * shape[0], 2 * shape[1])
            stages += [
                SwinTransformerBlock(width, shape, heads, window_size=window, shift_size=block % 2 * (window // 2))
                for block in range(depth)
            ]
        self.stages = nn.Sequential(*stages)
        self.parts = shape[0] // grid.shape[0]  # a position's cells on the last map, a side
        self.averaged = math.gcd(self.parts, entries.side)
        self.block = entries.side // self.averaged  # a cell's entries, a side
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, entries.maps * self.block**2)
        self.apply(functools.partial(init_weights_vit_timm, needs_reset=False))

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        wanted: Wanted,
        kept: Int[Tensor, "b n"] | None = None,
        summary: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "m v"]:
        all_present(kept)
        (h, w), parts, side = self.grid.shape, self.parts, self.averaged
        maps = self.stages(self.embed(features).unflatten(1, (h, w)))
        cells = maps.unflatten(2, (w, parts)).unflatten(1, (h, parts)).transpose(2, 3).flatten(1, 2)
        # Nothing below mixes positions, so that the rest is computed for the wanted ones only.
        cells = self.norm(chosen(cells, wanted))  # [m, parts, parts, d]
        cells = cells.unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean((2, 4))
        out: Tensor = F.pixel_shuffle(self.project(cells).permute(0, 3, 1, 2), self.block)
        return out.flatten(1)


class InverseSwinT(InverseSwin):
    """Swin-T's stages in reverse: 28 M parameters."""

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        width: PositiveInt = 768,
        depths: Counts = (2, 6, 2, 2),
        heads: PositiveInt = 24,
        window: PositiveInt = 7,
    ) -> None:
        super().__init__(encoder_width, grid, entries, features, width=width, depths=depths, heads=heads, window=window)


class InverseSwinB(InverseSwin):
    """Swin-B's stages in reverse: 87 M parameters."""

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        width: PositiveInt = 1024,
        depths: Counts = (2, 18, 2, 2),
        heads: PositiveInt = 32,
        window: PositiveInt = 7,
    ) -> None:
        super().__init__(encoder_width, grid, entries, features, width=width, depths=depths, heads=heads, window=window)


class Expand(nn.Module):
    """Patch expanding: double a map's sides and halve its width, Swin's patch merging in reverse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, maps: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h2 w2 d2"]:
        parts = self.expansion(maps).unflatten(-1, (2, 2, -1))  # [b, h, w, 2, 2, d2]
        out: Tensor = self.norm(parts.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        return out
