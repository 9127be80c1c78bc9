"""Fills: what stands where the mask hides.

A fill is a module with `pixels(images, hidden)`, before the patch embedding, and `tokens(tokens, hidden)`, after it and
before positions are added. The second gives the tokens that the encoder reads and `kept`, the patch index of each, or
None where every patch still has its token.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mim_core.grid import Grid

Share = Annotated[float, Field(ge=0, le=1)]


class Fill(nn.Module):
    """What all fills share: images and tokens pass as they are, unless a fill says otherwise.

    `width` is that of the encoder's embedding, `grid` that of the mask, `mean` and `std` are the dataset's colours in
    units of [0, 1]. `hidden` may stay on the CPU, where masks are drawn: what depends on counts then waits for no GPU.
    """

    drops: ClassVar[bool] = False
    """Whether hidden tokens go, so that the encoder and the head have to work on those that are kept."""
    peeks: ClassVar[bool] = False
    """Whether the encoder may see some of what the mask hides, in training."""

    def __init__(self, width: int, grid: Grid, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.grid = grid

    def pixels(self, images: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        return images

    def tokens(
        self, tokens: Float[Tensor, "b n d"], hidden: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b k d"], Int[Tensor, "b k"] | None]:
        return tokens, None


class MaskToken(Fill):
    """Put one learned vector in place of every hidden patch's embedding (SimMIM, section 3.2; BEiT, section 2.3)."""

    def __init__(self, width: int, grid: Grid, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(width, grid, mean, std)
        # Of three dimensions, as published: weight decay leaves vectors out, and this token is decayed.
        self.token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.token, std=0.02)

    def tokens(
        self, tokens: Float[Tensor, "b n d"], hidden: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b k"] | None]:
        return torch.where(_beside(hidden, tokens)[..., None], self.token.to(tokens.dtype), tokens), None


class BertMix(MaskToken):
    """Put the learned vector in place of most hidden embeddings only (ViT, appendix B.1.2, after BERT).

    Each hidden position draws for itself: with probability `token` it gets the vector, with probability `random` the
    embedding of another patch of the same image, hidden or not, and else it stays as it is. In training the encoder so
    sees some hidden content (`peeks`). In evaluation all get the vector: what is recovered there was never seen.
    """

    peeks: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        token: Share = 0.8,
        random: Share = 0.1,
    ) -> None:
        super().__init__(width, grid, mean, std)
        if token + random > 1:
            raise ValueError(
                f"random: found {random} beside token {token}; shares may not sum to more than 1; "
                f"try {max(0.0, round(1 - token, 6))} or less"
            )
        if random and grid.count < 2:
            raise ValueError(f"random: found {random} on a grid of one patch; there is no other to take; choose 0")
        self.shares = token, random

    def tokens(
        self, tokens: Float[Tensor, "b n d"], hidden: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b k"] | None]:
        if not self.training:
            return super().tokens(tokens, hidden)
        (b, n), (token, random), device = hidden.shape, self.shares, tokens.device
        draw, step = torch.rand(b, n, device=device), torch.randint(1, max(2, n), (b, n), device=device)
        other = ((torch.arange(n, device=device) + step) % n).expand(b, n)
        others = tokens.gather(1, other[..., None].expand_as(tokens))
        mixed = torch.where((draw < token + random)[..., None], others, tokens)
        mixed = torch.where((draw < token)[..., None], self.token.to(tokens.dtype), mixed)
        return torch.where(_beside(hidden, tokens)[..., None], mixed, tokens), None


class Colour(Fill):
    """Paint hidden pixels in one colour (Context Encoder, Pathak et al., CVPR 2016: the data's mean).

    `mean` is the dataset's mean, which is zero to the encoder; `zero` is black.
    """

    colour: Tensor

    def __init__(
        self,
        width: int,
        grid: Grid,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        colour: Literal["mean", "white", "zero"] = "mean",
    ) -> None:
        super().__init__(width, grid, mean, std)
        centre, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        paint = {"mean": centre, "white": torch.ones_like(centre), "zero": torch.zeros_like(centre)}[colour]
        self.register_buffer("colour", (paint - centre) / deviation, persistent=False)

    def pixels(self, images: Float[Tensor, "b c H W"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        return torch.where(self.grid.pixels(_beside(hidden, images))[:, None], self.colour.to(images.dtype), images)


class Drop(Fill):
    """Leave hidden tokens out, so that the encoder reads visible patches only (MAE, section 3).

    Needs masks that hide equally many patches of every image of a batch; raises ValueError where they do not.
    """

    drops: ClassVar[bool] = True

    def tokens(
        self, tokens: Float[Tensor, "b n d"], hidden: Bool[Tensor, "b n"] | Int[Tensor, "b k"]
    ) -> tuple[Float[Tensor, "b k d"], Int[Tensor, "b k"] | None]:
        """See `Fill`; `hidden` may also be given as the patches that are kept, where they are counted already."""
        kept = _beside(self.kept(hidden) if hidden.dtype == torch.bool else hidden, tokens)
        return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1])), kept

    def kept(self, hidden: Bool[Tensor, "b n"]) -> Int[Tensor, "b k"]:
        """Give the patches that are kept; raises ValueError where images have unequally many."""
        visible = ~hidden
        fewest, most = (int(count) for count in visible.sum(1).aminmax())
        if fewest != most:
            n = hidden.shape[1]
            raise ValueError(
                f"fill: found a batch that hides {n - most} to {n - fewest} of {n} patches; 'drop' needs equally many "
                "in every image; choose a mask of a fixed count, such as {name: random, ratio: 0.75}"
            )
        # Row by row and in the order of patches.
        return visible.nonzero()[:, 1].view(len(hidden), most)


def _beside(mask: Tensor, values: Tensor) -> Tensor:
    return mask.to(values.device, non_blocking=True)


FILLS: dict[str, type[Fill]] = {"mask_token": MaskToken, "bert_mix": BertMix, "colour": Colour, "drop": Drop}
