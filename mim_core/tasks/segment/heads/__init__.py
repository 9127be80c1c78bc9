"""Heads of semantic segmentation by name: from an encoder's maps to scores of each class.

`Head(levels, classes, **params)` takes the levels of the encoder's pyramid; `head(maps, size)` gives logits
[b, k, h, w] of whatever resolution the head comes to, for images of `size` (height, width) px, to which the caller
resizes them.
"""

from mim_core.spec import Table
from mim_core.tasks.segment.heads.fcn import FCN
from mim_core.tasks.segment.heads.linear import Linear
from mim_core.tasks.segment.heads.setr_pup import ProgressiveUpsampling
from mim_core.tasks.segment.heads.upernet import UPerNet

SEGMENT_HEADS: Table = {"linear": Linear, "fcn": FCN, "setr_pup": ProgressiveUpsampling, "upernet": UPerNet}
