"""A discrete variational autoencoder of a few layers, for images and budgets that the large one does not fit.

The architecture is that of the small tokenizer which BEiT's published code offers beside DALL-E's (its "customized"
one): strided convolutions with residual blocks, an embedding a code, and the same mirrored.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mim_core.tokenizers.dalle import Codes, Count, DiscreteVAE, Likelihood, centre, in_fp32


class Residual(nn.Module):
    """Convolutions 3 x 3, 3 x 3, 1 x 1 with ReLU between, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        out: Tensor = features + self.net(features)
        return out


class SmallDVAE(DiscreteVAE):
    """`layers` convolutions 4 x 4 of stride 2, each with ReLU and `blocks` residual blocks, so 2 ** layers px a token.

    `codes` is the size of the vocabulary, `width` that of the layers, `code_width` that of a code's vector. The encoder
    sees images scaled to [-1, 1]. The published one has the likelihood `l2`; `laplace` is DALL-E's.
    """

    def __init__(
        self,
        channels: int,
        *,
        codes: Codes = 512,
        layers: Annotated[int, Field(gt=0, le=6)] = 3,
        width: Count = 64,
        code_width: Count = 512,
        blocks: Annotated[int, Field(ge=0)] = 1,
        likelihood: Likelihood = "laplace",
    ) -> None:
        super().__init__()
        self.codes, self.stride, self.likelihood = codes, 2**layers, likelihood
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for index in range(layers):
            down = nn.Conv2d(width if index else channels, width, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(width if index else code_width, width, 4, stride=2, padding=1)
            encoder += [nn.Sequential(down, nn.ReLU()), *(Residual(width) for _ in range(blocks))]
            decoder += [nn.Sequential(up, nn.ReLU()), *(Residual(width) for _ in range(blocks))]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, codes, 1))
        self.codebook = nn.Embedding(codes, code_width)
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(width, channels * (2 if likelihood == "laplace" else 1), 1))

    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        return in_fp32(self.encoder[-1], self.encoder[:-1](centre(images)))

    def mix(self, soft: Float[Tensor, "b k h w"]) -> Float[Tensor, "b d h w"]:
        return torch.einsum("bkhw,kd->bdhw", soft, self.codebook.weight)

    def look_up(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        out: Tensor = self.codebook(tokens)
        return out.permute(0, 3, 1, 2)

    def draw(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b maps H W"]:
        out: Tensor = self.decoder(vectors)
        return out
