"""Rows of `params/`: what each file may hold, and every check that needs no data.

`load(folder)` reads all files and raises one SpecError with every fault of every row, before any work starts.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, Field

from mim_core.data.sources import SOURCES
from mim_core.devices import Precision
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.heads import HEADS
from mim_core.losses import LOSSES
from mim_core.masks import MASKS, Grid, generator
from mim_core.spec import OneOf, Piece, SpecError, Strict, bind, build, check, nearest, pair
from mim_core.targets import TARGETS
from mim_core.transforms import Augment

Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class FineTune(Strict):
    """AdamW under warm-up and cosine; the rate comes from a grid."""

    batch: Whole
    epochs: Positive
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The last learning rate as a share of the first."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(pair)] = (0.9, 0.999)
    clip: Positive | None = None
    """Largest gradient norm."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0

    def steps(self, images: int) -> tuple[int, int]:
        """Steps in all and of warm-up, for a training set of `images`."""
        epoch = max(1, images // self.batch)
        return max(1, round(self.epochs * epoch)), round(self.warmup_epochs * epoch)


class Optim(FineTune):
    """AdamW at one rate: that of the step, already scaled to the batch."""

    lr: Positive


class EncoderOf(Strict):
    """The encoder that a file of weights names in its header."""

    encoder: Annotated[Piece, OneOf(ENCODERS)]


class DataRow(Strict):
    """A dataset: the folder `data/<name>/` read by a source."""

    source: Annotated[Piece, OneOf(SOURCES)]


class PretrainRow(Strict):
    """A method on a dataset: mask x fill x encoder x head x target x loss, and how long and how fast it learns."""

    data: str
    encoder: Annotated[Piece, OneOf(ENCODERS)]
    mask: Annotated[Piece, OneOf(MASKS)]
    fill: Annotated[Piece, OneOf(FILLS)]
    head: Annotated[Piece, OneOf(HEADS)]
    target: Annotated[Piece, OneOf(TARGETS)]
    loss: Annotated[Piece, OneOf(LOSSES, scope=(Literal["hidden", "all"], "hidden"))]
    augment: Augment | None = None
    optim: Optim
    seed: Seed = 0
    precision: Precision = "auto"
    checkpoint_minutes: Positive = 1.0


class DownstreamRow(Strict):
    """A task that judges an encoder: `init` is a pretrain row, or `scratch` with the `encoder` to start afresh."""

    task: Literal["classify"]
    data: str
    init: str
    encoder: Annotated[Piece, OneOf(ENCODERS)] | None = None
    labels: Whole | None = None
    """Labelled training images; all of them where it is left out."""
    lr_grid: Annotated[list[Positive], Field(min_length=1)]
    """Learning rates to choose from, on validation images, with the first seed."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    augment: Augment | None = None
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optim: FineTune
    precision: Precision = "auto"
    checkpoint_minutes: Positive = 1.0


class Params(Strict):
    """All rows, by file and name."""

    data: dict[str, DataRow]
    pretrain: dict[str, PretrainRow]
    downstream: dict[str, DownstreamRow]
    baselines: dict[str, DownstreamRow]

    def judged(self) -> dict[str, DownstreamRow]:
        """Baselines and downstream rows together."""
        return {**self.baselines, **self.downstream}


FILES = {"data.yaml": ("data",), "pretrain.yaml": ("pretrain",), "downstream.yaml": ("baselines", "downstream")}
ROW_NAME = "abcdefghijklmnopqrstuvwxyz0123456789_-"
MODELS: dict[str, type[Strict]] = {
    "data": DataRow,
    "pretrain": PretrainRow,
    "downstream": DownstreamRow,
    "baselines": DownstreamRow,
}


def load(folder: Path) -> Params:
    """Read and check all rows in `folder`; raises SpecError."""
    faults: list[str] = []
    rows: dict[str, dict[str, Any]] = {}
    for name, sections in FILES.items():
        content = _read(folder / name, sections, faults)
        for section in sections:
            rows[section] = {}
            for key, value in content[section].items():
                where = f"{folder.name}/{name}: {section}.{key}"
                if not isinstance(key, str) or not key or set(key) - set(ROW_NAME):
                    faults.append(
                        f"{where}: a row's name may hold lower-case letters, digits, '_' and '-' only; rename it"
                    )
                    continue
                try:
                    rows[section][key] = check(MODELS[section], value, where)
                except SpecError as error:
                    faults.append(str(error))
    if not faults:
        params = Params(**rows)
        faults = _relations(params, folder.name)
        if not faults:
            return params
    raise SpecError("\n".join(faults))


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first of two rows of one name would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    problem = f"the key '{key.value}' stands twice; rename or delete one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path, sections: tuple[str, ...], faults: list[str]) -> dict[str, dict[str, Any]]:
    where = f"{path.parent.name}/{path.name}"
    empty: dict[str, dict[str, Any]] = {section: {} for section in sections}
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        faults.append(f"{where}: the file is missing; restore it with `git checkout {where}`")
        return empty
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        faults.append(f"{where}: not valid YAML: {' '.join(str(error).split())}")
        return empty
    if not isinstance(content, dict) or set(content) != set(sections):
        found = sorted(map(str, content)) if isinstance(content, dict) else content
        faults.append(f"{where}: found {found!r} at the top; it must hold exactly {list(sections)}")
        return empty
    for section in sections:
        if not isinstance(content[section], dict):
            faults.append(f"{where}: {section}: found {content[section]!r}; it must map row names to rows")
            return empty
    return content


def _relations(params: Params, root: str) -> list[str]:
    """Check what ties rows together: names that must exist, sizes that must divide."""
    faults: list[str] = []
    for name, row in params.pretrain.items():
        where = f"{root}/pretrain.yaml: pretrain.{name}"
        size = _size(params, row.data, where, faults)
        if size:
            faults += [f"{where}.{fault}" for fault in _fits(row, size)]
    for section, rows in (("baselines", params.baselines), ("downstream", params.downstream)):
        for name, judged in rows.items():
            where = f"{root}/downstream.yaml: {section}.{name}"
            size = _size(params, judged.data, where, faults)
            faults += [f"{where}.{fault}" for fault in _starts(section, judged, params, size)]
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


def _starts(section: str, row: DownstreamRow, params: Params, size: tuple[int, int] | None) -> list[str]:
    if section == "baselines":
        if row.init != "scratch":
            return [f"init: found '{row.init}'; a baseline starts from 'scratch'; move the row to 'downstream'"]
        if row.encoder is None:
            return ["encoder: missing; a row from scratch names the encoder to start afresh"]
        return _fault_of(row.encoder, size, "encoder") if size else []
    if row.init == "scratch":
        return ["init: found 'scratch'; move the row to 'baselines'"]
    if row.init not in params.pretrain:
        return [f"init: '{row.init}' is not one of {sorted(params.pretrain)}{nearest(row.init, params.pretrain)}"]
    if row.encoder is not None:
        return ["encoder: found one beside init; the pretrain row already names it; delete this key"]
    before = params.data.get(params.pretrain[row.init].data)
    if before and size and (was := tuple(before.source.params()["size_px"])) != size:
        return [f"init: '{row.init}' was pretrained at {was} px and '{row.data}' has {size} px; give both one size"]
    return []


def _fits(row: PretrainRow, size: tuple[int, int]) -> list[str]:
    """Build the encoder and draw one mask without data or memory, to find what does not divide."""
    faults = _fault_of(row.encoder, size, "encoder")
    if not faults:
        try:
            bind(MASKS, row.mask)(generator(0, 0, 0), Grid(*size, row.encoder.params()["patch_px"]))
        except ValueError as error:
            faults.append(f"mask.{error}")
    return faults


def _fault_of(encoder: Piece, size: tuple[int, int], where: str) -> list[str]:
    try:
        with torch.device("meta"):
            build(ENCODERS, encoder, size, 3)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []
