"""Tokenizers: an image as a grid of discrete codes, and codes back as an image.

`TOKENIZERS[name](channels, **params)` is a module with `stride` (px a token), `codes` (size of the vocabulary),
`logits(images) -> Float[b, codes, h, w]`, `tokens(images) -> Int[b, h, w]`, their arg-max without gradient, and
`decode(tokens) -> images`. Images are [b, c, H, W] in [0, 1], H and W multiples of the stride. `advice` says what to
change where its codebook collapsed. `palette` is fitted by k-means, the others by gradient (`mim_core.fit_target`):
`dvae` and `dvae_small` through relaxed codes, `vq_small` straight through the nearest.
"""

from mim_core.spec import Table
from mim_core.tokenizers.dalle import DALLE
from mim_core.tokenizers.palette import Palette
from mim_core.tokenizers.small import SmallDVAE, SmallVQ

TOKENIZERS: Table = {"dvae": DALLE, "dvae_small": SmallDVAE, "vq_small": SmallVQ, "palette": Palette}
