"""A transformer that puts back the tokens which the encoder never read (MAE: He et al., CVPR 2022, section 3)."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from mim_core.blocks import block_at
from mim_core.grid import Entries, Grid, Wanted, chosen
from mim_core.heads.head import Head, one_each
from mim_core.positions import sincos
from mim_core.spec import Depth


class TransformerDecoder(Head):
    """Mask tokens at the positions of dropped patches, positions of its own, transformer blocks, LayerNorm, linear.

    The encoder's class tokens go in front through the same first layer, without a position (a row of zeros, as
    published). Where the encoder read every token (`kept` is None), none is put back and the mask token rests. Blocks
    run on all positions; what follows the last one's keys and values is for the wanted ones only, which is exact.

    `init`: `xavier` uniform linear layers as published, or timm's truncated normal of 0.02.
    Raises ValueError where `heads`, or 4 (for the positions), does not divide `width`.
    """

    restores = True
    positions: Tensor

    def __init__(
        self,
        encoder_width: int,
        grid: Grid,
        entries: Entries,
        features: tuple[int, int] | None = None,
        *,
        width: PositiveInt = 512,
        depth: Depth = 8,
        heads: PositiveInt = 16,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        init: Literal["timm", "xavier"] = "xavier",
    ) -> None:
        super().__init__(encoder_width, grid, entries)
        one_each(grid, features)
        if width % heads:
            raise ValueError(f"heads: found {heads}; it must divide the head's width {width}; change one of them")
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(encoder_width, width)
        # Of three dimensions, as published: weight decay leaves vectors out, and this token is decayed.
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", torch.tensor(sincos(grid, width), dtype=torch.float32), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        self.project = nn.Linear(width, entries.values)
        nn.init.normal_(self.token, std=0.02)
        self.apply(_xavier if init == "xavier" else functools.partial(init_weights_vit_timm, needs_reset=False))

    def forward(
        self,
        features: Float[Tensor, "b n d"],
        wanted: Wanted,
        kept: Int[Tensor, "b n"] | None = None,
        summary: Float[Tensor, "b s d"] | None = None,
    ) -> Float[Tensor, "m v"]:
        tokens = self.embed(features)
        if kept is not None:
            mask = self.token.to(tokens.dtype).expand(len(tokens), self.grid.count, -1)
            tokens = mask.scatter(1, kept[..., None].expand_as(tokens), tokens)
        tokens = tokens + self.positions
        if summary is not None:
            tokens = torch.cat([self.embed(summary), tokens], dim=1)
        if wanted is not None and wanted.dtype != torch.bool:
            first = tokens.shape[1] - self.grid.count
            tokens = block_at(self.blocks[-1], self.blocks[:-1](tokens), wanted + first).flatten(0, 1)
        else:
            tokens = chosen(self.blocks(tokens)[:, -self.grid.count :], wanted)
        out: Tensor = self.project(self.norm(tokens))
        return out


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
