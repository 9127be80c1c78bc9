"""Heads by name: from the encoder's features to a prediction at each wanted position.

`Head(width, grid, entries, features=None, **params)`: the features' width, the grid of the positions, what the target
holds at each, and the shape of the feature map where it is not the grid's. `mim_core.heads.head` has the contract.
"""

from mim_core.heads.convolution import ChannelwiseDecoder
from mim_core.heads.head import Head
from mim_core.heads.linear import MLP, Linear
from mim_core.heads.swin import InverseSwin, InverseSwinB, InverseSwinT
from mim_core.heads.transformer import TransformerDecoder

HEADS: dict[str, type[Head]] = {
    "linear": Linear,
    "mlp": MLP,
    "inverse_swin_t": InverseSwinT,
    "inverse_swin_b": InverseSwinB,
    "channelwise_decoder": ChannelwiseDecoder,
    "transformer_decoder": TransformerDecoder,
}

__all__ = [
    "HEADS",
    "MLP",
    "ChannelwiseDecoder",
    "Head",
    "InverseSwin",
    "InverseSwinB",
    "InverseSwinT",
    "Linear",
    "TransformerDecoder",
]
