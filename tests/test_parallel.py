"""Data parallel: ranks that share each batch train what one process trains, whoever of them begins, dies or goes on."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from core_pieces import OPTIM, PRETRAIN, be_rank, pretrain_row, python, send

from flows.workers import JobDiedError, Workers
from flows.workers import StoppedError as Stopped
from mim_core import checkpoint
from mim_core.data.order import Order
from mim_core.data.pack import Pack
from mim_core.files import read_curve
from mim_core.jobs import perform
from mim_core.spec import SpecError
from mim_core.train import StoppedError

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1.0e-5
"""How far a loss may lie from one process's, relative to it, over 20 steps in fp32: sums go in another order."""
ROWS: dict[str, dict[str, Any]] = {
    # Its masks hide unequal numbers of patches, so that the ranks have unequal parts in the batch's loss.
    "simmim": {**PRETRAIN, "mask": {"name": "random_region", "area": [0.1, 0.6], "roughness": 2}},
    "mae": {
        **PRETRAIN,
        "mask": {"name": "random", "ratio": 0.75, "unit_px": 4},
        "fill": "drop",
        "head": {"name": "transformer_decoder", "width": 16, "depth": 1, "heads": 2},
        "target": {"name": "pixels", "normalise": "patch"},
        "loss": "l2",
    },
}
LONG = {"optim": {**OPTIM, "epochs": 500}}


def job(row: dict[str, Any], pack: Pack, folder: Path, devices: int, **changes: Any) -> dict[str, Any]:
    # So few minutes that there is a checkpoint at every step.
    content = {**row, "checkpoint_minutes": 1.0e-6, "devices": devices, **changes}
    wire = {"kind": "pretrain", "row": content, "pack": str(pack.folder), "folder": str(folder)}
    return {**wire, "seed": 5, "threads": 1, "fitted": None}


def started(wire: dict[str, Any], store: Path, count: int = 2) -> list[Any]:
    """Start ranks without the launcher, from a server that imports once for all of them."""
    of = multiprocessing.get_context("forkserver")
    of.set_forkserver_preload(["mim_core.jobs"])
    processes = [of.Process(target=be_rank, args=(number, count, wire, store)) for number in range(count)]
    for process in processes:
        process.start()
    return processes


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_curve(folder / "curve.jsonl")):
        assert time.monotonic() < deadline, "the job does not get on"
        time.sleep(0.01)


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_curve(folder / "curve.jsonl") if key in line]


def held_to(whole: Path, other: Path) -> None:
    """Hold a run to one process's: curves and weights."""
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(other, key) == pytest.approx(curve(whole, key), rel=CLOSE), key
    assert curve(other, "lr") == curve(whole, "lr")
    weights, _ = checkpoint.read_weights(whole / "model.safetensors")
    for name, tensor in checkpoint.read_weights(other / "model.safetensors")[0].items():
        # Adam turns a gradient that is nothing but rounding into a step of its rate's size.
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_train_what_one_process_trains_and_one_goes_on_where_they_were_killed(
    tmp_path: Path, pack: Pack, name: str
) -> None:
    whole, shared, broken = tmp_path / "whole", tmp_path / "shared", tmp_path / "broken"
    perform(job(ROWS[name], pack, whole, 1))
    for process in started(job(ROWS[name], pack, shared, 2), tmp_path / "store"):
        process.join(120)
        assert process.exitcode == 0
    held_to(whole, shared)

    ranks = started(job(ROWS[name], pack, broken, 2), tmp_path / "other")
    wait_for_step(broken, 5)
    for process in ranks:
        process.kill()
        process.join()
    begun = curve(broken, "loss")
    assert 5 <= len(begun) < 20
    perform(job(ROWS[name], pack, broken, 1))
    # Step 5 was seen in the curve, so that there was a checkpoint of step 4: up to there rounding is two ranks'.
    assert curve(broken, "loss")[:4] == curve(shared, "loss")[:4]
    held_to(whole, broken)


class Later:
    """Asks for a stop once it has been asked so often."""

    def __init__(self, times: int) -> None:
        self.left = times

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_what_one_process_began_goes_on_under_the_launcher(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    perform(job(ROWS["simmim"], pack, whole, 1))
    with monkeypatch.context() as patch:
        patch.setattr("mim_core.jobs.run.STOP", Later(7))
        with pytest.raises(StoppedError, match="after step 8"):
            perform(job(ROWS["simmim"], pack, broken, 1))
    result = perform(job(ROWS["simmim"], pack, broken, 2))
    assert (result["steps"], result["images_seen"], result["compute"]["threads"]) == (20, 320, 1)
    assert curve(broken, "loss")[:8] == curve(whole, "loss")[:8]
    held_to(whole, broken)


def test_ranks_divide_each_batch_among_them() -> None:
    whole = Order(np.arange(10, 75), 16, seed=0, start=3, steps=9)
    shares = [Order(np.arange(10, 75), 16, seed=0, start=3, steps=9, rank=rank, ranks=3) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(address for part in parts for address in part) == sorted(batch)
        assert {len(part) for part in parts} == {5, 6}


def test_more_ranks_than_gpus_are_refused_before_any_work(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"devices: found 2; each rank needs a GPU .* has 1; choose 1 or fewer"):
        perform(job(PRETRAIN, pack, tmp_path / "job", 2))
    assert not (tmp_path / "job").exists()


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(SpecError, match=r"devices: found 17; each needs an image of the batch of 16; choose fewer"):
        pretrain_row(devices=17)
    critic = {"encoder": {"name": "conv", "base": 4, "layers": 2, "bottleneck": 8}, "adversarial": {"weight": 0.01}}
    with pytest.raises(SpecError, match="devices: found 2 beside adversarial"):
        pretrain_row(devices=2, **critic)


def ask(process: Any, wire: dict[str, Any]) -> dict[str, Any]:
    send(process, wire)
    assert process.stdout
    return dict(json.loads(process.stdout.readline()))


def rank(server: int, number: int) -> psutil.Process:
    """The process that is that rank of a server's job."""
    below = psutil.Process(server).children(recursive=True)
    return next(one for one in below if one.environ().get("RANK") == str(number) and "mim_core.jobs" in one.cmdline())


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_job_within_seconds_and_it_goes_on_to_the_same_weights(
    tmp_path: Path, pack: Pack, killed: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    long = {"optim": {**OPTIM, "epochs": 50}}
    perform(job(ROWS["simmim"], pack, whole, 2, **long))
    with python("-m", "mim_core.jobs") as server:
        wire = job(ROWS["simmim"], pack, broken, 2, **long)
        send(server, wire)
        wait_for_step(broken, 20)
        rank(server.pid, killed).kill()
        begun = time.monotonic()
        assert server.stdout
        said = json.loads(server.stdout.readline())
        assert time.monotonic() - begun < 30
        assert said["died"].startswith("one of the 2 ranks was killed or broke down; the same job goes on")
        assert curve(broken, "loss")[-1] != curve(whole, "loss")[-1]
        assert ask(server, wire)["result"]["steps"] == 200
        assert server.stdin
        server.stdin.close()
        assert server.wait(30) == 0
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_flow_s_worker_stops_and_loses_ranks_as_it_does_one_process(tmp_path: Path, pack: Pack) -> None:
    with Workers(1, 2, "parallel", []) as workers:
        server = workers.all[0].process
        lost: list[psutil.Process] = []
        wire = job(ROWS["simmim"], pack, tmp_path / "lost", 2, **LONG)

        def lose(lines: list[dict[str, float]]) -> None:
            if lines and not lost:
                lost.append(rank(server.pid, 1))
                lost[0].kill()

        with pytest.raises(JobDiedError, match="one of the 2 ranks was killed"):
            workers.run(wire, lose)
        assert server.poll() is None, "the worker serves on"
        with pytest.raises(Stopped):
            workers.run(wire, lambda lines: bool(lines))
        assert checkpoint.latest(tmp_path / "lost" / "checkpoints")


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_told(tmp_path: Path, pack: Pack) -> None:
    # Masks of unequal size, which this fill refuses, on whichever rank it meets them.
    uneven = {**ROWS["mae"], "mask": {"name": "random_region", "area": [0.1, 0.6], "roughness": 2}}
    with pytest.raises(RuntimeError, match="fill: found a batch that hides"):
        perform(job(uneven, pack, tmp_path / "uneven", 2))


@pytest.mark.slow
def test_steps_that_are_not_finite_are_taken_back_by_all_ranks(tmp_path: Path, pack: Pack) -> None:
    wild = {"optim": {**OPTIM, "lr": 1.0e30, "warmup_epochs": 0}}
    with pytest.raises(RuntimeError, match=r"between steps \d+ and \d+.*Tried 3 times more"):
        perform(job(PRETRAIN, pack, tmp_path / "wild", 2, **wild))


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, pack: Pack) -> None:
    with python("-m", "mim_core.jobs") as server:
        send(server, job(ROWS["simmim"], pack, tmp_path, 2, **LONG))
        wait_for_step(tmp_path, 1)
        below = psutil.Process(server.pid).children(recursive=True)
        assert len(below) >= 3
        server.kill()
        _, alive = psutil.wait_procs(below, 30)
        assert not alive
