"""Vector quantisation with unit codes that follow the encoder by moving averages, and the tokenizers built on it.

Source: Peng et al., "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", 2022, section 2.2, and
the published code of its tokenizer (VQ-KD). Here evaluation changes nothing (the published one counts the codes used
then too), and a code that a batch does not use stays as it is to the bit, where the published one is normalised again.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mim_core.tokenizers.dalle import Autoencoder

Decay = Annotated[float, Field(ge=0, lt=1)]
Commitment = Annotated[float, Field(gt=0)]
Usage = Annotated[float, Field(ge=0)]
ROUNDS = 10
"""Of k-means, by cosine similarity, over the first batch."""


class Quantized(NamedTuple):
    """Vectors replaced by their nearest codes: what a decoder draws, which codes, and the loss on the encoder."""

    vectors: Float[Tensor, "b d h w"]
    tokens: Int[Tensor, "b h w"]
    loss: Float[Tensor, ""]


class Quantizer(nn.Module):
    """`codes` vectors of unit length and `width` entries, of which a vector's direction is replaced by the nearest.

    In training each batch moves every code that it uses 1 - `decay` of the way to the direction of the mean of its
    vectors; the first batch starts the codes by k-means. `commitment` weighs the loss: the mean squared difference of
    the directions to their codes, over all entries. All that changes is in the state dict, no parameter is: the codes,
    `usage` (a moving average of how many vectors of a batch each code got) and whether the codes have `started`.
    Works in the codes' own precision, also under autocast.

    A code whose usage falls below `restart` begins again at a random vector of the batch, as in SoundStream (Zeghidour
    et al., 2021, section III-C): in short runs the encoder leaves many of its first codes behind. 0, as published,
    restarts none.
    """

    codebook: Tensor
    usage: Tensor
    started: Tensor

    def __init__(
        self, codes: int, width: int, *, decay: Decay = 0.99, commitment: Commitment = 1.0, restart: Usage = 0.0
    ) -> None:
        super().__init__()
        self.decay, self.commitment, self.restart = decay, commitment, restart
        self.register_buffer("codebook", F.normalize(torch.randn(codes, width), dim=1))
        self.register_buffer("usage", torch.zeros(codes))
        self.register_buffer("started", torch.tensor(False))

    def scores(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """Negative squared distances of the vectors' directions to the codes: -4 to 0."""
        directions = self._directions(vectors)
        return self._scores(directions.flatten(0, 2)).view(*directions.shape[:-1], -1).movedim(-1, 1)

    def look_up(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Give the tokens' codes."""
        return F.embedding(tokens, self.codebook).movedim(-1, 1)

    def forward(self, vectors: Float[Tensor, "b d h w"]) -> Quantized:
        """Replace vectors by their codes, with the gradient going straight through to their directions."""
        directions = self._directions(vectors)  # [b, h, w, d]
        flat = directions.detach().flatten(0, 2)
        # Read from the device, which waits for it; k-means at every step would cost more.
        if self.training and not self.started:
            self._start(flat)
        chosen = self._scores(flat).argmax(1)
        codes = F.embedding(chosen, self.codebook).view_as(directions)
        if self.training:
            self._follow(flat, chosen)
        loss = self.commitment * F.mse_loss(directions, codes)
        through = directions + (codes - directions).detach()
        return Quantized(through.movedim(-1, 1), chosen.view(directions.shape[:-1]), loss)

    def _directions(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b h w d"]:
        return F.normalize(vectors.to(self.codebook.dtype).movedim(1, -1), dim=-1)

    def _scores(self, flat: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        with torch.autocast(flat.device.type, enabled=False):
            product = flat @ self.codebook.T
        return 2 * product - flat.square().sum(1, keepdim=True) - self.codebook.square().sum(1)

    @torch.no_grad()
    def _start(self, flat: Float[Tensor, "n d"]) -> None:
        """Take vectors at random and move them by k-means; usage begins at how many each got."""
        self.codebook.copy_(self._drawn(flat))
        for _ in range(ROUNDS):
            counts, means = self._means(flat, self._scores(flat).argmax(1))
            self.codebook.copy_(torch.where(counts[:, None] > 0, means, self.codebook))
            self.usage.copy_(counts)
        self.started.fill_(True)

    def _drawn(self, flat: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
        """Draw vectors, a code each, from torch's global generator; none twice where there are enough."""
        count, codes = len(flat), len(self.codebook)
        picked = torch.randperm(count)[:codes] if count >= codes else torch.randint(count, (codes,))
        return flat[picked.to(flat.device)]

    @torch.no_grad()
    def _follow(self, flat: Float[Tensor, "n d"], chosen: Int[Tensor, " n"]) -> None:
        counts, means = self._means(flat, chosen)
        self.usage.lerp_(counts, 1 - self.decay)
        moved = F.normalize(self.codebook.lerp(means, 1 - self.decay), dim=1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        if self.restart:
            idle = self.usage < self.restart
            self.codebook.copy_(torch.where(idle[:, None], self._drawn(flat), self.codebook))
            self.usage.clamp_(min=self.restart)

    def _means(
        self, flat: Float[Tensor, "n d"], chosen: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
        """Give how many vectors each code got and the direction of their mean; zeros where none."""
        # A product with one-hots, which sums in a fixed order; adding to scattered places does not, on a GPU.
        with torch.autocast(flat.device.type, enabled=False):
            one_hot = F.one_hot(chosen, len(self.codebook)).to(flat.dtype)
            return one_hot.sum(0), F.normalize(one_hot.T @ flat, dim=1)


class VectorQuantised(Autoencoder):
    """An autoencoder whose encoder ends in vectors, which a `quantizer` replaces by codes; logits are its scores."""

    quantizer: Quantizer
    advice = (
        "raise restart (1, say), lower codes, code_width or optim.lr, or raise optim.batch, which starts the codes, or "
        "optim.epochs"
    )

    @abstractmethod
    def encode(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Give each token's vector, in fp32 also under autocast."""

    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        return self.quantizer.scores(self.encode(images))

    def look_up(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        return self.quantizer.look_up(tokens)

    def quantise(self, images: Float[Tensor, "b c H W"]) -> Quantized:
        """Encode images and replace their vectors by codes; in training the codes follow."""
        found: Quantized = self.quantizer(self.encode(images))
        return found
