"""The plainest head: what the features of each cell tell by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mim_core.grid import Level
from mim_core.tasks.segment.heads.layers import scoring


class Linear(nn.Module):
    """One linear layer on each cell of the last map: a 1x1 convolution."""

    def __init__(self, levels: Sequence[Level], classes: int) -> None:
        super().__init__()
        self.score = scoring(levels[-1].width, classes)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
        out: Tensor = self.score(maps[-1])
        return out
