"""Rows: the repository's load and resolve to their golden text, and what cannot run is told before any work."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from core_pieces import ABLATION, CLASSIFY, ENCODER, FITTED, OPTIM, PALETTE, PRETRAIN, SEARCH, TARGET

from mim_core.adversarial import Adversarial
from mim_core.data.sources import SOURCES
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.heads import HEADS
from mim_core.losses import LOSSES
from mim_core.masks import MASKS
from mim_core.optim import SCHEDULES
from mim_core.params import FILES, DataRow, DownstreamRow, Optim, PretrainRow, TargetRow, load
from mim_core.spec import OneOf, SpecError, check
from mim_core.targets import TARGETS
from mim_core.tokenizers import TOKENIZERS
from mim_core.transforms import Augment

ROWS = Path(__file__).parents[1] / "params"
GOLDEN = Path(__file__).parent / "golden" / "params"
REPOSITORY = load(ROWS)
NAMES = [
    f"{section}.{row}" for sections in FILES.values() for section in sections for row in getattr(REPOSITORY, section)
]
TUNED = {**{key: value for key, value in CLASSIFY.items() if key != "encoder"}, "init": "one"}
VQ = {"data": "tiny", "tokenizer": "vq_small", "optim": OPTIM}
DELETED = object()


def written(folder: Path, file: str = "data.yaml", path: str = "", value: Any = None) -> Path:
    """Write valid rows, but for one change, as a params folder."""
    files: dict[str, Any] = {
        "data.yaml": {"data": {"tiny": {"source": {"name": "scenes", "size_px": [32, 48]}}}},
        "targets.yaml": {"targets": {"codes": deepcopy(TARGET), "colours": deepcopy(PALETTE)}},
        "pretrain.yaml": {"pretrain_fitted": {"two": deepcopy(FITTED)}, "pretrain": {"one": deepcopy(PRETRAIN)}},
        "downstream.yaml": {
            "baselines": {"fresh": deepcopy(CLASSIFY)},
            "supervised": {},
            "downstream": {"tuned": deepcopy(TUNED)},
            "continued": {},
        },
        "ablations.yaml": {"ablations_fitted": {}, "ablations": {"ratio": deepcopy(ABLATION)}},
        "search.yaml": {"search_fitted": {}, "search": {"recipe": deepcopy(SEARCH)}},
    }
    if path:
        at = files[file]
        *parents, last = path.split(".")
        for key in parents:
            at = at[key]
        if value is DELETED:
            del at[last]
        else:
            at[last] = value
    (folder / "params").mkdir()
    for name, content in files.items():
        (folder / "params" / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "params"


def faults(folder: Path) -> list[str]:
    with pytest.raises(SpecError) as error:
        load(folder)
    return str(error.value).splitlines()


def test_valid_rows_load(tmp_path: Path) -> None:
    params = load(written(tmp_path))
    assert list(params.judged()) == ["fresh", "tuned"]


BAD: list[tuple[str, str, Any, str]] = [
    ("pretrain", "pretrain.one.opitm", {}, "one.opitm: unknown key;* did you mean 'optim'?"),
    (
        "pretrain",
        "pretrain.one.optim.warmup_epoch",
        1,
        "optim.warmup_epoch: unknown key;* did you mean 'warmup_epochs'?",
    ),
    ("pretrain", "pretrain.one.optim", DELETED, "one.optim: missing; this key is required"),
    ("pretrain", "pretrain.one.optim.lr", "1e-4", "optim.lr: found '1e-4';* such as 1.0e-04 (YAML reads 1e-4 as text)"),
    ("pretrain", "pretrain.one.optim.lr", float("nan"), "optim.lr: found nan; must be a finite number"),
    ("pretrain", "pretrain.one.optim.batch", 6.5, "optim.batch: found 6.5; must be a valid integer"),
    ("pretrain", "pretrain.one.optim.betas", [0.9, 1.0], "optim.betas.1: found 1.0; must be less than 1"),
    ("pretrain", "pretrain.one.mask.ratio", 1.4, "mask.ratio: found 1.4; must be less than 1"),
    ("pretrain", "pretrain.one.mask", "randon", "mask.name: 'randon' is not one of *; did you mean 'random'?"),
    ("pretrain", "pretrain.one.mask.unit_px", 12, "mask.unit_px: found 12;* choose one of [4, 8, 16]"),
    ("pretrain", "pretrain.one.encoder.patch_px", 5, "encoder: image height: found 32 px;* try 30"),
    ("pretrain", "pretrain.one.encoder.heads", 5, "encoder: heads: found 5; it must divide the width 32"),
    ("pretrain", "pretrain.one.encoder", {**ENCODER, "width": 30, "heads": 2}, "encoder: width: found 30;* try 32"),
    ("pretrain", "pretrain.one.loss", {"name": "l1", "scope": "hiden"}, "loss.scope: found 'hiden'; must be *"),
    (
        "pretrain",
        "pretrain.one.data",
        "tyni",
        "data: 'tyni' is not one of ['tiny']; did you mean 'tiny'? (new images *",
    ),
    ("pretrain", "pretrain.one.optim.base_lr", 1.0e-4, "one.optim: found lr 0.001, base_lr 0.0001,* give either lr,*"),
    ("pretrain", "pretrain.one.loss", "cross_entropy", "one.loss: found 'cross_entropy';* 'pixels' holds numbers;*"),
    ("pretrain", "pretrain.one.loss", {"name": "l1", "scope": "ring"}, "one.loss.ring_px: found 0 with scope 'ring';*"),
    ("pretrain", "pretrain.one.loss", {"name": "l1", "ring_px": 4}, "one.loss.ring_px: found 4 with scope 'hidden';*"),
    ("pretrain", "pretrain.one.target", {"name": "pixels", "cell_px": 3}, "one.target: cell_px: found 3;*"),
    (
        "pretrain",
        "pretrain.one.target",
        "mean_colour",
        "one.loss: found 'l1';* 'mean_colour' holds classes;*",
    ),
    ("pretrain", "pretrain.one.fill", "drop", "one.fill: 'drop' leaves patches out,* use transformer_decoder"),
    ("pretrain", "pretrain.one.adversarial", {"sees": "hole"}, "one.adversarial.sees: the masks of 'random' move*"),
    ("pretrain", "pretrain.one.target", FITTED["target"], "one.target: it is fitted first;* to 'pretrain_fitted'"),
    ("pretrain", "pretrain_fitted.two.target", "mean_colour", "two.target: 'mean_colour' is not fitted;*"),
    ("pretrain", "pretrain_fitted.two.target.fitted", "cods", "fitted: 'cods' is not one of *; did you mean 'codes'?"),
    ("pretrain", "pretrain_fitted.one", FITTED, "pretrain.one: 'pretrain_fitted' has a row of this name too;*"),
    ("targets", "targets.codes.optim", DELETED, "codes.optim: missing; a tokenizer that is trained needs it"),
    ("targets", "targets.colours.optim", OPTIM, "colours.optim: found one; 'palette' is not trained; delete this key"),
    ("targets", "targets.codes.optim.optimiser", "muon", "codes.optim.optimiser: found 'muon', and no transformer*"),
    (
        "targets",
        "targets.colours.kl_weight",
        {"start": 0.0, "end": 0.1},
        "colours.kl_weight: found one;* delete this key",
    ),
    (
        "targets",
        "targets.vq",
        {**VQ, "temperature": {"start": 1.0, "end": 0.1}},
        "vq.temperature: found one;* 'vq_small'*",
    ),
    (
        "targets",
        "targets.codes.tokenizer.layers",
        5,
        "codes.tokenizer: stride: found 32 px a token;* 32 x 48 px; choose*",
    ),
    ("targets", "targets.codes.least_perplexity", 99, "codes.least_perplexity: found 99;* 16 codes"),
    ("targets", "targets.codes.temperature", {"start": 1.0, "end": 0.0}, "codes.temperature: found 1.0 to 0.0;*"),
    ("pretrain", "pretrain.one.seed", -1, "seed: found -1; must be greater than or equal to 0"),
    ("pretrain", "pretrain.one.augment", {"scale": [1.0, 0.5]}, "augment.scale: found [1.0, 0.5];* swap them"),
    ("pretrain", "pretrain.one", None, "pretrain.one: found None; it must map keys to values"),
    ("pretrain", "pretrain.One", PRETRAIN, "pretrain.One: a row's name may hold lower-case letters,*; rename it"),
    ("pretrain", "pretrain.a b", PRETRAIN, "pretrain.a b: a row's name may hold lower-case letters,*; rename it"),
    ("pretrain", "pretrain", [1], "pretrain: found [1]; it must map row names to rows"),
    (
        "pretrain",
        "pretrian",
        {},
        "found ['pretrain', 'pretrain_fitted', 'pretrian'] at the top; it must hold exactly *",
    ),
    ("data", "data.tiny.source", "scense", "source.name: 'scense' is not one of *; did you mean 'scenes'?"),
    ("data", "data.tiny.source.size_px", [32, 0], "source.size_px.1: found 0; must be greater than 0"),
    (
        "downstream",
        "downstream.tuned.init",
        "oen",
        "tuned.init: found 'oen'; a downstream row begins from a pretrain row;*; did you mean 'one'?",
    ),
    ("downstream", "downstream.tuned.init", "scratch", "tuned.init: found 'scratch';* move the row to 'baselines'"),
    (
        "downstream",
        "downstream.tuned.encoder",
        CLASSIFY["encoder"],
        "tuned.encoder: found one beside init,*; delete this key",
    ),
    ("downstream", "downstream.tuned.task", "clasify", "tuned.task.name: 'clasify' is not one of*mean 'classify'?"),
    ("downstream", "downstream.fresh", TUNED, "downstream.fresh: 'baselines' has a row of this name too; rename one"),
    (
        "downstream",
        "baselines.fresh.init",
        "one",
        "fresh.init: found 'one'; a baseline begins from 'scratch'*move the row to 'downstream'",
    ),
    (
        "downstream",
        "supervised.theirs",
        {**TUNED, "init": "one"},
        "theirs.init: found 'one'; a supervised row begins from a file of weights*move the row to 'downstream'",
    ),
    (
        "downstream",
        "downstream.tuned.init",
        "weights/deit.pth",
        "tuned.init: found 'weights/deit.pth'; a downstream row begins*move the row to 'supervised'",
    ),
    (
        "downstream",
        "continued.round",
        {**TUNED, "init": "round"},
        "round.init: 'round' begins from this row itself; rows may not go round in a circle",
    ),
    (
        "downstream",
        "continued.later",
        {**TUNED, "init": "one"},
        "later.init: found 'one';*move the row to 'downstream'",
    ),
    (
        "downstream",
        "baselines.fresh",
        {**CLASSIFY, "task": {"name": "segment", "head": "linear"}, "augment": {"erase": 0.25}},
        "fresh.augment.erase: found it set; the boxes and masks of 'segment' cannot follow it; delete this key",
    ),
    ("downstream", "downstream.tuned.lr_grid", [], "tuned.lr_grid: missing; the task 'classify' trains*"),
    ("downstream", "downstream.tuned.optim", DELETED, "tuned.optim: missing; the task 'classify' trains*"),
    (
        "downstream",
        "baselines.fresh.encoder",
        DELETED,
        "fresh.encoder: missing; a row from scratch names the encoder *",
    ),
    ("downstream", "baselines.fresh.encoder.hedas", 4, "encoder.hedas: unknown key;* did you mean 'heads'?"),
    ("downstream", "baselines.fresh.encoder.patch_px", 5, "fresh.encoder: image height: found 32 px;* try 30"),
    (
        "downstream",
        "baselines.fresh.data",
        "zzz",
        "fresh.data: 'zzz' is not one of ['tiny'] (new images come in with *",
    ),
    ("downstream", "baselines.fresh.lr_grid", [1.0e-3, "1e-4"], "fresh.lr_grid.1: found '1e-4';* as text)"),
    ("downstream", "baselines.fresh.labels", 0, "fresh.labels: found 0; must be greater than 0"),
    ("ablations", "ablations.ratio.base", "oen", "ratio.base: 'oen' is not one of *; did you mean 'one'?"),
    ("ablations", "ablations.ratio.data", "tyni", "ratio.data: 'tyni' is not one of ['tiny']; did you mean 'tiny'?"),
    ("ablations", "ablations.ratio.grid", DELETED, "ratio: found none of grid, zip and points; give exactly one"),
    ("ablations", "ablations.ratio.zip", {"mask.ratio": [0.1]}, "ratio: found ['grid', 'zip'] of grid,*exactly one"),
    ("ablations", "ablations.ratio.seeds", [0, 0], "ratio: seeds: found [0, 0]; one stands twice; delete it"),
    ("ablations", "ablations.ratio.grid", {"mask.ratio": [1.4]}, "ratio: 1.4.mask.ratio: found 1.4; must be less *"),
    ("ablations", "ablations.ratio.grid", {"mask.unit_px": [4, 12]}, "ratio: 12: mask.unit_px: found 12;*"),
    ("ablations", "ablations.ratio.grid", {"loss": ["l1", "cross_entropy"]}, "ratio: cross_entropy: loss: found*"),
    (
        "ablations",
        "ablations_fitted.other",
        {**{k: v for k, v in ABLATION.items() if k != "grid"}, "points": {"tokens": {"target": FITTED["target"]}}},
        "other: tokens: loss: found 'l1';*",
    ),
    (
        "ablations",
        "ablations.ratio",
        {**ABLATION, "base": "two"},
        "ratio: it has a target that is fitted first; move it to 'ablations_fitted'",
    ),
    (
        "ablations",
        "ablations_fitted.other",
        ABLATION,
        "other: it has no target that is fitted first; move it to 'ablations'",
    ),
    ("ablations", "ablations.ratio.judges", {"fresh": {}}, "judges.fresh: 'fresh' is not one of the rows of*"),
    ("ablations", "ablations.ratio.judges.tuned", {"init": "one"}, "judges.tuned.init: it is given by the points*"),
    ("ablations", "ablations.ratio.judges.tuned", {"labels": 0}, "judges.tuned.labels: found 0; must be greater*"),
    ("ablations", "ablations.ratio.judges.tuned", {"optim.epoch": 1}, "judges.tuned.optim.epoch: unknown key;*"),
    ("search", "search.recipe.judge", {}, "recipe.judge: found {}; *at least 1 item*"),
    ("search", "search.recipe.seeds", [0, 1], "recipe: seeds: found [0, 1], of which trials have [0];*fresh ones"),
    ("search", "search.recipe.seeds", [4, 4], "recipe: seeds: found [4, 4]; one stands twice; delete it"),
    ("search", "search.recipe.trial_seeds", [], "recipe.trial_seeds: found []; *at least 1 item*"),
    ("search", "search.recipe.trial_seeds", [5, 5], "recipe: trial_seeds: found [5, 5]; one stands twice; delete it"),
    ("search", "search.recipe.space.head", ["linear"], "space.head: found ['linear']; give a range*"),
    ("search", "search.recipe.space.head", ["linear", "mpl"], "recipe.space.head: mpl.head.name: 'mpl' is not one*"),
    (
        "search",
        "search.recipe.space.optim",
        {"low": 2, "high": 1},
        "space.optim: range: found low 2 and high 1; low must be below high",
    ),
    ("search", "search.recipe.space", {"mask.ratio": {"low": 0.3, "high": 1.2}}, "mask.ratio: 1.2.mask.ratio: found*"),
    ("search", "search.recipe.warm_start", ["raito"], "recipe.warm_start: 'raito' is not one of ['ratio']; did*"),
    ("search", "search.recipe.sampler", {"name": "tep"}, "recipe.sampler.name: found 'tep'; must be*"),
]


@pytest.mark.parametrize(("file", "path", "value", "message"), BAD, ids=[path for _, path, *_ in BAD])
def test_a_bad_row_has_exactly_one_message(tmp_path: Path, file: str, path: str, value: Any, message: str) -> None:
    (fault,) = faults(written(tmp_path, f"{file}.yaml", path, value))
    assert fault.startswith(f"params/{file}.yaml: ")
    at = 0
    for part in message.split("*"):
        at = fault.index(part, at) + len(part)
    assert message.endswith("*") or at == len(fault)


def test_faults_of_several_files_come_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, "pretrain.yaml", "pretrain.one.mask.ratio", 1.4)
    (folder / "data.yaml").write_text("data: {tiny: {source: {name: scenes, size_px: [32, 48], trian: 5}}}")
    rows = (folder / "downstream.yaml").read_text()
    (folder / "downstream.yaml").write_text(rows.replace("smoothing: 0.1", "smoothing: 2"))
    found = sorted(faults(folder))
    assert [fault.split(": ")[1] for fault in found] == [
        "data.tiny.source.trian",
        "baselines.fresh.task.smoothing",
        "downstream.tuned.task.smoothing",
        "pretrain.one.mask.ratio",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pretrain: {one: [", "params/pretrain.yaml: not valid YAML: "),
        ("pretrain:\n  one: {data: tiny}\n  one: {data: tiny}\n", "the key 'one' stands twice; rename or delete one"),
        (
            "- 1\n- 2\n",
            "params/pretrain.yaml: found [1, 2] at the top; it must hold exactly ['pretrain_fitted', ",
        ),
        ("", "params/pretrain.yaml: found None at the top; it must hold exactly ['pretrain_fitted', 'pretrain']"),
        (None, "params/pretrain.yaml: the file is missing; restore it with `git checkout params/pretrain.yaml`"),
    ],
)
def test_a_file_that_holds_no_rows_is_one_fault(tmp_path: Path, content: str | None, message: str) -> None:
    folder = written(tmp_path)
    if content is None:
        (folder / "pretrain.yaml").unlink()
    else:
        (folder / "pretrain.yaml").write_text(content)
    (fault,) = faults(folder)
    assert message in fault


def test_rows_may_share_with_yaml_anchors(tmp_path: Path) -> None:
    folder = written(tmp_path)
    shared = yaml.safe_dump(PRETRAIN["optim"], default_flow_style=True).strip()
    row = {key: value for key, value in PRETRAIN.items() if key != "optim"}
    text = yaml.safe_dump({"pretrain_fitted": {}, "pretrain": {"one": row}}, sort_keys=False)
    text += f"    optim: &optim {shared}\n  two:\n    optim: {{<<: *optim, epochs: 7}}\n"
    text += "".join(f"    {line}\n" for line in yaml.safe_dump(row, sort_keys=False).splitlines())
    (folder / "pretrain.yaml").write_text(text)
    params = load(folder)
    assert (params.pretrain["one"].optim.epochs, params.pretrain["two"].optim.epochs) == (5, 7)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Flatten a tree of mappings and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list | tuple) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, str(index)))
    else:
        yield ".".join(path), value


@pytest.mark.parametrize("file", sorted(path.name for path in ROWS.glob("*.yaml")))
def test_no_number_in_the_rows_is_text(file: str) -> None:
    def numeric(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    values = leaves(yaml.safe_load((ROWS / file).read_text()))
    assert not [path for path, value in values if isinstance(value, str) and numeric(value)]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_resolves_to_its_golden_text(name: str, update_golden: bool) -> None:
    section, row = name.split(".")
    resolved = leaves(getattr(REPOSITORY, section)[row].model_dump(mode="json"))
    text = "".join(sorted(f"{path} = {value!r}\n" for path, value in resolved))
    golden = GOLDEN / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), "a new row: run `pytest --update-golden` and commit what it writes"
    assert text == golden.read_text()


def test_no_golden_text_is_left_of_a_row_that_is_gone(update_golden: bool) -> None:
    for path in GOLDEN.glob("*.txt"):
        if update_golden and path.stem not in NAMES:
            path.unlink()
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NAMES)


def test_steps_follow_from_epochs_and_images() -> None:
    optim = check(Optim, {"lr": 1.0e-3, "batch": 64, "epochs": 1.5, "warmup_epochs": 0.5}, "optim")
    assert optim.steps(640) == (15, 5)
    # Fewer images than a batch: an epoch is one step.
    assert optim.steps(10) == (2, 0)


def test_no_param_has_a_name_that_dvc_leaves_out_of_its_run_cache() -> None:
    """DVC drops `size` and `nfiles` wherever they stand in a stage's key: a change of such a param would be missed."""

    def keys(value: object) -> set[str]:
        return set(value) | {key for one in value.values() for key in keys(one)} if isinstance(value, dict) else set()

    used = keys(REPOSITORY.model_dump(mode="json"))
    for table in (SOURCES, ENCODERS, MASKS, FILLS, HEADS, TARGETS, LOSSES, TOKENIZERS, SCHEDULES):
        used |= {field for model in OneOf(table).models.values() for field in model.model_fields}
    for row in (DataRow, TargetRow, PretrainRow, DownstreamRow, Optim, Adversarial, Augment):
        used |= set(row.model_fields)
    assert not used & {"size", "nfiles"}
