"""Discrete autoencoders: what they share, and the variational one of Ramesh et al., "Zero-Shot Text-to-Image
Generation", ICML 2021 (section 2.1, appendix A), whose arg-max codes BEiT predicts.

Letters in shapes as in `mim_core.grid`; here h w is the grid of tokens, k the codes, d the width of a code's vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mim_core.spec import Depth

EPSILON = 0.1
Codes = Annotated[int, Field(ge=2)]
Likelihood = Literal["laplace", "l2"]


def map_pixels(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Map [0, 1] to [0.1, 0.9], where the logit is finite."""
    return (1 - 2 * EPSILON) * images + EPSILON


def unmap_pixels(mapped: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Undo `map_pixels`; what lies outside is clipped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace(maps: Float[Tensor, "b 2c H W"], mapped: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Negative log-density, in nats a value, of mapped pixels under the logit-Laplace distribution (appendix A).

    `maps` holds the c means, then the c logarithms of the scales.
    """
    mean, log_scale = maps.chunk(2, 1)
    distance = (torch.logit(mapped) - mean).abs()
    return distance * torch.exp(-log_scale) + log_scale + torch.log(2 * mapped * (1 - mapped))


class Autoencoder(nn.Module, ABC):
    """An encoder to logits over codes, a vector a code, and a decoder of vectors to maps of the image's size."""

    stride: int
    codes: int
    likelihood: Likelihood
    """`laplace`: the decoder gives means and log-scales, 2c maps, of mapped pixels. `l2`: it gives the pixels, c maps,
    scaled to [-1, 1]."""
    advice: str
    """What to change in a row whose codebook collapsed."""

    @abstractmethod
    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Score the codes of each token, in fp32 also under autocast."""

    @abstractmethod
    def look_up(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Give the tokens' vectors."""

    @abstractmethod
    def draw(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b maps H W"]:
        """Decode vectors to the likelihood's maps."""

    @torch.no_grad()
    def tokens(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b h w"]:
        """Give the most likely code of each token."""
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        """Draw tokens as images in [0, 1]."""
        return self.pictures(self.draw(self.look_up(tokens)))

    def pictures(self, maps: Float[Tensor, "b maps H W"]) -> Float[Tensor, "b c H W"]:
        """Turn maps to images in [0, 1]; of the logit-Laplace it takes sigmoid(mean), whatever the scale."""
        maps = maps.float()
        if self.likelihood == "laplace":
            return unmap_pixels(torch.sigmoid(maps.chunk(2, 1)[0]))
        return ((maps + 1) / 2).clamp(0, 1)

    def errors(self, maps: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Loss of each value of the images: nats for `laplace`, squared error on a scale of [-1, 1] for `l2`."""
        maps = maps.float()
        if self.likelihood == "laplace":
            return logit_laplace(maps, map_pixels(images))
        return (maps - centre(images)) ** 2


class DiscreteVAE(Autoencoder):
    """An autoencoder whose codes are relaxed while it is fitted, so that its decoder sees mixtures of their vectors."""

    advice = (
        "raise kl_weight, anneal temperature over a longer share of the run, lower codes or optim.lr, or raise "
        "optim.epochs"
    )

    @abstractmethod
    def mix(self, soft: Float[Tensor, "b k h w"]) -> Float[Tensor, "b d h w"]:
        """Mean of the codes' vectors, weighted by a (soft) one-hot of codes: `look_up` where that is a one-hot."""

    def reconstruct(self, soft: Float[Tensor, "b k h w"]) -> Float[Tensor, "b maps H W"]:
        """Decode a (soft) one-hot of codes to the likelihood's maps."""
        return self.draw(self.mix(soft))


def centre(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """Scale [0, 1] to [-1, 1]."""
    return 2 * images - 1


def in_fp32(layer: nn.Module, features: Tensor) -> Tensor:
    """Run a layer outside autocast: the published encoder keeps its logits in fp32."""
    with torch.autocast(features.device.type, enabled=False):
        out: Tensor = layer(features.float())
        return out


class Block(nn.Module):
    """Residual block: four ReLU and convolution pairs through a quarter of the width, scaled by `gain`."""

    def __init__(self, before: int, after: int, sides: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        widths = (before, after // 4, after // 4, after // 4, after)
        layers: list[tuple[str, nn.Module]] = []
        for index, (side, (a, b)) in enumerate(zip(sides, pairwise(widths), strict=True), 1):
            layers += [(f"relu_{index}", nn.ReLU()), (f"conv_{index}", nn.Conv2d(a, b, side, padding=side // 2))]
        self.id_path = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e h w"]:
        out: Tensor = self.id_path(features) + self.gain * self.res_path(features)
        return out


def stack(
    entry: nn.Conv2d,
    widths: tuple[int, ...],
    blocks: int,
    sides: tuple[int, int, int, int],
    between: tuple[str, nn.Module],
    maps: int,
) -> nn.Sequential:
    """Chain the entry, a group of blocks a width with a change of size between groups, and the output convolution."""
    gain = 1 / (len(widths) * blocks) ** 2
    layers: list[tuple[str, nn.Module]] = [("input", entry)]
    before = entry.out_channels
    for index, width in enumerate(widths, 1):
        group: list[tuple[str, nn.Module]] = []
        for number in range(1, blocks + 1):
            group.append((f"block_{number}", Block(before, width, sides, gain)))
            before = width
        if index < len(widths):
            group.append(between)
        layers.append((f"group_{index}", nn.Sequential(OrderedDict(group))))
    output = OrderedDict([("relu", nn.ReLU()), ("conv", nn.Conv2d(before, maps, 1))])
    return nn.Sequential(OrderedDict([*layers, ("output", nn.Sequential(output))]))


class Encoder(nn.Module):
    """7 x 7 convolution, four groups with 2 x 2 max-pooling between, then logits."""

    def __init__(self, channels: int, codes: int, base: int, blocks: int) -> None:
        super().__init__()
        widths = (base, 2 * base, 4 * base, 8 * base)
        entry = nn.Conv2d(channels, base, 7, padding=3)
        self.blocks = stack(entry, widths, blocks, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2)), codes)

    def forward(self, mapped: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        return in_fp32(self.blocks[-1], self.blocks[:-1](mapped))


class Decoder(nn.Module):
    """1 x 1 convolution from the codes, four groups with nearest upsampling between, then two maps a channel."""

    FRONT = 128

    def __init__(self, channels: int, codes: int, base: int, blocks: int) -> None:
        super().__init__()
        widths = (8 * base, 4 * base, 2 * base, base)
        entry = nn.Conv2d(codes, self.FRONT, 1)
        between = ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
        self.blocks = stack(entry, widths, blocks, (1, 3, 3, 3), between, 2 * channels)


class DALLE(DiscreteVAE):
    """The tokenizer of DALL-E, 8 px a token (appendix A and the published code).

    `codes` is the size of the vocabulary, `base` the width of the first group (it doubles with each of the four),
    `blocks` the residual blocks a group. Parameters have the published names below `encoder.` and `decoder.`, with
    `weight` for `w` and `bias` for `b`.
    """

    stride = 8
    likelihood = "laplace"

    def __init__(
        self,
        channels: int,
        *,
        codes: Codes = 8192,
        base: Annotated[int, Field(gt=0, multiple_of=4)] = 256,
        blocks: Depth = 2,
    ) -> None:
        super().__init__()
        self.codes = codes
        self.encoder = Encoder(channels, codes, base, blocks)
        self.decoder = Decoder(channels, codes, base, blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        out: Tensor = self.encoder(map_pixels(images))
        return out

    def mix(self, soft: Float[Tensor, "b k h w"]) -> Float[Tensor, "b d h w"]:
        out: Tensor = self.decoder.blocks[0](soft)
        return out

    def look_up(self, tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        entry = self.decoder.blocks[0]
        assert isinstance(entry, nn.Conv2d)
        assert entry.bias is not None
        vectors = entry.weight.flatten(1).T + entry.bias  # [k, d]
        return F.embedding(tokens, vectors).permute(0, 3, 1, 2)

    def draw(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b maps H W"]:
        out: Tensor = self.decoder.blocks[1:](vectors)
        return out
