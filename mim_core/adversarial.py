"""The adversarial term: a critic that tells recovered pictures from real ones, as a second player beside a model.

Source: Pathak et al., "Context Encoders", CVPR 2016, section 3.2; layers and losses as in its published code.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mim_core.blocks import begin_as_dcgan
from mim_core.spec import Strict

LAST_PX = 4
"""The critic halves its view while the shorter side is twice so many px or more, and judges what is left at once."""


class Adversarial(Strict):
    """Params of the term: the model minimises (1 - weight) reconstruction + weight * (what the critic is not fooled).

    `sees`: the `hole`, which is the box round what is predicted (for masks that never move), or the whole `image`, in
    which predictions take the place of what they predict. `lr` is the critic's, which follows the row's schedule.
    """

    weight: Annotated[float, Field(gt=0, lt=1)] = 0.001
    sees: Literal["hole", "image"] = "hole"
    base: PositiveInt = 64
    """Channels of the critic's first layer."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4


class Critic(nn.Module):
    """Convolutions of 4 x 4 with stride 2, then one score a picture: high where it looks real."""

    def __init__(self, size: tuple[int, int], channels: int, base: int) -> None:
        """`size` is the view's in px; raises ValueError where it is too small to judge."""
        super().__init__()
        if min(size) < LAST_PX:
            raise ValueError(f"adversarial: the view is {list(size)} px; the critic needs {LAST_PX} px a side at least")
        halvings = (min(size) // LAST_PX).bit_length() - 1
        layers: list[nn.Module] = []
        width = channels
        for index in range(halvings):
            wider = base * 2 ** min(index, 3)
            layers.append(nn.Conv2d(width, wider, 4, 2, 1))
            if index:
                layers.append(nn.BatchNorm2d(wider))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, LAST_PX))
        for module in self.layers:
            begin_as_dcgan(module)

    def forward(self, pictures: Float[Tensor, "b c H W"]) -> Float[Tensor, " b"]:
        scores: Tensor = self.layers(pictures)
        return scores.flatten(1).mean(1)

    def loss(self, real: Float[Tensor, "b c H W"], fake: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
        """The critic's own loss: real pictures should score as real and recovered ones as not.

        The two go through batch normalisation apart, as published: together their statistics would tell them apart.
        """
        return self._against(real, 1.0) + self._against(fake.detach(), 0.0)

    def fooled(self, fake: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
        """The model's loss: recovered pictures should score as real."""
        return self._against(fake, 1.0)

    def _against(self, pictures: Tensor, truth: float) -> Tensor:
        scores = self(pictures).float()
        return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, truth))
