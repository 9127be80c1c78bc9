"""Twenty steps of each row's pieces on a CPU: the losses stay, unless a change says that they may move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_pieces import tiny_pack

from mim_core.files import read_curve
from mim_core.jobs import downstream, fit_target, pretrain
from mim_core.params import DownstreamRow, PretrainRow, TargetRow, load
from mim_core.spec import check

GOLDEN = Path(__file__).parent / "golden" / "losses"
ROWS = load(Path(__file__).parents[1] / "params")
# A downstream row differs from a baseline in where it starts only, so baselines stand for both; a palette has no loss,
# nor have neighbours. A detector samples proposals by their rank: rounding on another processor makes it take others.
NAMES = [
    *(f"targets.{row}" for row, of in ROWS.targets.items() if of.optim),
    *(f"pretrain.{row}" for row in ROWS.pretrained()),
    *(f"baselines.{row}" for row, of in ROWS.baselines.items() if of.optim and of.task.name != "detect"),
]
SMALL = {
    "vit": {"width": 32, "depth": 2, "heads": 4},
    "swin": {"width": 16, "depths": [1, 1], "heads": [1, 2]},
    "conv": {"base": 8, "bottleneck": 16},
    "dvae_small": {"codes": 16, "width": 8, "code_width": 8},
    "vq_small": {"codes": 16, "width": 8, "code_width": 4},
    "channelwise_decoder": {"base": 8},
    "transformer_decoder": {"width": 16, "depth": 1, "heads": 2},
    "setr_pup": {"hidden": 8},
    "probe": {"blocks": [1, 2]},
}


def shrunk(row: TargetRow | PretrainRow | DownstreamRow) -> Any:
    """The row with tiny models and 20 steps of 16 images."""
    content = row.model_dump(mode="json")
    for piece in ("encoder", "head", "tokenizer"):
        if piece in content:
            content[piece] |= SMALL.get(content[piece]["name"], {})
    if "task" in content:
        task = content["task"]
        task |= SMALL.get(task["name"], {})
        if "head" in task:
            task["head"] |= SMALL.get(task["head"]["name"], {})
    content["optim"] |= {"batch": 16, "epochs": 5.0, "warmup_epochs": 1.0}
    content["precision"] = "fp32"
    if "labels" in content:
        content["labels"] = None
    if "least_perplexity" in content:
        content["least_perplexity"] = 1.0
    return check(type(row), content, "row")


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_golden_ones(name: str, tmp_path: Path, update_golden: bool) -> None:
    row = {**ROWS.targets, **ROWS.pretrained(), **ROWS.baselines}[name.split(".")[1]]
    pack = tiny_pack(tmp_path / "pack", size=tuple(ROWS.data[row.data].source.params()["size_px"]), objects=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if isinstance(row, TargetRow):
        fit_target(shrunk(row), pack, tmp_path, seed=0)
    elif isinstance(row, PretrainRow):
        fitted = None
        if row.fitted:
            fit_target(shrunk(ROWS.targets[row.fitted]), pack, tmp_path / "fitted", seed=0)
            fitted = tmp_path / "fitted" / "tokenizer.safetensors"
        pretrain(shrunk(row), pack, tmp_path, 0, fitted)
    else:
        downstream(shrunk(row), pack, tmp_path, 0, row.lr_grid[0], None, test=False)
    torch.set_num_threads(threads)
    losses = [line["loss"] for line in read_curve(tmp_path / "curve.jsonl") if "loss" in line]
    assert len(losses) == 20
    golden = GOLDEN / f"{name}.json"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(json.dumps([float(f"{loss:.10g}") for loss in losses], indent=1) + "\n")
    assert golden.exists(), "a new row: run `pytest --update-golden` and commit what it writes"
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-4)


def test_no_golden_losses_are_left_of_a_row_that_is_gone(update_golden: bool) -> None:
    for path in GOLDEN.glob("*.json"):
        if update_golden and path.stem not in NAMES:
            path.unlink()
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)
