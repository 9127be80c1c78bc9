"""Vision transformers.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, and the form with relative positions of Bao et al.,
"BEiT", ICLR 2022, section 2.3. The module inside is timm's `VisionTransformer` or `Beit`, so weights load there under
timm's own names, which are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim_core.blocks import block_at, embed_patches
from mim_core.grid import Grid, Level
from mim_core.positions import sincos
from mim_core.spec import Depth

Share = Annotated[float, Field(ge=0, lt=1)]
Positions = Literal["learned", "sincos", "relative", "relative_per_block"]


class ViT(nn.Module):
    """Plain ViT: class token, pre-norm blocks, final LayerNorm.

    `positions`: "learned" from noise; "sincos", the fixed sines and cosines of MAE, which spare a short run the steps
    in which it would find out which patches are neighbours; "relative", a learned bias of attention for each offset
    between patches, in one table for all blocks, and no absolute positions (BEiT; SimMIM's ViT); "relative_per_block",
    the same with a table in each block (what their published fine-tuning uses). The relative forms have no bias of
    keys, and start as published: see `_init_relative`.
    `layer_scale`: initial factor of each residual branch (LayerScale; BEiT: 0.1 in base, 1e-5 in large models), or None
    for no such factors.
    `init`: "timm" leaves a plain form as timm makes it; "xavier" is MAE's, for sincos positions.
    `drop_path`: share of samples that skip a residual branch, in the last block; in the first it is 0.
    """

    drops = True
    selects = True
    """Whether `encode` can give the features of some patches only, and spare the last block the others."""
    decays_token = True
    """Whether weight decay holds for a mask token in front of it, as in the published pretraining."""

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        patch_px: PositiveInt = 16,
        width: PositiveInt = 768,
        depth: Depth = 12,
        heads: PositiveInt = 12,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        positions: Positions = "learned",
        layer_scale: Annotated[float, Field(gt=0)] | None = None,
        init: Literal["timm", "xavier"] = "timm",
        drop_path: Share = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: found {heads}; it must divide the width {width}")
        if init == "xavier" and positions != "sincos":
            raise ValueError(
                f"init: found xavier with positions {positions}; it belongs to sincos; set positions to sincos, or "
                "leave init out"
            )
        self.grid = self.output = Grid(*size, patch_px)
        self.width = self.embed_width = width
        self.depth = depth
        self.positions = positions
        # timm's blocks add their own table over all patches, whatever tokens they get.
        self.drops = self.selects = positions != "relative_per_block"
        common: dict[str, Any] = {
            "img_size": size,
            "patch_size": patch_px,
            "in_chans": channels,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio,
            "init_values": layer_scale,
            "drop_path_rate": drop_path,
            "num_classes": 0,
            "global_pool": "token",
        }
        if positions in ("relative", "relative_per_block"):
            shared = positions == "relative"
            self.backbone = Beit(
                **common, use_abs_pos_emb=False, use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared
            )
            _init_relative(self.backbone)
        else:
            self.backbone = VisionTransformer(**common)
        if init == "xavier":
            _init_xavier(self.backbone)
        if positions == "sincos":
            table = np.concatenate([np.zeros((1, width)), sincos(self.grid, width)])
            self.backbone.pos_embed.requires_grad_(False).copy_(torch.from_numpy(table)[None])

    def embed(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        """Embed each patch; positions are not in yet, so that a fill can put its token in place of a patch."""
        return embed_patches(self.backbone.patch_embed, images)

    def encode(
        self,
        tokens: Float[Tensor, "b n d"],
        kept: Int[Tensor, "b n"] | None = None,
        rows: Int[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b s d"]]:
        """Add positions and run the blocks; gives the patches' features and the class token's.

        `kept`: each token's patch index where a fill dropped some, else None. `rows`: the patches whose features are
        wanted, where not all are; the class token's is not given then. Raises ValueError for kept tokens where
        positions are relative_per_block.
        """
        for out in self._run(tokens, kept, rows):
            last = out  # the list of all would keep each block's in memory, where no gradient needs them
        return (last[:, 1:], last[:, :1]) if rows is None else (last, last[:, :0])

    def forward(self, tokens: Float[Tensor, "b n d"], kept: Int[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Give the patches' features alone; see `encode`."""
        return self.encode(tokens, kept)[0]

    def blocks(self, images: Float[Tensor, "b c H W"]) -> list[tuple[Float[Tensor, "b n d"], Float[Tensor, "b 1 d"]]]:
        """Give the patches' features and the class token after each block, the last after the final norm."""
        return [(out[:, 1:], out[:, :1]) for out in self._run(self.embed(images), None)]

    @property
    def block_widths(self) -> list[int]:
        """Width of what `blocks` gives, block by block."""
        return [self.width] * self.depth

    def taps(self, chosen: Sequence[int] | None = None) -> list[int]:
        """Give the blocks, counted from 1, that a pyramid is made of: those chosen, or the ends of the four quarters.

        Raises ValueError for a block that is not there.
        """
        taps = list(chosen) if chosen else [math.ceil(self.depth * quarter / 4) for quarter in range(1, 5)]
        for tap in taps:
            if not 1 <= tap <= self.depth:
                raise ValueError(f"taps: found {tap}; the encoder's blocks are 1 to {self.depth}; choose among them")
        return taps

    def levels(self, taps: Sequence[int] | None = None) -> list[Level]:
        """Say what `pyramid` gives: a plain ViT's maps are all of one width and stride."""
        return [Level(self.width, self.grid.patch_px)] * len(self.taps(taps))

    def pyramid(
        self, images: Float[Tensor, "b c H W"], taps: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b d h w"]]:
        """Give the feature maps of some blocks (see `taps`) for dense tasks, the last block's after the final norm."""
        outs = [features for features, _ in self.blocks(images)]
        shape = (len(images), self.width, *self.grid.shape)
        return [outs[tap - 1].transpose(1, 2).reshape(shape) for tap in self.taps(taps)]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the papers' code never decays, beside vectors and biases.

        Tables of relative bias are decayed: so it is in BEiT's and SimMIM's code for ViTs.
        """
        relative = self.backbone.pos_embed is None
        return {"backbone.cls_token"} | (set() if relative else {"backbone.pos_embed"})

    def layer(self, name: str) -> int:
        """Give a parameter's layer for layer-wise decay: 0 for embeddings, block i is i + 1, the rest the last.

        A table of relative bias that all blocks share is of the rest.
        """
        name = name.removeprefix("backbone.")
        if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.depth + 1

    def _run(
        self, tokens: Float[Tensor, "b n d"], kept: Int[Tensor, "b n"] | None, rows: Int[Tensor, "b m"] | None = None
    ) -> Iterator[Tensor]:
        """Add positions and give what comes out of each block: [b, 1 + n, d], class token first.

        With `rows` the last one gives those patches alone: [b, m, d].
        """
        vit, bias = self.backbone, self._bias(kept)
        if vit.pos_embed is None:
            out = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        else:
            prefix, positions = vit.pos_embed[:, :1], vit.pos_embed[:, 1:]
            if kept is not None:
                positions = positions.expand(len(tokens), -1, -1).gather(1, kept[..., None].expand(-1, -1, self.width))
            first = (vit.cls_token + prefix).expand(len(tokens), -1, -1).to(tokens.dtype)
            out = torch.cat([first, tokens + positions], dim=1)
        for index, block in enumerate(vit.blocks, 1):
            # In both of timm's blocks the second argument is added to the scores of attention.
            last = index == self.depth
            out = block(out, bias) if rows is None or not last else block_at(block, out, rows + 1, bias)
            yield vit.norm(out) if last else out

    def _bias(self, kept: Int[Tensor, "b n"] | None) -> Tensor | None:
        """Give the shared bias of each pair of tokens: [heads, t, t], or [b, heads, t, t] of kept tokens; t = 1 + n."""
        if kept is not None and not self.drops:
            raise ValueError(
                "positions: found relative_per_block, and a fill that drops tokens; the blocks' tables need all "
                "patches; set positions to relative, or choose a fill that keeps all tokens"
            )
        if self.positions != "relative":
            return None
        shared = self.backbone.rel_pos_bias
        if kept is None:
            bias: Tensor = shared()
            return bias
        rows = F.pad(kept + 1, (1, 0))  # the class token is 0 and always there
        index = shared.relative_position_index[rows[:, :, None], rows[:, None, :]]
        bias = shared.relative_position_bias_table[index]
        return bias.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def _init_relative(vit: Beit) -> None:
    """Start as BEiT (section 2.3) and SimMIM's ViT do in their code.

    Weights and class token from a normal of deviation 0.02 cut at one deviation, biases and tables of relative bias 0;
    then the last layer of both residual branches of block l, counted from 1, divided by sqrt(2 l).
    """
    for name, parameter in vit.named_parameters():
        if name == "cls_token" or (parameter.ndim > 1 and name.endswith(".weight")):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        elif name.endswith(("bias", "relative_position_bias_table")):
            nn.init.zeros_(parameter)
    for index, block in enumerate(vit.blocks, 1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2 * index))


@torch.no_grad()
def _init_xavier(vit: VisionTransformer) -> None:
    """Start as MAE does in its code: linear layers, and the patch embedding taken as one, Xavier-uniform; biases 0.

    The class token is from a normal of deviation 0.02. The patch embedding's bias stays as torch makes it.
    """
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1 and name.endswith(".weight"):
            nn.init.xavier_uniform_(parameter.flatten(1))
        elif name.endswith(".bias") and not name.startswith("patch_embed."):
            nn.init.zeros_(parameter)
    nn.init.normal_(vit.cls_token, std=0.02)
