"""Checkpoints: there whole or not at all, and the same bytes from the same run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mim_core import checkpoint
from mim_core.optim import Player, adamw, param_groups


def model_and_player() -> tuple[nn.Module, Player]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = param_groups(model.named_parameters(), weight_decay=0.1)
    return model, Player(adamw(groups, (0.9, 0.999)), lambda step: 0.01, clip=1.0)


def steps(model: nn.Module, player: Player, start: int, stop: int) -> None:
    for step in range(start, stop):
        torch.manual_seed(step)
        model(torch.randn(5, 3)).square().mean().backward()
        player.step(step)


def save(folder: Path, step: int, model: nn.Module, player: Player) -> None:
    checkpoint.save(folder, step, model.state_dict(), {"model": player.optimiser.state_dict()}, {"seconds": 1.5})


def restored(path: Path) -> tuple[dict[str, Any], nn.Module, Player]:
    about, weights, optimisers = checkpoint.load(path)
    model, player = model_and_player()
    model.load_state_dict(weights)
    player.optimiser.load_state_dict(optimisers["model"])
    return about, model, player


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, player = model_and_player()
    steps(model, player, 0, 5)
    save(tmp_path, 5, model, player)
    steps(model, player, 5, 9)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    about, again, its_player = restored(found)
    assert about == {"step": 5, "seconds": 1.5}
    steps(again, its_player, 5, 9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ours, theirs = player.optimiser.state_dict(), its_player.optimiser.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        for key, value in state.items():
            assert torch.equal(value, theirs["state"][index][key]), (index, key)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_the_newest_two_stay_whatever_their_digits(tmp_path: Path) -> None:
    model, player = model_and_player()
    for step in (2, 9, 10, 100):
        save(tmp_path, step, model, player)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010", "step_000000100"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000000100"


def test_what_a_killed_process_left_half_written_is_not_read(tmp_path: Path) -> None:
    model, player = model_and_player()
    save(tmp_path, 4, model, player)
    torn = tmp_path / ".part-12345"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000000004"
    # The same process number again: its own leavings give way.
    torn.rename(tmp_path / f".part-{os.getpid()}")
    save(tmp_path, 5, model, player)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000004", "step_000000005"]
    assert restored(tmp_path / "step_000000005")[0]["step"] == 5


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    model, player = model_and_player()
    save(tmp_path, 4, model, player)
    with torch.no_grad():
        model[0].weight.fill_(7)  # type: ignore[index, operator]
    save(tmp_path, 4, model, player)
    _, weights, _ = checkpoint.load(tmp_path / "step_000000004")
    assert (weights["0.weight"] == 7).all()


def test_optimiser_files_hold_tensors_and_numbers_only(tmp_path: Path) -> None:
    model, player = model_and_player()
    steps(model, player, 0, 1)
    checkpoint.save(tmp_path, 1, {}, {"model": player.optimiser.state_dict(), "code": print}, {})
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(tmp_path / "step_000000001")


def test_weights_and_what_they_are_round_trip(tmp_path: Path) -> None:
    model, _ = model_and_player()
    about = {"encoder": {"name": "vit", "width": 8}, "size": [16, 32], "mean": [0.1]}
    checkpoint.write_weights(tmp_path / "new" / "one.safetensors", model.state_dict(), about)
    weights, read = checkpoint.read_weights(tmp_path / "new" / "one.safetensors")
    assert read == about
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.safetensors"]


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    written = []
    for run, order in (("a", 1), ("b", -1)):
        model, player = model_and_player()
        steps(model, player, 0, 3)
        about = dict(list({"one": 1, "two": [2], "three": {"x": 1, "y": 2}}.items())[::order])
        checkpoint.write_weights(tmp_path / f"{run}.safetensors", model.state_dict(), about)
        save(tmp_path / run, 3, model, player)
        weights = tmp_path / run / "step_000000003" / "weights.safetensors"
        written.append(((tmp_path / f"{run}.safetensors").read_bytes(), weights.read_bytes()))
    assert written[0] == written[1]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 64, b"\xff" * 64])
def test_garbage_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"encoder\.safetensors: not a readable safetensors file .*; delete it and run"
    ):
        checkpoint.read_weights(path)


def test_a_file_that_is_cut_short_is_told_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    checkpoint.write_weights(path, model_and_player()[0].state_dict(), {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"encoder\.safetensors: not a readable"):
        checkpoint.read_weights(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.read_weights(tmp_path / "none.safetensors")
