"""What ties rows together, and pieces within a row: names that must exist, sizes that must divide, kinds that must fit.

Models are built on torch's meta device: in milliseconds, without memory or data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mim_core.adversarial import Critic
from mim_core.devices import Compute, unreal
from mim_core.encoders import ENCODERS
from mim_core.fit_target import token_grid
from mim_core.losses import CLASS_LOSSES
from mim_core.masks import MASKS, generators
from mim_core.optim import WITH_BETAS, of_a_block
from mim_core.params.rows import DownstreamRow, FineTune, PretrainRow, TargetRow
from mim_core.pretext import assemble
from mim_core.spec import Piece, bind, build, nearest, shown
from mim_core.tasks import TASKS
from mim_core.tasks.task import Facts, sight, tuned
from mim_core.tokenizers import TOKENIZERS
from mim_core.tokenizers.dalle import DiscreteVAE

if TYPE_CHECKING:
    from mim_core.params.load import Params

CHANNELS = 3
"""Every source gives RGB."""
DRAWN = 4
"""Masks drawn to find whether they differ."""
NEUTRAL_CLASSES = ("a", "b")
"""Classes of a task while no data is read."""
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
NOWHERE = "check the name"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
STARTS = {
    "baselines": "a baseline begins from 'scratch' or from 'timm:NAME'",
    "supervised": "a supervised row begins from a file of weights",
    "downstream": "a downstream row begins from a pretrain row",
    "continued": "a continued row begins from another row of this file",
}


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
                faults += [f"{where}.{fault}" for fault in fits(row, size, params)]
    taken: dict[str, str] = {}
    for section in (one for one in STARTS if one in places):
        judged: dict[str, DownstreamRow] = getattr(params, section)
        for name, one in judged.items():
            where = f"{places[section]}.{name}"
            size = _size(params, one.data, where, faults)
            faults += [f"{where}.{fault}" for fault in (*_starts(section, name, one, params), *trained(one))]
            if size:
                faults += [f"{where}.{fault}" for fault in judges(one, params, size)]
            if name in taken:
                faults.append(f"{where}: '{taken[name]}' has a row of this name too; rename one")
            taken[name] = section
    return faults


def _size(params: Params, data: str, where: str, faults: list[str]) -> tuple[int, int] | None:
    if data not in params.data:
        faults.append(
            f"{where}.data: {shown(data)} is not one of {sorted(params.data)}{nearest(data, params.data)} "
            "(new images come in with `unmask data add FOLDER --name NAME`)"
        )
        return None
    return size_of(params, data)


def size_of(params: Params, data: str) -> tuple[int, int]:
    """(height, width) in px of a dataset's images."""
    height, width = params.data[data].source.params()["size_px"]
    return height, width


def _fitting(row: TargetRow, size: tuple[int, int] | None) -> Iterator[str]:
    """Check a tokenizer's row."""
    try:
        with unreal():
            tokenizer = build(TOKENIZERS, row.tokenizer, CHANNELS)
    except ValueError as error:
        yield f"tokenizer: {error}"
        return
    trained = any(parameter.requires_grad for parameter in tokenizer.parameters())
    if trained and row.optim is None:
        yield "optim: missing; a tokenizer that is trained needs it"
    if not trained and row.optim is not None:
        yield f"optim: found one; '{row.tokenizer.name}' is not trained; delete this key"
    if not isinstance(tokenizer, DiscreteVAE):
        for key in sorted(row.model_fields_set & {"temperature", "kl_weight"}):
            yield f"{key}: found one; the codes of '{row.tokenizer.name}' are not relaxed; delete this key"
    yield from _blockless(row.optim, tokenizer)
    if row.least_perplexity > tokenizer.codes:
        yield f"least_perplexity: found {row.least_perplexity:g}; it may not exceed the {tokenizer.codes} codes"
    if size:
        try:
            token_grid(tokenizer, size)
        except ValueError as error:
            yield f"tokenizer: {error}"


def _misplaced(section: str, name: str, row: PretrainRow, params: Params) -> list[str]:
    if section == "pretrain" and name in params.pretrain_fitted:
        return [": 'pretrain_fitted' has a row of this name too; rename one"]
    if section == "pretrain" and row.fitted is not None:
        return [".target: it is fitted first; move the row to 'pretrain_fitted'"]
    if section == "pretrain_fitted" and row.fitted is None:
        return [f".target: '{row.target.name}' is not fitted; move the row to 'pretrain'"]
    if row.fitted is not None and row.fitted not in params.targets:
        known = params.targets
        return [f".target.fitted: {shown(row.fitted)} is not one of {sorted(known)}{nearest(row.fitted, known)}"]
    return []


def fits(row: PretrainRow, size: tuple[int, int], params: Params) -> list[str]:
    """Build the model and draw masks, to find what does not divide and which pieces do not go together."""
    faults = _fault_of(row.encoder, size, "encoder")
    if faults:
        return faults
    try:
        model, target = _assembled(row, size, params)
    except ValueError as error:
        return [str(error)]
    try:
        at, mask = generators(0), bind(MASKS, row.mask)
        masks = [mask(at(0, index), model.encoder.grid) for index in range(DRAWN)]
    except ValueError as error:
        return [f"mask.{error}"]
    return list(_unfit(row, model, target, masks))


def _assembled(row: PretrainRow, size: tuple[int, int], params: Params) -> tuple[Any, Any]:
    """Build a row's model and target where they take no memory; raises ValueError."""
    neutral = (0.5,) * CHANNELS
    with unreal():
        tokenizer = build(TOKENIZERS, params.targets[row.fitted].tokenizer, CHANNELS) if row.fitted else None
        return assemble(row, size, CHANNELS, neutral, neutral, tokenizer)


def _blockless(optim: FineTune | None, model: nn.Module) -> Iterator[str]:
    """Check that muon has what it is for."""
    if optim and optim.optimiser.name == "muon":
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        if not any(of_a_block(name) for name in trained):
            yield "optim.optimiser: found 'muon', and no transformer block is trained that it could move; use adamw"


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
    yield from _blockless(row.optim, model)
    if row.devices > 1 and any(isinstance(one, BATCH_NORMS) for one in model.modules()):
        yield f"devices: found {row.devices}; '{encoder}' or '{head}' needs the whole batch for BatchNorm; use 1"
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


def _starts(section: str, name: str, row: DownstreamRow, params: Params) -> list[str]:
    """Check where a row begins against the section that it stands in."""
    own, begins = STARTS[section], row.init.partition(":")[0]
    if section == "supervised":
        if not row.init.endswith(WEIGHT_FILES):
            endings = ", ".join(WEIGHT_FILES)
            return [f"init: found {shown(row.init)}; {own}, which ends in {endings}; {_elsewhere(row, params)}"]
    elif section == "baselines":
        if begins not in ("scratch", "timm"):
            return [f"init: found {shown(row.init)}; {own}; {_elsewhere(row, params)}"]
    else:
        known = params.pretrained() if section == "downstream" else params.judged()
        if row.init not in known:
            where = _elsewhere(row, params)
            hint = where if where != NOWHERE else f"choose one of {sorted(known)}{nearest(row.init, known)}"
            return [f"init: found {shown(row.init)}; {own}; {hint}"]
        if section == "continued" and name in _line(row, params):
            return [f"init: {shown(row.init)} begins from this row itself; rows may not go round in a circle"]
    if row.init == "scratch" and row.encoder is None:
        return ["encoder: missing; a row from scratch names the encoder to start afresh"]
    if row.init != "scratch" and row.encoder is not None:
        return ["encoder: found one beside init, which already tells it; delete this key"]
    return []


def _elsewhere(row: DownstreamRow, params: Params) -> str:
    """Say which section a row belongs to by its init."""
    if row.init == "scratch" or row.init.startswith("timm:"):
        return "move the row to 'baselines'"
    if row.init.endswith(WEIGHT_FILES):
        return "move the row to 'supervised'"
    if row.init in params.pretrained():
        return "move the row to 'downstream'"
    return "move the row to 'continued'" if row.init in params.judged() else NOWHERE


def _line(row: DownstreamRow, params: Params) -> list[str]:
    """Give the downstream rows that a row begins from, one from another."""
    line: list[str] = []
    judged = params.judged()
    while row.init in judged and row.init not in line:
        line.append(row.init)
        row = judged[row.init]
    return line


def _encoder(row: DownstreamRow, params: Params) -> Piece | None:
    """The encoder that a row judges, where rows tell it and not a file; its data row's size may be another."""
    for name in (None, *_line(row, params)):
        one = params.judged()[name] if name else row
        if one.encoder:
            return one.encoder
        if one.init in params.pretrained():
            return params.pretrained()[one.init].encoder
    return None


def trained(row: DownstreamRow) -> Iterator[str]:
    trains = TASKS[row.task.name].trains  # type: ignore[attr-defined]
    for key, found in (("optim", row.optim is not None), ("lr_grid", bool(row.lr_grid))):
        if trains and not found:
            yield f"{key}: missing; the task '{row.task.name}' trains, and this key is required"
        if not trains and found:
            yield f"{key}: found one; the task '{row.task.name}' trains nothing; delete this key"
    if row.augment and not trains:
        yield f"augment: found one; the task '{row.task.name}' trains nothing; delete this key"
    of_image = {"labels", "presence"} & set(TASKS[row.task.name].needs)  # type: ignore[attr-defined]
    for key in ("randaugment", "erase"):
        if row.augment and not of_image and getattr(row.augment, key):
            beside = f"the boxes and masks of '{row.task.name}' cannot follow it"
            yield f"augment.{key}: found it set; {beside}; delete this key"


def judges(row: DownstreamRow, params: Params, size: tuple[int, int]) -> list[str]:
    """Build the task on its encoder, to find what does not divide and which pieces do not go together."""
    piece = _encoder(row, params)
    if piece is None:
        return []
    before = params.data.get(params.pretrained()[row.init].data) if row.init in params.pretrained() else None
    sees = sight(row.task, size)
    if before and tuple(before.source.params()["size_px"]) == sees and not row.window and _fault_of(piece, sees, ""):
        return []  # what is wrong at the pretraining size is told there
    if row.window and "window" not in piece.params():
        return [f"window: found {row.window}; the encoder '{piece.name}' has no windows; delete this key"]
    piece = tuned(piece, row.drop_path, row.window)
    where = "encoder" if row.encoder else f"init: {shown(row.init)} at {list(sees)} px: encoder"
    faults = _fault_of(piece, sees, where)
    if faults:
        return faults
    try:
        task = _task(row, piece, size)
    except ValueError as error:
        return [f"task.{error}"]
    return list(_blockless(row.optim, task.model))


def _task(row: DownstreamRow, piece: Piece, size: tuple[int, int]) -> Any:
    """Build a row's task for classes that nobody knows yet, where it takes no memory; raises ValueError."""
    neutral = (0.5,) * CHANNELS
    facts = Facts(size, CHANNELS, neutral, neutral, NEUTRAL_CLASSES, NEUTRAL_CLASSES, ())
    with unreal():
        encoder = build(ENCODERS, piece, sight(row.task, size), CHANNELS)
        return build(TASKS, row.task, encoder, facts, Compute(torch.device("meta"), False))


def needs(params: Params) -> dict[str, list[str]]:
    """Give the annotations that each downstream row needs one of; all that its task can use where a file of weights
    tells its encoder."""
    found: dict[str, list[str]] = {}
    for name, row in params.judged().items():
        piece, (height, width) = _encoder(row, params), params.data[row.data].source.params()["size_px"]
        judge: Any = TASKS[row.task.name]
        if piece:
            judge = _task(row, tuned(piece, row.drop_path, row.window), (height, width))
        found[name] = list(judge.needs)
    return found


def sizes(params: Params) -> dict[str, dict[str, int]]:
    """Give what each row leaves on the disk, by `section.row`: bytes of its `weights`, and of a `checkpoint`.

    Rows that begin from a file of weights are not there: the file tells their encoder.
    """
    found: dict[str, dict[str, int]] = {}
    for name, target in params.targets.items():
        with unreal():
            found[f"targets.{name}"] = _bytes(build(TOKENIZERS, target.tokenizer, CHANNELS), target.optim)
    for section in ("pretrain_fitted", "pretrain"):
        for name, row in getattr(params, section).items():
            size = size_of(params, row.data)
            model, target = _assembled(row, size, params)
            with unreal():
                # At most: of a hole the critic is as large as the hole, which the masks tell.
                critic = Critic(size, target.entries.depth, row.adversarial.base) if row.adversarial else None
            found[f"{section}.{name}"] = _bytes(model, row.optim, critic)
    for section in STARTS:
        for name, one in getattr(params, section).items():
            if piece := _encoder(one, params):
                task = _task(one, tuned(piece, one.drop_path, one.window), size_of(params, one.data))
                found[f"{section}.{name}"] = _bytes(task.model, one.optim)
    return found


def _bytes(model: torch.nn.Module, optim: FineTune | None, critic: torch.nn.Module | None = None) -> dict[str, int]:
    """Bytes of a model's weights and of a checkpoint: what is trained has its optimiser's state, and an average."""
    players = [one for one in (model, critic) if one is not None]
    frozen = sum(p.nbytes for one in players for p in one.parameters() if not p.requires_grad)
    held = sum(tensor.nbytes for one in players for tensor in one.state_dict().values()) - frozen
    trained = sum(p.nbytes for one in players for p in one.parameters() if p.requires_grad)
    copies = ((2 if optim.optimiser.name in WITH_BETAS else 1) + (optim.ema is not None)) if optim else 0
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"weights": weights, "checkpoint": held + trained * copies if optim else 0}


def _fault_of(encoder: Piece, size: tuple[int, int], where: str) -> list[str]:
    key = (encoder.model_dump_json(), size)
    if key not in _FAULTS:  # many rows, and all points of most ablations, have one encoder
        _FAULTS[key] = ""
        try:
            with unreal():
                build(ENCODERS, encoder, size, CHANNELS)
        except ValueError as error:
            _FAULTS[key] = str(error)
    return [f"{where}: {_FAULTS[key]}"] if _FAULTS[key] else []


_FAULTS: dict[tuple[str, tuple[int, int]], str] = {}
"""What is wrong with encoders that were built before, at a size."""
