"""Tokenizers of a few layers, for images and budgets that the large one does not fit: one variational, one quantised.

The architecture is that of the small tokenizer which BEiT's published code offers beside DALL-E's (its "customized"
one): strided convolutions with residual blocks, an embedding a code, and the same mirrored.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mim_core.tokenizers.dalle import Codes, DiscreteVAE, Likelihood, centre, in_fp32
from mim_core.tokenizers.quantizer import Commitment, Decay, Quantizer, Usage, VectorQuantised

Layers = Annotated[int, Field(gt=0, le=6)]
Blocks = Annotated[int, Field(ge=0, le=1000)]


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


def mirrored(
    channels: int, layers: int, width: int, code_width: int, blocks: int
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Make the halves without their last convolutions: `channels` in an image to `width`, `code_width` to `width`.

    Each is `layers` convolutions 4 x 4 of stride 2, so 2 ** layers px a token, with ReLU and `blocks` residual blocks.
    """
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []
    for index in range(layers):
        down = nn.Conv2d(width if index else channels, width, 4, stride=2, padding=1)
        up = nn.ConvTranspose2d(width if index else code_width, width, 4, stride=2, padding=1)
        encoder += [nn.Sequential(down, nn.ReLU()), *(Residual(width) for _ in range(blocks))]
        decoder += [nn.Sequential(up, nn.ReLU()), *(Residual(width) for _ in range(blocks))]
    return encoder, decoder


def last(channels: int, width: int, likelihood: Likelihood) -> nn.Conv2d:
    """Make the decoder's last convolution, to the likelihood's maps."""
    return nn.Conv2d(width, channels * (2 if likelihood == "laplace" else 1), 1)


class SmallDVAE(DiscreteVAE):
    """The variational one: `layers` halvings with `blocks` residual blocks each, see `mirrored`, then logits.

    `codes` is the size of the vocabulary, `width` that of the layers, `code_width` that of a code's vector. The encoder
    sees images scaled to [-1, 1]. The published one has the likelihood `l2`; `laplace` is DALL-E's.
    """

    def __init__(
        self,
        channels: int,
        *,
        codes: Codes = 512,
        layers: Layers = 3,
        width: PositiveInt = 64,
        code_width: PositiveInt = 512,
        blocks: Blocks = 1,
        likelihood: Likelihood = "laplace",
    ) -> None:
        super().__init__()
        self.codes, self.stride, self.likelihood = codes, 2**layers, likelihood
        encoder, decoder = mirrored(channels, layers, width, code_width, blocks)
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, codes, 1))
        self.codebook = nn.Embedding(codes, code_width)
        self.decoder = nn.Sequential(*decoder, last(channels, width, likelihood))

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


class SmallVQ(VectorQuantised):
    """The quantised one: the encoder ends in vectors of `code_width`, each of which is replaced by the nearest code's.

    Of BEiT v2's tokenizer it has the quantiser, with `decay`, `commitment` and `restart` (see `Quantizer`), and narrow
    codes. It has neither the transformers nor the teacher whose features those draw: it draws the image, under a
    `likelihood`.
    """

    def __init__(
        self,
        channels: int,
        *,
        codes: Codes = 512,
        layers: Layers = 3,
        width: PositiveInt = 64,
        code_width: Annotated[int, Field(ge=2)] = 32,
        blocks: Blocks = 1,
        decay: Decay = 0.99,
        commitment: Commitment = 1.0,
        restart: Usage = 0.0,
        likelihood: Likelihood = "laplace",
    ) -> None:
        super().__init__()
        self.codes, self.stride, self.likelihood = codes, 2**layers, likelihood
        encoder, decoder = mirrored(channels, layers, width, code_width, blocks)
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, code_width, 1))
        self.quantizer = Quantizer(codes, code_width, decay=decay, commitment=commitment, restart=restart)
        self.decoder = nn.Sequential(*decoder, last(channels, width, likelihood))

    def encode(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        return in_fp32(self.encoder[-1], self.encoder[:-1](centre(images)))

    def draw(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b maps H W"]:
        out: Tensor = self.decoder(vectors)
        return out
