"""Rows of `params/`: what each file may hold, and every check that needs no data.

`load(folder)` reads all files and raises one SpecError with every fault of every row, before any work starts.
"""

from mim_core.params.load import FILES, ROW_NAME, Params, load, load_recipes
from mim_core.params.relations import needs
from mim_core.params.rows import (
    DataRow,
    DownstreamRow,
    EncoderOf,
    FineTune,
    Optim,
    PretrainRow,
    TargetRow,
    TokenizerOf,
)

__all__ = [
    "FILES",
    "ROW_NAME",
    "DataRow",
    "DownstreamRow",
    "EncoderOf",
    "FineTune",
    "Optim",
    "Params",
    "PretrainRow",
    "TargetRow",
    "TokenizerOf",
    "load",
    "load_recipes",
    "needs",
]
