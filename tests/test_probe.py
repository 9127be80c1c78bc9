"""Linear probes: the published head, frozen features, heads side by side as if alone, the best on validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_pieces import ENCODER, TUNE, classify_row
from torch import nn

from mim_core import checkpoint
from mim_core.data.pack import Pack
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve
from mim_core.jobs import downstream
from mim_core.jobs.run import player
from mim_core.params import EncoderOf, FineTune
from mim_core.spec import SpecError, build, check
from mim_core.tasks.features import taps
from mim_core.tasks.probe import Featured, Probe
from mim_core.tasks.task import Facts
from mim_core.transforms import normalise

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Compute(torch.device("cpu"), bf16=False)
FACTS = Facts((16, 16), 3, (0.4,) * 3, (0.2,) * 3, ["0", "1", "2", "3"], [], ["labels"])
VIT = {**ENCODER, "depth": 3}
SWIN = {"name": "swin", "patch_px": 2, "width": 8, "depths": [1, 1], "heads": [1, 2], "window": 4}
CONV = {"name": "conv", "base": 4, "layers": 2, "bottleneck": 8}
LARS = {"batch": 16, "epochs": 4, "warmup_epochs": 1, "optimiser": "lars", "weight_decay": 0.0}
SWEEP = {"name": "probe", "blocks": [1, -1], "pooling": ["mean", "class"], "rates": [0.3, 3]}
WHOLE = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0}


def encoder_of(piece: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build(ENCODERS, check(EncoderOf, {"encoder": piece}, "row").encoder, (16, 16), 3)


def probe(piece: dict[str, Any] = VIT, **params: Any) -> Probe:
    return Probe(encoder_of(piece), FACTS, CPU, **params)


def probe_row(task: Any = "probe", **changes: Any) -> Any:
    common = {"encoder": VIT, "task": task, "augment": None, "drop_path": 0.0, "optim": LARS, "lr_grid": [1.0]}
    return classify_row(**{**common, **changes})


def test_the_head_is_maes() -> None:
    model = probe(pooling=("class",)).model
    ((norm, linear),) = model.heads
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps, norm.num_features) == (False, 1e-6, 32)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not linear.bias.any()


@pytest.mark.parametrize(("norm", "kind"), [("layer", nn.LayerNorm), ("none", nn.Identity)])
def test_other_norms_have_no_parameters_either(norm: Any, kind: type) -> None:
    head = probe(norm=norm).model.heads[0]
    assert isinstance(head[0], kind)
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]


@torch.no_grad()
@pytest.mark.parametrize("piece", [VIT, SWIN, CONV])
def test_features_are_a_blocks_mean_or_class_token_or_both(piece: dict[str, Any]) -> None:
    encoder = encoder_of(piece).eval()
    depth = len(encoder.block_widths)
    poolings: tuple[Any, ...] = ("mean", "class", "both") if piece["name"] == "vit" else ("mean",)
    task = Probe(encoder, FACTS, CPU, blocks=(1, -1), pooling=poolings)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    outs = encoder.blocks(normalise(images, FACTS.mean, FACTS.std))
    found = task.reader.of(images)
    assert [str(tap) for tap in task.model.taps] == [f"block_{b}_{p}" for b in (1, depth) for p in poolings]
    for tap, features in zip(task.model.taps, found, strict=True):
        patches, summary = outs[tap.block - 1]
        wanted = {"mean": patches.mean(1), "class": summary[:, :1].flatten(1)}
        wanted["both"] = torch.cat([wanted["class"], wanted["mean"]], 1)
        torch.testing.assert_close(features, wanted[tap.pooling])
        assert features.shape[1] == tap.width
    # SimMIM's: the eighth of twelve.
    assert taps(encoder_of({**VIT, "depth": 12}), (8,), ("mean",))[0].block == 8


@pytest.mark.parametrize(
    ("piece", "params", "said"),
    [
        (VIT, {"blocks": (4,)}, r"blocks: found 4; the encoder's are 1 to 3, or -3 to -1 from the end; choose of them"),
        (VIT, {"blocks": (0,)}, "blocks: found 0"),
        (VIT, {"blocks": (-4,)}, "blocks: found -4"),
        (VIT, {"blocks": (3, -1)}, "blocks: found 3 twice; each is tried once; delete one"),
        (VIT, {"pooling": ("mean", "mean")}, "pooling: found mean twice"),
        (SWIN, {"pooling": ("both",)}, "pooling: found the class token's; the encoder, a Swin, has none"),
        (CONV, {"pooling": ("mean", "class")}, "pooling: found the class token's; the encoder, a Conv, has none"),
        (VIT, {"predicts": "presence", "blocks": (9,)}, "blocks: found 9"),
    ],
)
def test_what_an_encoder_has_not_is_refused(piece: dict[str, Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        probe(piece, **params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"blocks": []}, r"row\.task\.blocks: found"),
        ({"rates": [0.0]}, r"row\.task\.rates\.0: found 0\.0; must be greater than 0"),
        ({"norm": "group"}, r"row\.task\.norm: found 'group'"),
        ({"block": 3}, r"row\.task\.block: unknown key; .*did you mean 'blocks'"),
    ],
)
def test_faults_of_a_row_are_told(params: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        probe_row({"name": "probe", **params})


def test_a_row_may_name_one_for_many_and_comes_back_from_json_as_it_was() -> None:
    row = probe_row({"name": "probe", "blocks": 2, "pooling": "both", "rates": 0.5})
    assert (row.task.blocks, row.task.pooling, row.task.rates) == ((2,), ("both",), (0.5,))
    assert check(type(row), row.model_dump(mode="json"), "row") == row


def trained(task: Probe, given: list[Featured], optim: FineTune) -> list[float]:
    """Take the steps of a job; gives the losses."""
    _, own = player(optim, 16 * 10, task.model, 0.5, factor=task.factor)
    losses = []
    for step, batch in enumerate(given):
        ((_, loss),) = task.losses(batch, step)
        loss.backward()  # type: ignore[no-untyped-call]
        own.step(step)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimiser", ["lars", "sgd", "adamw"])
def test_heads_side_by_side_learn_as_each_alone(optimiser: str) -> None:
    optim = check(FineTune, {**LARS, "optimiser": optimiser, "weight_decay": 0.01}, "optim")
    together = probe(blocks=(1, 2), pooling=("mean",), rates=(0.2, 2.0))
    begun = [{name: one.clone() for name, one in head.state_dict().items()} for head in together.model.heads]
    rng = torch.Generator().manual_seed(0)
    features = [[torch.randn(8, 32, generator=rng) for _ in range(2)] for _ in range(6)]
    labels = [torch.randint(4, (8,), generator=rng) for _ in range(6)]
    sums = trained(together, [Featured(*one) for one in zip(features, labels, strict=True)], optim)
    alone_sums = np.zeros(6)
    for at, (tap, rate) in enumerate(together.tried):
        alone = probe(blocks=(tap.block,), rates=(rate,))
        alone.model.heads[0].load_state_dict(begun[at])
        own = [Featured([both[tap.block - 1]], label) for both, label in zip(features, labels, strict=True)]
        alone_sums += trained(alone, own, optim)
        for name, tensor in alone.model.heads[0].state_dict().items():
            torch.testing.assert_close(together.model.heads[at].state_dict()[name], tensor)
    np.testing.assert_allclose(sums, alone_sums, rtol=1e-5)


def test_only_heads_are_trained_and_kept_in_checkpoints_and_the_file_holds_all(tmp_path: Path, pack: Pack) -> None:
    row = probe_row(SWEEP, optim={**LARS, "epochs": 1})
    downstream(row, pack, tmp_path, 0, 1.0, None, True)
    _, weights, players = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    assert {name.split(".")[0] for name in weights} == {"heads", "chosen"}
    groups = players["model"]["optimiser"]["param_groups"]
    assert {name.split(".")[0] for group in groups for name in group["names"]} == {"heads"}
    assert sorted({group["lr_scale"] for group in groups}) == [0.3, 3.0]
    whole, _ = checkpoint.read_weights(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in build(ENCODERS, row.encoder, (16, 16), 3).state_dict().items():
        assert torch.equal(whole[f"encoder.{name}"], tensor), name


def test_an_encoder_stays_in_evaluation_mode() -> None:
    model = probe({**VIT, "drop_path": 0.5}).model.train()
    assert model.training
    assert model.heads.training
    assert not model.encoder.training
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_features_that_are_kept_train_as_those_that_are_computed_at_each_step(tmp_path: Path, pack: Pack) -> None:
    kept = downstream(probe_row(), pack, tmp_path / "kept", 0, 1.0, None, True)
    fresh = downstream(probe_row(augment=WHOLE), pack, tmp_path / "fresh", 0, 1.0, None, True)
    losses = [
        [line["loss"] for line in read_curve(tmp_path / name / "curve.jsonl") if "loss" in line]
        for name in ("kept", "fresh")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert kept["test_cross_entropy"] == pytest.approx(fresh["test_cross_entropy"], rel=1e-3)
    # Each epoch has its own order of the same images.
    assert len(losses[0]) == 16


def test_the_best_on_validation_images_is_scored_on_test_images_and_served(tmp_path: Path, pack: Pack) -> None:
    result = downstream(probe_row(SWEEP), pack, tmp_path, 0, 1.0, None, True)
    scores = {key: value for key, value in result.items() if key.startswith("validation_accuracy_block_")}
    assert len(scores) == 8
    pooling = ("mean", "class", "both")[int(result["test_pooling"])]
    chosen = f"validation_accuracy_block_{result['test_block']:g}_{pooling}_rate_{result['test_rate']:g}"
    assert scores[chosen] == max(scores.values()) == result["validation_score"]
    weights, about = checkpoint.read_weights(tmp_path / "model.safetensors")
    sweep: dict[str, Any] = {"blocks": (1, -1), "pooling": ("mean", "class"), "rates": (0.3, 3.0)}
    again = Probe(encoder_of(VIT), Facts.of(pack), CPU, **sweep)
    again.model.load_state_dict(weights)
    test = pack.split("test")
    again.model.eval()
    logits = again.logits(torch.from_numpy(np.array(test.images)))
    right = (logits.argmax(1).numpy() == test.labels).mean()
    assert right == pytest.approx(result["test_accuracy"])
    images = normalise(torch.from_numpy(np.array(test.images)), pack.mean, pack.std)
    torch.testing.assert_close(again.model(images), logits)
    assert about["task"]["name"] == "probe"


def test_a_resume_is_exact(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    row = probe_row(SWEEP, optim={**LARS, "ema": 0.9}, checkpoint_minutes=1e-6)
    downstream(row, pack, tmp_path / "whole", 0, 1.0, None, True)
    inner = Probe.losses

    def losses(self: Probe, batch: Any, step: int) -> Any:
        if step == 9:
            raise KeyboardInterrupt
        return inner(self, batch, step)

    with monkeypatch.context() as patched:
        patched.setattr(Probe, "losses", losses)
        with pytest.raises(KeyboardInterrupt):
            downstream(row, pack, tmp_path / "broken", 0, 1.0, None, True)
    assert (tmp_path / "broken" / "checkpoints" / "step_000000009").is_dir()
    downstream(row, pack, tmp_path / "broken", 0, 1.0, None, True)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_probe_learns(tmp_path: Path, pack: Pack) -> None:
    adam = {**TUNE, "epochs": 15, "weight_decay": 0.0, "clip": None}
    result = downstream(probe_row(optim=adam), pack, tmp_path, 0, 3e-2, None, True)
    assert result["test_accuracy"] > 0.9
    assert (
        result["test_cross_entropy"] < F.cross_entropy(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)).item() / 2
    )
