"""Jobs: a kill at any step changes nothing, and a server of jobs ends with its parent."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tried
from core_pieces import (
    CLASSIFY,
    FITTED,
    OPTIM,
    PALETTE,
    PRETRAIN,
    QUANTISED,
    TARGET,
    TUNE,
    classify_row,
    pretrain_row,
    python,
    send,
    target_row,
    tiny_pack,
)

from mim_core import checkpoint
from mim_core.data.order import Order, loader
from mim_core.data.pack import Pack, label_budget, open_pack
from mim_core.files import read_curve
from mim_core.grid import Grid
from mim_core.jobs import downstream, fit_target, perform, pretrain
from mim_core.locks import HeldError
from mim_core.masks import MASKS
from mim_core.params import PretrainRow, TargetRow
from mim_core.pretext import MaskedFetch
from mim_core.spec import bind, check
from mim_core.train import NonFiniteLossError

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {**OPTIM, "epochs": 25}
STEPS = 100
CONV = {"name": "conv", "base": 4, "layers": 2, "bottleneck": 8}
ROWS: dict[str, dict[str, Any]] = {
    "pretrain": {**PRETRAIN, "optim": LONG},
    "adversarial": {
        **PRETRAIN,
        "encoder": CONV,
        "mask": "central",
        "fill": "colour",
        "head": {"name": "channelwise_decoder", "base": 4, "region": "centre"},
        "loss": "l2",
        "adversarial": {"weight": 0.01, "base": 4},
        "optim": LONG,
    },
    "fit_target": {**TARGET, "optim": LONG},
    # Codes follow by moving averages of their own, and weights are averaged too.
    "quantised": {**QUANTISED, "optim": {**LONG, "ema": 0.9}},
    "downstream": {**CLASSIFY, "optim": {**TUNE, "epochs": 25, "layer_decay": 0.75}},
}
PRODUCTS = {
    "pretrain": ["encoder.safetensors", "model.safetensors"],
    "adversarial": ["encoder.safetensors", "model.safetensors"],
    "fit_target": ["tokenizer.safetensors"],
    "quantised": ["tokenizer.safetensors"],
    "downstream": ["model.safetensors", "predictions.png"],
}
EVALUATED = {"downstream": "validation_score", "fit_target": "perplexity", "quantised": "perplexity"}
TOLD = {
    "pretrain": "pretraining",
    "adversarial": "adversarial pretraining",
    "fit_target": "fitting a discrete VAE",
    "quantised": "fitting a vector-quantised tokenizer",
    "downstream": "fine-tuning",
}
KINDS = {"adversarial": "pretrain", "quantised": "fit_target"}
"""A row's kind of job where it is another than its name."""


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[list[subprocess.Popen[str]]]:
    """Servers of jobs, started early: they import while other tests run."""
    started = [python("-m", "mim_core.jobs") for _ in range(len(ROWS) + 3)]
    yield started.copy()
    for process in started:
        with process:
            process.kill()


def job(kind: str, pack: Pack, folder: Path, **changes: Any) -> dict[str, Any]:
    # So few minutes that there is a checkpoint at every step.
    row = {**ROWS[kind], "checkpoint_minutes": 1.0e-6, **changes}
    wire = {
        "kind": KINDS.get(kind, kind),
        "row": row,
        "pack": str(pack.folder),
        "folder": str(folder),
        "seed": 5,
        "threads": 1,
    }
    if wire["kind"] == "pretrain":
        return wire | {"fitted": None}
    return wire | ({"lr": 2.0e-3, "init": None, "test": True} if kind == "downstream" else {})


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_curve(folder / "curve.jsonl")):
        assert time.monotonic() < deadline, "the job does not get on"
        time.sleep(0.005)


def curve(folder: Path, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in read_curve(folder / "curve.jsonl") if key in line]


def test_pretraining_leaves_what_it_says(tmp_path: Path, pack: Pack) -> None:
    row = pretrain_row()
    result = pretrain(row, pack, tmp_path, seed=0)
    assert (result["steps"], result["images_seen"]) == (20, 320)
    assert {"loss", "validation_loss", "hole_psnr", "seconds", "parameters", "compute"} <= set(result)
    assert result["hidden_share"] == 10 / 16
    assert 1 < result["avg_distance_px"] < 16
    assert result["encoder_parameters"] < result["parameters"]
    assert not {"lr", "grad_norm", "time", "step"} & set(result)
    for picture in ("gallery.png", "recovery.png"):
        assert (tmp_path / picture).stat().st_size > 0
    weights, about = checkpoint.read_weights(tmp_path / "encoder.safetensors")
    assert about["encoder"] == row.encoder.model_dump(mode="json")
    assert (about["size"], about["channels"], tuple(about["mean"])) == ([16, 16], 3, pack.mean)
    whole, of = checkpoint.read_weights(tmp_path / "model.safetensors")
    assert of["row"] == row.model_dump(mode="json")
    assert all(torch.equal(whole[f"encoder.{name}"], tensor) for name, tensor in weights.items())


def test_pretraining_learns(tmp_path: Path, pack: Pack) -> None:
    pretrain(pretrain_row(optim=LONG), pack, tmp_path, seed=0)
    losses = [loss for _, loss in curve(tmp_path, "loss")]
    assert np.mean(losses[-10:]) < 0.6 * losses[0]


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels_and_a_size_that_is_not_square(tmp_path: Path, channels: int) -> None:
    pack = tiny_pack(tmp_path / "pack", size=(16, 24), channels=channels)
    pretrain(pretrain_row(optim={**OPTIM, "epochs": 0.5}, augment=None), pack, tmp_path / "pretrain", seed=0)
    row = classify_row(optim={**TUNE, "epochs": 0.5})
    result = downstream(row, pack, tmp_path / "classify", 0, 1e-3, tmp_path / "pretrain" / "encoder.safetensors", True)
    assert 0 <= result["test_accuracy"] <= 1


def test_fine_tuning_starts_from_the_weights_that_init_names(tmp_path: Path, pack: Pack) -> None:
    pretrain(pretrain_row(optim={**OPTIM, "epochs": 1}), pack, tmp_path, seed=0)
    init = tmp_path / "encoder.safetensors"
    # A rate so small that no bit moves.
    downstream(classify_row(encoder=None, init="one"), pack, tmp_path / "classify", 0, 1e-30, init, True)
    weights, _ = checkpoint.read_weights(tmp_path / "classify" / "model.safetensors")
    for name, tensor in checkpoint.read_weights(init)[0].items():
        assert torch.equal(weights[f"encoder.{name}"], tensor), name


@pytest.mark.parametrize("row", [TARGET, QUANTISED], ids=["relaxed", "quantised"])
def test_a_target_is_fitted_and_predicted(tmp_path: Path, pack: Pack, row: dict[str, Any]) -> None:
    result = fit_target(check(TargetRow, row, "row"), pack, tmp_path / "codes", seed=0)
    assert {"psnr", "codes_used", "perplexity", "seconds", "parameters", "compute"} <= set(result)
    assert (tmp_path / "codes" / "gallery.png").stat().st_size > 0
    found = pretrain(
        check(PretrainRow, FITTED, "row"), pack, tmp_path / "tokens", 0, tmp_path / "codes" / "tokenizer.safetensors"
    )
    assert 0 < found["loss"] < 2 * np.log(16)
    # The tokenizer is not of the model: it is neither trained nor written again.
    weights, _ = checkpoint.read_weights(tmp_path / "tokens" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"encoder", "fill", "head"}


def test_a_palette_is_found_and_predicted(tmp_path: Path, pack: Pack) -> None:
    result = fit_target(check(TargetRow, PALETTE, "row"), pack, tmp_path / "palette", seed=0)
    assert result["steps"] == 1
    assert 2 < result["perplexity"] <= 8
    clusters = {"name": "clusters", "fitted": "palette", "cell_px": 2}
    row = pretrain_row(target=clusters, loss="cross_entropy")
    found = pretrain(row, pack, tmp_path / "clusters", 0, tmp_path / "palette" / "tokenizer.safetensors")
    assert found["loss"] < curve(tmp_path / "clusters", "loss")[0][1]


def test_a_collapsed_codebook_ends_the_job_with_advice(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(ValueError, match=r"perplexity: found .* has collapsed; raise kl_weight"):
        fit_target(target_row(least_perplexity=15.99, optim={**OPTIM, "epochs": 1}), pack, tmp_path, seed=0)
    assert not (tmp_path / "tokenizer.safetensors").exists()


def test_an_encoder_is_fine_tuned_at_another_size_and_with_biases_of_each_block_s_own(
    tmp_path: Path, pack: Pack
) -> None:
    relative = {"name": "vit", "patch_px": 4, "width": 32, "depth": 2, "heads": 4, "positions": "relative"}
    pretrain(pretrain_row(encoder=relative, optim={**OPTIM, "epochs": 1}), pack, tmp_path, seed=0)
    larger = tiny_pack(tmp_path / "larger", size=(24, 32))
    row = classify_row(encoder=None, init="one", optim={**TUNE, "epochs": 1})
    downstream(row, larger, tmp_path / "classify", 0, 1e-30, tmp_path / "encoder.safetensors", True)
    weights, about = checkpoint.read_weights(tmp_path / "classify" / "model.safetensors")
    assert about["encoder"]["positions"] == "relative_per_block"
    tables = [one for name, one in weights.items() if name.endswith("relative_position_bias_table")]
    assert [tuple(one.shape) for one in tables] == [(11 * 15 + 3, 4)] * 2
    assert torch.equal(*tables)


def test_test_images_are_read_for_the_last_score_only(tmp_path: Path, pack: Pack) -> None:
    hidden = tmp_path / "pack"
    shutil.copytree(pack.folder, hidden)
    (hidden / "test").rename(tmp_path / "away")
    pretrain(pretrain_row(optim={**OPTIM, "epochs": 1}), open_pack(hidden), tmp_path / "pretrain", seed=0)
    row, folder = classify_row(), tmp_path / "classify"
    untested = downstream(row, open_pack(hidden), folder, 0, 1e-3, None, test=False)
    assert not [key for key in untested if key.startswith("test")]
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(ValueError, match="the pack has no test images"):
        downstream(row, open_pack(hidden), folder, 0, 1e-3, None, test=True)

    trained = (folder / "curve.jsonl").read_text()
    tested = downstream(row, pack, folder, 0, 1e-3, None, test=True)
    assert (folder / "curve.jsonl").read_text() == trained, "a finished job is not trained again"
    assert {key: tested[key] for key in untested} == untested
    assert 0 <= tested["test_accuracy"] <= 1


def test_a_loss_that_runs_away_ends_the_job(tmp_path: Path, pack: Pack) -> None:
    row = pretrain_row(optim={**OPTIM, "lr": 1.0e30, "warmup_epochs": 0})
    again = pytest.warns(UserWarning, match="again from step")
    with again, pytest.raises(NonFiniteLossError, match=r"between steps \d+ and \d+.*Tried 3 times more"):
        pretrain(row, pack, tmp_path, seed=0)


def test_a_curve_that_a_kill_cut_short_reads_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_curve(tmp_path / "curve.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_curve(tmp_path / "none.jsonl") == []


def test_a_label_budget_is_even_and_the_same_for_every_arm_of_a_seed() -> None:
    labels = np.array([-1, *[0] * 20, *[1] * 10, *[2] * 2])
    chosen = label_budget(labels, 11, seed=3)
    np.testing.assert_array_equal(chosen, label_budget(labels.copy(), 11, seed=3))
    assert (chosen != label_budget(labels, 11, seed=4)).any()
    assert len(set(chosen)) == 11
    np.testing.assert_array_equal(np.bincount(labels[chosen])[2], 2)
    assert abs(int((labels[chosen] == 0).sum()) - int((labels[chosen] == 1).sum())) <= 1
    np.testing.assert_array_equal(label_budget(labels, None, seed=3), np.arange(1, 33))
    with pytest.raises(ValueError, match=r"labels: found 33; .* 32 labelled images"):
        label_budget(labels, 33, seed=0)


def test_loader_workers_change_no_batch(pack: Pack) -> None:
    row = pretrain_row()
    fetch = MaskedFetch(pack.split("train"), Grid(16, 16, 4), bind(MASKS, row.mask), row.augment, seed=2)
    order = Order(np.arange(64), 16, seed=2, start=2, steps=9)
    # The server from which workers fork imports what they need once.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mim_core.pretext"])
    alone, shared = list(loader(fetch, order)), list(loader(fetch, order, workers=2))
    assert len(alone) == len(shared) == 7
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.hidden, other.hidden)


def test_an_order_that_starts_late_is_the_rest_of_the_whole_and_an_epoch_repeats_no_image() -> None:
    whole = list(Order(np.arange(10, 75), 16, seed=0, start=0, steps=9))
    assert list(Order(np.arange(10, 75), 16, seed=0, start=5, steps=9)) == whole[5:]
    for epoch in range(2):
        addresses = [address for batch in whole[4 * epoch : 4 * epoch + 4] for address in batch]
        assert {of for of, _ in addresses} == {epoch}
        assert len({index for _, index in addresses}) == 64
    assert whole[0] != whole[4]


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ROWS)
def test_a_job_killed_at_any_moment_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, pack: Pack, servers: list[subprocess.Popen[str]], kind: str, kills: int, tried: Tried
) -> None:
    """As many runs as `--kills` says, each killed at a moment of its own; a checkpoint is written at every step."""
    whole = tmp_path / "whole"
    result = perform(job(kind, pack, whole))
    turn, late = 0, 0
    while turn < kills:
        broken = tmp_path / f"broken_{turn}_{late}"
        process = servers.pop() if servers else python("-m", "mim_core.jobs")
        with process:
            send(process, job(kind, pack, broken))
            at, after = random.randint(1, STEPS // 2), random.uniform(0, 0.05)
            wait_for_step(broken, at)
            time.sleep(after)
            process.kill()
            assert process.wait(30) == -signal.SIGKILL
        moment = f"killed {after:.3f} s after step {at}"
        found = checkpoint.latest(broken / "checkpoints")
        done = checkpoint.load(found)[0]["step"] if found else 0
        if done == STEPS:  # nothing was left to go on with
            late += 1
            assert late < kills, f"{moment}: too late to test anything"
            continue
        turn += 1
        again = perform(job(kind, pack, broken))
        for product in PRODUCTS[kind]:
            assert (whole / product).read_bytes() == (broken / product).read_bytes(), moment
        assert [step for step, _ in curve(broken, "loss")] == list(range(1, STEPS + 1))
        for key in ("loss", "grad_norm", "lr", EVALUATED.get(kind, "validation_loss")):
            assert curve(broken, key) == curve(whole, key), f"{key}, {moment}"
        timed = {"seconds", "images_per_s"}
        assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in result.items() if k not in timed}
        seconds = [line["seconds"] for line in read_curve(broken / "curve.jsonl")]
        assert seconds == sorted(seconds)
        shutil.rmtree(broken)
    tried(f"SIGKILL at a random moment of {TOLD[kind]}", kills, "the same weights and curve, bit for bit")


def ask(process: subprocess.Popen[str], wire: dict[str, Any]) -> dict[str, Any]:
    send(process, wire)
    return answer(process)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    return dict(json.loads(process.stdout.readline()))


@pytest.mark.parametrize("by", ["signal", "line"])
def test_a_job_that_is_stopped_goes_on_bit_for_bit_and_its_process_serves_on(
    tmp_path: Path, pack: Pack, servers: list[subprocess.Popen[str]], by: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # Two steps a report, so that some stops fall between two; and no checkpoint but at a stop and the end.
    slow = {"optim": {**OPTIM, "epochs": 50}, "checkpoint_minutes": 1000.0}
    result = json.loads(json.dumps(perform(job("pretrain", pack, whole, **slow))))
    process, stops = servers.pop(), []
    for _ in range(2):
        send(process, job("pretrain", pack, broken, **slow))
        wait_for_step(broken, (stops[-1] if stops else 0) + random.randint(1, 30))
        if by == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            send(process, {"stop": True})
        stops.append(answer(process)["stopped"])
        found = checkpoint.latest(broken / "checkpoints")
        assert found
        assert checkpoint.load(found)[0]["step"] == stops[-1]
    assert sorted(set(stops)) == stops
    if by == "signal":  # with nothing to stop it is forgotten
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    again = ask(process, job("pretrain", pack, broken, **slow))["result"]
    for product in PRODUCTS["pretrain"]:
        assert (whole / product).read_bytes() == (broken / product).read_bytes(), f"stopped at {stops}"
    for key in ("loss", "grad_norm", "lr", "validation_loss"):
        assert curve(broken, key) == curve(whole, key), f"{key}, stopped at {stops}"
    timed = {"seconds", "images_per_s"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in result.items() if k not in timed}


def test_what_trains_nothing_is_not_stopped(tmp_path: Path, pack: Pack, servers: list[subprocess.Popen[str]]) -> None:
    palette = {**job("fit_target", pack, tmp_path), "row": PALETTE}
    process = servers[0]
    send(process, palette)
    send(process, {"stop": True})
    assert answer(process)["result"]["steps"] == 1


def test_two_processes_do_not_work_in_one_folder(
    tmp_path: Path, pack: Pack, servers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    send(servers[0], job("pretrain", pack, tmp_path, optim={**OPTIM, "epochs": 2000}))
    wait_for_step(tmp_path, 1)
    monkeypatch.setattr("mim_core.jobs.STOP_SECONDS", 0.1)
    with pytest.raises(HeldError, match=r"this job: process [0-9]+ on host .* has it since"):
        perform(job("pretrain", pack, tmp_path))
    send(servers[0], {"stop": True})
    assert answer(servers[0])["stopped"] > 0


def test_a_server_answers_each_job_and_ends_when_its_parent_does(
    tmp_path: Path, pack: Pack, servers: list[subprocess.Popen[str]]
) -> None:
    process = servers.pop()
    assert process.stdin
    assert process.stdout

    bad_row = job("pretrain", pack, tmp_path / "bad")
    bad_row["row"] = {**bad_row["row"], "mask": "randon"}
    said = ask(process, bad_row)
    assert said["error"].startswith("row.mask.name: 'randon' is not one of ")
    assert "SpecError" in said["traceback"]
    said = ask(process, job("downstream", pack, tmp_path / "greedy", labels=1000))
    assert said["error"] == "labels: found 1000; the training split has 64 labelled images; lower it"
    said = ask(process, {**job("pretrain", pack, tmp_path / "nowhere"), "pack": str(tmp_path / "none")})
    assert "there is no pack here" in said["error"]

    begun = time.time()
    said = ask(process, job("pretrain", pack, tmp_path / "good", optim=OPTIM))
    assert said["result"]["steps"] == 20
    assert begun <= said["span"][0] <= said["span"][1] <= time.time()

    send(process, job("pretrain", pack, tmp_path / "endless", optim={**OPTIM, "epochs": 2000}, checkpoint_minutes=9.0))
    wait_for_step(tmp_path / "endless", 1)
    done = checkpoint.latest(tmp_path / "endless" / "checkpoints")
    process.stdin.close()
    assert process.wait(30) == 0
    assert not process.stdout.read()
    last = checkpoint.latest(tmp_path / "endless" / "checkpoints")
    assert last != done
    assert last
    assert checkpoint.load(last)[0]["step"] >= read_curve(tmp_path / "endless" / "curve.jsonl")[-1]["step"]
