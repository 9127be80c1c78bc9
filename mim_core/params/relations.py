"""What ties rows together, and pieces within a row: names that must exist, sizes that must divide, kinds that must fit.

Models are built on torch's meta device: in milliseconds, without memory or data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mim_core.encoders import ENCODERS
from mim_core.losses import CLASS_LOSSES
from mim_core.masks import MASKS, generator
from mim_core.params.rows import DownstreamRow, PretrainRow, TargetRow
from mim_core.pretext import assemble
from mim_core.spec import Piece, bind, build, nearest
from mim_core.tokenizers import TOKENIZERS

if TYPE_CHECKING:
    from mim_core.params.load import Params

CHANNELS = 3
"""Every source gives RGB."""
DRAWN = 4
"""Masks drawn to find whether they differ."""


def relations(params: Params, places: Mapping[str, str]) -> list[str]:
    """Check all rows against one another; `places` says where each section stands."""
    faults: list[str] = []
    for name, target in params.targets.items():
        where = f"{places['targets']}.{name}"
        size = _size(params, target.data, where, faults)
        faults += [f"{where}.{fault}" for fault in _fitting(target, size)]
    for section in ("pretrain_fitted", "pretrain"):
        rows: dict[str, PretrainRow] = getattr(params, section)
        for name, row in rows.items():
            where = f"{places[section]}.{name}"
            size = _size(params, row.data, where, faults)
            misplaced = _misplaced(section, name, row, params)
            faults += [f"{where}{fault}" for fault in misplaced]
            if size and not misplaced:
                faults += [f"{where}.{fault}" for fault in _fits(row, size, params)]
    for section in ("baselines", "downstream"):
        judged: dict[str, DownstreamRow] = getattr(params, section)
        for name, one in judged.items():
            where = f"{places[section]}.{name}"
            size = _size(params, one.data, where, faults)
            faults += [f"{where}.{fault}" for fault in _starts(section, one, params, size)]
            if section == "downstream" and name in params.baselines:
                faults.append(f"{where}: a baseline has this name too; rename one")
    return faults


def _size(params: Params, data: str, where: str, faults: list[str]) -> tuple[int, int] | None:
    if data not in params.data:
        faults.append(
            f"{where}.data: '{data}' is not one of {sorted(params.data)}{nearest(data, params.data)} "
            "(new images come in with `unmask data add FOLDER --name NAME`)"
        )
        return None
    height, width = params.data[data].source.params()["size_px"]
    return height, width


def _fitting(row: TargetRow, size: tuple[int, int] | None) -> Iterator[str]:
    """Check a tokenizer's row."""
    try:
        with torch.device("meta"):
            tokenizer = build(TOKENIZERS, row.tokenizer, CHANNELS)
    except ValueError as error:
        yield f"tokenizer: {error}"
        return
    trained = any(parameter.requires_grad for parameter in tokenizer.parameters())
    if trained and row.optim is None:
        yield "optim: missing; a tokenizer that is trained needs it"
    if not trained and row.optim is not None:
        yield f"optim: found one; '{row.tokenizer.name}' is not trained; delete this key"
    if row.least_perplexity > tokenizer.codes:
        yield f"least_perplexity: found {row.least_perplexity:g}; it may not exceed the {tokenizer.codes} codes"
    if size and any(side % tokenizer.stride for side in size):
        yield f"tokenizer: images are {list(size)} px; both must be multiples of its stride {tokenizer.stride}"


def _misplaced(section: str, name: str, row: PretrainRow, params: Params) -> list[str]:
    if section == "pretrain" and name in params.pretrain_fitted:
        return [": 'pretrain_fitted' has a row of this name too; rename one"]
    if section == "pretrain" and row.fitted is not None:
        return [".target: it is fitted first; move the row to 'pretrain_fitted'"]
    if section == "pretrain_fitted" and row.fitted is None:
        return [f".target: '{row.target.name}' is not fitted; move the row to 'pretrain'"]
    if row.fitted is not None and row.fitted not in params.targets:
        known = params.targets
        return [f".target.fitted: '{row.fitted}' is not one of {sorted(known)}{nearest(row.fitted, known)}"]
    return []


def _fits(row: PretrainRow, size: tuple[int, int], params: Params) -> list[str]:
    """Build the model and draw masks, to find what does not divide and which pieces do not go together."""
    faults = _fault_of(row.encoder, size, "encoder")
    if faults:
        return faults
    neutral = (0.5,) * CHANNELS
    try:
        with torch.device("meta"):
            tokenizer = build(TOKENIZERS, params.targets[row.fitted].tokenizer, CHANNELS) if row.fitted else None
            model, target = assemble(row, size, CHANNELS, neutral, neutral, tokenizer)
    except ValueError as error:
        return [str(error)]
    try:
        masks = [bind(MASKS, row.mask)(generator(0, 0, index), model.encoder.grid) for index in range(DRAWN)]
    except ValueError as error:
        return [f"mask.{error}"]
    return list(_unfit(row, model, target, masks))


def _unfit(row: PretrainRow, model: Any, target: Any, masks: list[np.ndarray]) -> Iterator[str]:
    fill, head, encoder = row.fill.name, row.head.name, row.encoder.name
    if model.fill.drops:
        if not model.encoder.drops:
            yield f"fill: '{fill}' leaves patches out, and the encoder '{encoder}' needs them all; use mask_token"
        elif not model.head.restores:
            missing = f"the head '{head}' cannot restore them"
            yield f"fill: '{fill}' leaves patches out, and {missing}; use transformer_decoder"
        if len({int(mask.sum()) for mask in masks}) > 1:
            yield f"fill: '{fill}' needs masks that hide equally many patches; '{row.mask.name}' does not; use random"
    classes = target.entries.classes > 0
    if classes != (row.loss.name in CLASS_LOSSES):
        kind, wanted = ("classes", "cross_entropy") if classes else ("numbers", "l1, smooth_l1 or l2")
        yield f"loss: found '{row.loss.name}'; the target '{row.target.name}' holds {kind}; use {wanted}"
    scope, ring_px = row.loss.scope, row.loss.ring_px  # type: ignore[attr-defined]
    if (scope == "ring") != (ring_px > 0):
        yield f"loss.ring_px: found {ring_px} with scope '{scope}'; a ring has a width, and no other scope has one"
    if row.adversarial:
        if not target.pixel_values:
            yield f"adversarial: the target '{row.target.name}' is no picture in full resolution; use pixels"
        moving = any(not np.array_equal(mask, masks[0]) for mask in masks)
        if row.adversarial.sees == "hole" and moving:
            yield f"adversarial.sees: the masks of '{row.mask.name}' move, so that there is no one hole; use image"


def _starts(section: str, row: DownstreamRow, params: Params, size: tuple[int, int] | None) -> list[str]:
    if section == "baselines":
        if row.init != "scratch":
            return [f"init: found '{row.init}'; a baseline starts from 'scratch'; move the row to 'downstream'"]
        if row.encoder is None:
            return ["encoder: missing; a row from scratch names the encoder to start afresh"]
        return _fault_of(row.encoder, size, "encoder") if size else []
    if row.init == "scratch":
        return ["init: found 'scratch'; move the row to 'baselines'"]
    known = params.pretrained()
    if row.init not in known:
        return [f"init: '{row.init}' is not one of {sorted(known)}{nearest(row.init, known)}"]
    if row.encoder is not None:
        return ["encoder: found one beside init; the pretrain row already names it; delete this key"]
    before = params.data.get(known[row.init].data)
    if not size or not before or tuple(before.source.params()["size_px"]) == size:
        return []  # what is wrong at the pretraining size is told there
    return _fault_of(known[row.init].encoder, size, f"init: '{row.init}' at {list(size)} px: encoder")


def _fault_of(encoder: Piece, size: tuple[int, int], where: str) -> list[str]:
    try:
        with torch.device("meta"):
            build(ENCODERS, encoder, size, CHANNELS)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []
