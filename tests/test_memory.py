"""A memory that does not hold what a row asks for: the run ends with the keys to set, and what it had stays whole."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tried
from core_pieces import OPTIM, pretrain_row

from mim_core import checkpoint, devices
from mim_core.data.pack import Pack
from mim_core.jobs import pretrain
from mim_core.jobs.run import MemoryFullError
from mim_core.pretext import MaskedModel

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
PLAIN = {"lr": 1.0e-3, "epochs": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device that holds 16 images a forward pass, or what a test says."""
    holds, forward = {"images": 16}, MaskedModel.forward

    def limited(self: Any, images: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(images) > holds["images"]:
            raise torch.OutOfMemoryError(f"{SAID}\nand many lines more")
        return forward(self, images, *others)

    monkeypatch.setattr(MaskedModel, "forward", limited)
    return holds


def test_a_batch_that_does_not_fit_says_which_keys_to_set_and_a_smaller_one_runs(
    tmp_path: Path, pack: Pack, small: dict[str, int]
) -> None:
    said = rf"{tmp_path}: the memory does not hold a step of 32 images \({re.escape(SAID)}\); lower optim\.batch \(a "
    with pytest.raises(MemoryFullError, match=said) as error:
        pretrain(pretrain_row(optim={**PLAIN, "batch": 32}), pack, tmp_path, seed=0)
    assert len(str(error.value).splitlines()) == 1
    assert pretrain(pretrain_row(optim={**PLAIN, "batch": 16}), pack, tmp_path / "less", seed=0)["steps"] == 8


def test_an_evaluation_that_does_not_fit_blames_no_batch(tmp_path: Path, pack: Pack, small: dict[str, int]) -> None:
    small["images"] = 8  # of 16 validation images
    with pytest.raises(MemoryFullError, match="does not hold an evaluation") as error:
        pretrain(pretrain_row(optim={**PLAIN, "batch": 8}), pack, tmp_path, seed=0)
    assert "batch" not in str(error.value)


@pytest.mark.reliability
def test_a_memory_that_something_else_filled_is_gone_on_from_to_the_same_weights(
    tmp_path: Path, pack: Pack, small: dict[str, int], tried: Tried
) -> None:
    torch.set_num_threads(1)
    row = pretrain_row(optim={**OPTIM, "batch": 32, "epochs": 8}, checkpoint_minutes=1.0e-6)
    small["images"] = 64
    whole = tmp_path / "whole"
    pretrain(row, pack, whole, seed=0)
    after = random.randrange(4, 14)
    with pytest.MonkeyPatch.context() as patch:
        passes, forward = [0], MaskedModel.forward

        def crowded(self: Any, *given: Any) -> torch.Tensor:
            passes[0] += 1
            if passes[0] > after:
                raise torch.OutOfMemoryError(SAID)
            return forward(self, *given)

        patch.setattr(MaskedModel, "forward", crowded)
        with pytest.raises(MemoryFullError, match="the same command goes on from the last checkpoint"):
            pretrain(row, pack, tmp_path / "part", seed=0)
    found = checkpoint.latest(tmp_path / "part" / "checkpoints")
    assert found
    assert not checkpoint.damage(found)
    pretrain(row, pack, tmp_path / "part", seed=0)
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "part")]
    assert files[0] == files[1], f"memory full after {after} passes"
    tried("memory full in the middle of a training", 1, "says which keys to set; the same weights when there is room")


def test_the_systems_own_words_are_known_and_other_errors_are_not_taken_for_them(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    assert devices.out_of_memory(error.value)
    assert devices.out_of_memory(torch.OutOfMemoryError(SAID))
    assert devices.out_of_memory(MemoryError())
    assert not devices.out_of_memory(RuntimeError("shapes do not match"))

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(MaskedModel, "forward", wrong)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        pretrain(pretrain_row(optim={**PLAIN, "batch": 8}), pack, tmp_path, seed=0)
