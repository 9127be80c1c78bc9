"""Fitting a tokenizer by gradient, through relaxed codes or straight through the nearest, and how good it is.

Sources: Ramesh et al., "Zero-Shot Text-to-Image Generation", ICML 2021, section 2.1 and appendix A (discrete VAEs);
Peng et al., "BEiT v2", 2022, section 2.2 (vector quantisation).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from mim_core.data.order import Address, read_images
from mim_core.data.pack import Pack, Split, batched
from mim_core.devices import Compute
from mim_core.gallery import GAP, TOP, Cell, Sheet
from mim_core.metrics.pictures import psnr
from mim_core.spec import Strict
from mim_core.tokenizers.dalle import Autoencoder, DiscreteVAE
from mim_core.tokenizers.quantizer import VectorQuantised
from mim_core.transforms import Augment


class Anneal(Strict):
    """A number that goes from `start` to `end` along half a cosine over a share `over` of the run, and stays there."""

    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)]
    over: Annotated[float, Field(gt=0, le=1)] = 1.0

    def value(self, step: int, total: int) -> float:
        """Give the number at a step of `total`."""
        done = min(1.0, step / (self.over * total))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


def _above_zero(anneal: Anneal) -> Anneal:
    if min(anneal.start, anneal.end) <= 0:
        raise ValueError(f"found {anneal.start} to {anneal.end}; a temperature lies above 0; end at 0.0625, say")
    return anneal


Temperature = Annotated[Anneal, AfterValidator(_above_zero)]
"""An `Anneal` that stays above 0."""


def token_grid(tokenizer: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens down and across an image of `size` px; raises ValueError where they do not fill it."""
    if any(side % tokenizer.stride for side in size):
        raise ValueError(
            f"stride: found {tokenizer.stride} px a token; it must divide the images' {size[0]} x {size[1]} px; choose "
            "a tokenizer of another stride (`layers` of a small one), or another size_px for the data"
        )
    return size[0] // tokenizer.stride, size[1] // tokenizer.stride


@dataclass(frozen=True)
class ImageFetch:
    """Make a batch of uint8 images [b, c, H, W]; picklable, so that loader workers can have it."""

    split: Split
    augment: Augment | None
    seed: int

    def __call__(self, addresses: Sequence[Address]) -> UInt8[Tensor, "b c H W"]:
        return read_images(self.split, addresses, self.augment, self.seed)


def kl_to_uniform(logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b h w"]:
    """Divergence of each token's distribution over codes from the uniform one, in nats: from 0 to log k."""
    log_share = logits.float().log_softmax(1)
    return (log_share.exp() * log_share).sum(1) + math.log(logits.shape[1])


class TokenizerFit(nn.Module, ABC):
    """What the objectives share: the tokenizer and its scores.

    Raises ValueError where tokens do not fill the images.
    """

    model: Autoencoder

    def __init__(self, model: Autoencoder, pack: Pack, compute: Compute) -> None:
        super().__init__()
        token_grid(model, pack.size)
        self.model, self.compute = model, compute

    @abstractmethod
    def losses(self, batch: UInt8[Tensor, "b c H W"], step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the loss of a batch; see `mim_core.train.Objective`."""

    @abstractmethod
    def beside(self, logits: Float[Tensor, "b k h w"]) -> tuple[str, Float[Tensor, ""]]:
        """Give the name and the mean over tokens of what is told of a batch beside its reconstruction."""

    @torch.no_grad()
    def evaluate(self, split: Split, batch: int = 64) -> dict[str, float]:
        """Score the tokenizer as a target will use it: in fp32, by arg-max codes.

        `psnr` in dB over the images in [0, 1], `codes_used` the share of codes that occur, `perplexity` the exponential
        of the entropy of the codes' histogram (from 1 to `codes`), `reconstruction` the loss's first term, and what
        `beside` gives.
        """
        self.model.eval()
        tally = Tally(self.model.codes)
        sums = np.zeros(2)
        name = ""
        for indices in batched(range(len(split)), batch):
            images = self._images(torch.from_numpy(split.images[indices]))
            logits = self.model.logits(images)
            tokens = logits.argmax(1)
            maps = self.model.draw(self.model.look_up(tokens))
            tally.add(tokens, self.model.pictures(maps), images)
            errors, (name, value) = self.model.errors(maps, images), self.beside(logits)
            sums += len(images) * np.array([errors.mean().item(), value.item()])
        self.model.train()
        reconstruction, value = (sums / len(split)).tolist()
        return {**tally.scores(), name: value, "reconstruction": reconstruction}

    def _images(self, images: UInt8[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return images.to(self.compute.device).float() / 255


class RelaxedFit(TokenizerFit):
    """A discrete VAE's: reconstruction from Gumbel-softmax codes, and the codes' divergence from a uniform prior.

    As in appendix A.2, both terms are sums over an image, divided by its number of values v = c * H * W:
    loss = (sum of errors + kl_weight * sum over tokens of KL(q || uniform)) / v, a mean over images. A `kl_weight` is
    so the paper's beta: as a token stands for stride ** 2 * c values, the mean divergence of a token weighs
    kl_weight / (stride ** 2 * c), beta / 192 at the paper's 8 px and 3 channels. Units: nats a value (`laplace`).

    Temperature and weight follow from the step alone, out of `steps`. The relaxation's noise comes from torch's global
    generator, which the training loop seeds by step. It is scored by `kl` too, in nats a token.
    """

    model: DiscreteVAE

    def __init__(
        self, model: DiscreteVAE, pack: Pack, compute: Compute, steps: int, temperature: Anneal, kl_weight: Anneal
    ) -> None:
        super().__init__(model, pack, compute)
        self.steps = steps
        self.temperature, self.kl_weight = _above_zero(temperature), kl_weight

    def losses(self, batch: UInt8[Tensor, "b c H W"], step: int) -> Iterator[tuple[str, Tensor]]:
        images = self._images(batch)
        with self.compute.autocast():
            logits = self.model.logits(images)
            soft = F.gumbel_softmax(logits.float(), self.temperature.value(step, self.steps), dim=1)
            maps = self.model.reconstruct(soft)
        reconstruction, kl = self.terms(images, logits, maps)
        yield "model", reconstruction + self.kl_weight.value(step, self.steps) * kl

    def terms(
        self,
        images: Float[Tensor, "b c H W"],
        logits: Float[Tensor, "b k h w"],
        maps: Float[Tensor, "b maps H W"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Give the loss's two terms, both sums divided by the number of the images' values, before weighting."""
        return self.model.errors(maps, images).mean(), kl_to_uniform(logits).sum() / images.numel()

    def beside(self, logits: Float[Tensor, "b k h w"]) -> tuple[str, Float[Tensor, ""]]:
        return "kl", kl_to_uniform(logits).mean()


class QuantisedFit(TokenizerFit):
    """A quantised autoencoder's: reconstruction from the nearest codes, and the quantiser's own loss.

    The gradient goes straight through to the encoder; the codes follow its vectors. Units: nats a value (`laplace`).
    It is scored by `distance` too: the mean squared distance of the encoder's vectors to their codes, from 0 to 4.
    """

    model: VectorQuantised

    def __init__(self, model: VectorQuantised, pack: Pack, compute: Compute) -> None:
        super().__init__(model, pack, compute)

    def losses(self, batch: UInt8[Tensor, "b c H W"], step: int) -> Iterator[tuple[str, Tensor]]:
        images = self._images(batch)
        with self.compute.autocast():
            found = self.model.quantise(images)
            maps = self.model.draw(found.vectors)
        yield "model", self.model.errors(maps, images).mean() + found.loss

    def beside(self, logits: Float[Tensor, "b k h w"]) -> tuple[str, Float[Tensor, ""]]:
        return "distance", -logits.amax(1).mean()


def objective(
    model: Autoencoder, pack: Pack, compute: Compute, steps: int, temperature: Anneal, kl_weight: Anneal
) -> TokenizerFit:
    """Choose the objective by how a tokenizer's codes are made; only relaxed ones have a temperature and a weight."""
    if isinstance(model, DiscreteVAE):
        return RelaxedFit(model, pack, compute, steps, temperature, kl_weight)
    assert isinstance(model, VectorQuantised)
    return QuantisedFit(model, pack, compute)


class Tally:
    """What images of any tokenizer add up to: how near the pictures of their tokens come, and which codes occur."""

    def __init__(self, codes: int) -> None:
        self.counts = np.zeros(codes, np.int64)
        self.error, self.values = 0.0, 0

    def add(
        self, tokens: Int[Tensor, "b h w"], pictures: Float[Tensor, "b c H W"], images: Float[Tensor, "b c H W"]
    ) -> None:
        self.counts += np.bincount(tokens.flatten().cpu().numpy(), minlength=len(self.counts))
        self.error += ((pictures - images) ** 2).sum().item()
        self.values += images.numel()

    def scores(self) -> dict[str, float]:
        """Give psnr, codes_used and perplexity; see `TokenizerFit.evaluate`."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return {
            "psnr": psnr(self.error / self.values),
            "codes_used": len(shares) / len(self.counts),
            "perplexity": math.exp(-(shares * np.log(shares)).sum()),
        }


def score(tokenizer: Any, split: Split, compute: Compute, batch: int = 64) -> dict[str, float]:
    """Score any tokenizer, a palette too, by psnr, codes_used and perplexity over a split's images."""
    tally = Tally(tokenizer.codes)
    for indices in batched(range(len(split)), batch):
        images = torch.from_numpy(split.images[indices]).to(compute.device).float() / 255
        tokens = tokenizer.tokens(images)
        tally.add(tokens, tokenizer.decode(tokens), images)
    return tally.scores()


def collapse(scores: Mapping[str, float], least_perplexity: float, advice: str) -> str | None:
    """Say that the codebook has collapsed, with `advice`, where too few codes do the work; None where all is well.

    Masked tokens of such a tokenizer are easy to guess and teach an encoder little.
    """
    # A perplexity that is not a number is no success either.
    if scores["perplexity"] >= least_perplexity:
        return None
    return (
        f"perplexity: found {scores['perplexity']:.1f}, with {scores['codes_used']:.1%} of the codes used on "
        f"validation images; below least_perplexity {least_perplexity:g} the codebook has collapsed; {advice}"
    )


COLUMNS = ("input", "reconstruction")


def picture(
    images: Float[Tensor, "b c H W"],
    reconstructions: Float[Tensor, "b c H W"],
    caption: str,
    note: str = "",
    tile: int = 112,
    across: int = 4,
) -> Image.Image:
    """Lay out images in [0, 1] beside their reconstructions, `across` pairs a row, with each one's PSNR.

    `note` stands at the foot. Tiles are about `tile` px wide, whole multiples of small images.
    """
    across = min(across, len(images))
    label, rows = 20, -(-len(images) // across)
    cell = Cell.of(images, tile)
    group = 2 * (cell.width + GAP) + 16
    sheet = Sheet(across * group + 8, TOP + rows * (cell.height + label), caption, note, fit=True)
    for index, pair in enumerate(zip(images, reconstructions, strict=True)):
        row, side = divmod(index, across)
        left, top = 10 + side * group, TOP + row * (cell.height + label)
        for column, one in enumerate(pair):
            at = left + column * (cell.width + GAP)
            if row == 0:
                sheet.say(COLUMNS[column], at, 34)
            sheet.paste(one, at, top, cell)
        sheet.say(f"PSNR {psnr(((pair[0] - pair[1]) ** 2).mean().item()):.1f} dB", left, top + cell.height + 2)
    return sheet.image
