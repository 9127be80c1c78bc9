"""Fills: what stands where the mask hides.

A fill is a module with `pixels(images, hidden)`, before the patch embedding, and `tokens(tokens, hidden)`, after it and
before positions are added. The second gives the tokens that the encoder reads and `kept`, the patch index of each, or
None where every patch still has its token.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class MaskToken(nn.Module):
    """Put one learned vector in place of every hidden patch's embedding (SimMIM, section 3.2; BEiT, section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Of three dimensions, as published: weight decay leaves vectors out, and this token is decayed.
        self.token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.token, std=0.02)

    def pixels(self, images: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        return images

    def tokens(
        self, tokens: Float[Tensor, "b n d"], hidden: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b k"] | None]:
        return torch.where(hidden[..., None], self.token.to(tokens.dtype), tokens), None


FILLS = {"mask_token": MaskToken}
