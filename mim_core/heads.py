"""Heads: from the encoder's features to a prediction at each wanted position.

`head(features, wanted) -> Float[m, k]`: `wanted` marks the positions to predict (the hidden ones, or all), and the m
rows come in the order of `features[wanted]`.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn


class Linear(nn.Module):
    """One linear layer a patch (SimMIM, section 3.3: a 1x1 convolution and pixel shuffle).

    The same values in the same order as the published convolution; the shuffle itself is `Pixels.render`'s, so that
    only wanted positions are computed, which is exact as no position reads another.
    """

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, values)

    def forward(self, features: Float[Tensor, "b n d"], wanted: Bool[Tensor, "b n"]) -> Float[Tensor, "m k"]:
        out: Tensor = self.project(features[wanted])
        return out


HEADS = {"linear": Linear}
