"""Vision transformer behind the encoder contract: timm's blocks, entered between patch embedding and positions.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the module inside is timm's `VisionTransformer`,
so its weights load there under timm's own names.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim_core.masks import Grid

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ViT(nn.Module):
    """Plain ViT: absolute positions, class token, pre-norm blocks, final LayerNorm.

    `positions`: learned from noise, or the fixed sines and cosines of MAE, which spare a short run the steps in which
    it would find out which patches are neighbours.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        patch_px: Count = 16,
        width: Count = 768,
        depth: Count = 12,
        heads: Count = 12,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        positions: Literal["learned", "sincos"] = "learned",
        drop_path: Share = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: found {heads}; it must divide the width {width}")
        self.grid = Grid(*size, patch_px)
        self.width = width
        self.depth = depth
        self.backbone = VisionTransformer(
            img_size=size,
            patch_size=patch_px,
            in_chans=channels,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            num_classes=0,
            global_pool="token",
        )
        if positions == "sincos":
            table = np.concatenate([np.zeros((1, width)), sincos(self.grid, width)])
            self.backbone.pos_embed.requires_grad_(False).copy_(torch.from_numpy(table)[None])

    def embed(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        """Embed each patch; positions are not in yet, so that a fill can put its token in place of a patch."""
        out: Tensor = self.backbone.patch_embed(images)
        return out

    def forward(self, tokens: Float[Tensor, "b n d"], kept: Int[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Add positions and run the blocks.

        `kept`: each token's patch index where a fill dropped some, else None. The class token is not in the result.
        """
        vit = self.backbone
        prefix, positions = vit.pos_embed[:, :1], vit.pos_embed[:, 1:]
        if kept is not None:
            positions = positions.expand(len(tokens), -1, -1).gather(1, kept[..., None].expand(-1, -1, self.width))
        first = (vit.cls_token + prefix).expand(len(tokens), -1, -1).to(tokens.dtype)
        out = torch.cat([first, tokens + positions], dim=1)  # [b, 1 + n, d]
        for block in vit.blocks:
            out = block(out)
        features: Tensor = vit.norm(out)
        return features[:, 1:]

    def pyramid(self, images: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b d h w"]]:
        """Give the feature maps for dense tasks; a plain ViT has one, at the patch's stride."""
        features = self(self.embed(images))
        return [features.transpose(1, 2).reshape(len(images), self.width, *self.grid.shape)]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the papers' code never decays, beside vectors and biases."""
        return {"backbone.pos_embed", "backbone.cls_token"}

    def layer(self, name: str) -> int:
        """Give a parameter's layer for layer-wise decay: 0 for embeddings, block i is i + 1, the rest the last."""
        name = name.removeprefix("backbone.")
        if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.depth + 1


def sincos(grid: Grid, width: int) -> Float[np.ndarray, "n d"]:
    """Fixed 2-D sine and cosine positions (MAE, appendix A.1): half the width for columns, then half for rows.

    Each half holds the sines of its coordinate at width / 4 frequencies from 1 down to 1 / 10000, then the cosines.
    Raises ValueError where 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"width: found {width}; sincos positions need a multiple of 4; try {width // 4 * 4 + 4}")
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]]
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1)
