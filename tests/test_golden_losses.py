"""Twenty steps of each row's pieces on a CPU: the losses stay, unless a change says that they may move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_pieces import tiny_pack

from mim_core.jobs import classify, pretrain, read_curve
from mim_core.params import DownstreamRow, PretrainRow, load
from mim_core.spec import check

GOLDEN = Path(__file__).parent / "golden" / "losses"
ROWS = load(Path(__file__).parents[1] / "params")
# A downstream row differs from a baseline in where it starts only, so baselines stand for both.
NAMES = [*(f"pretrain.{row}" for row in ROWS.pretrain), *(f"baselines.{row}" for row in ROWS.baselines)]


def shrunk(row: PretrainRow | DownstreamRow, model: type[Any]) -> Any:
    """The row with a tiny encoder and 20 steps of 16 images."""
    content = row.model_dump(mode="json")
    content["encoder"] |= {"width": 32, "depth": 2, "heads": 4}
    content["optim"] |= {"batch": 16, "epochs": 5.0, "warmup_epochs": 1.0}
    content["precision"] = "fp32"
    if "labels" in content:
        content["labels"] = None
    return check(model, content, "row")


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_golden_ones(name: str, tmp_path: Path, update_golden: bool) -> None:
    section, row_name = name.split(".")
    row = getattr(ROWS, section)[row_name]
    pack = tiny_pack(tmp_path / "pack", size=tuple(ROWS.data[row.data].source.params()["size_px"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if section == "pretrain":
        pretrain(shrunk(row, PretrainRow), pack, tmp_path, seed=0)
    else:
        classify(shrunk(row, DownstreamRow), pack, tmp_path, 0, row.lr_grid[0], None, test=False)
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
