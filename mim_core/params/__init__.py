"""Rows of `params/`: what each file may hold, and every check that needs no data.

`load(folder)` reads all files and raises one SpecError with every fault of every row, before any work starts.
"""

from mim_core.params.laboratory import derived
from mim_core.params.load import FILES, ROW_NAME, Params, load, load_recipes
from mim_core.params.points import Point, axes, points
from mim_core.params.rows import (
    AblationRow,
    DataRow,
    DownstreamRow,
    EncoderOf,
    FineTune,
    Optim,
    PretrainRow,
    Scale,
    SearchRow,
    TargetRow,
    TokenizerOf,
)

__all__ = [
    "FILES",
    "ROW_NAME",
    "AblationRow",
    "DataRow",
    "DownstreamRow",
    "EncoderOf",
    "FineTune",
    "Optim",
    "Params",
    "Point",
    "PretrainRow",
    "Scale",
    "SearchRow",
    "TargetRow",
    "TokenizerOf",
    "axes",
    "derived",
    "load",
    "load_recipes",
    "points",
]
