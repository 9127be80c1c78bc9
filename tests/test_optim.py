"""Schedules, parameter groups, optimisers and averages: closed forms, and the published tables."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mim_core.encoders import ENCODERS
from mim_core.encoders.vit import ViT
from mim_core.fills import MaskToken
from mim_core.grid import Entries
from mim_core.heads import HEADS
from mim_core.jobs.pretrain import undecayed
from mim_core.optim import (
    OPTIMISERS,
    SCHEDULES,
    Average,
    Player,
    adamw,
    cosine,
    lars,
    multistep,
    of_a_block,
    param_groups,
    polynomial,
    sgd,
)
from mim_core.params import EncoderOf, FineTune
from mim_core.pretext import MaskedModel
from mim_core.spec import SpecError, build, check
from mim_core.tasks.classify import Classifier

PARITY = Path(__file__).parent / "parity"
# What the published fine-tuning models hold that ours does not: attention with biases of relative position, and a split
# bias of q and v; and the names that differ.
RENAMED = {"fc_norm": "norm", "head": "classify"}


def small_vit(depth: int = 3) -> ViT:
    return ViT((16, 16), 3, patch_px=8, width=8, depth=depth, heads=2)


def test_cosine_closed_forms() -> None:
    def rate(step: int) -> float:
        return cosine(step, 100, peak=1.0, warmup=10, floor=0.1)

    assert rate(0) == 0
    assert rate(5) == pytest.approx(0.5)
    assert rate(50) == pytest.approx(0.55)
    assert rate(100) == rate(1000) == pytest.approx(0.1)
    rates = [rate(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    # The cosine runs over the whole horizon: right after the warm-up it is below the peak by its share of it.
    assert rate(10) == pytest.approx(0.1 + 0.45 * (1 + np.cos(np.pi / 10)))


def test_multistep_is_the_published_schedule() -> None:
    published = np.load(PARITY / "simmim_lr_schedules.npz")["multistep"]
    rate = partial(multistep, total=200, peak=4e-4, warmup=40, start=1e-6, milestones=[0.7])
    ours = [rate(max(i - 1, 0)) for i in range(200)]
    np.testing.assert_allclose(ours, published, rtol=1e-9)


def test_a_cosine_after_the_warmup_begins_at_the_peak() -> None:
    rate = partial(cosine, total=100, peak=1.0, warmup=20, floor=0.1, after_warmup=True)
    assert [rate(20), rate(60), rate(100)] == pytest.approx([1.0, 0.55, 0.1])
    assert rate(10) == 0.5


def test_a_polynomial_falls_in_a_straight_line_by_default() -> None:
    rate = partial(polynomial, total=100, peak=1.0, warmup=20, floor=0.1, after_warmup=True)
    assert [rate(10), rate(20), rate(60), rate(100)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert polynomial(50, 100, peak=1.0, power=2.0) == pytest.approx(0.25)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_and_never_rises_after(name: str) -> None:
    params = {"milestones": [0.5, 0.75]} if name == "multistep" else {}
    rates = [SCHEDULES[name](step, 80, 1.0, warmup=8, floor=0.05, start=0.2, **params) for step in range(81)]
    assert rates[:9] == sorted(rates[:9])
    assert rates[0] == 0.2
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert max(rates) <= 1.0
    assert rates[-1] >= 0.05


def test_cosine_without_warmup_begins_at_the_peak() -> None:
    assert cosine(0, 10, peak=3.0) == 3.0
    assert cosine(10, 10, peak=3.0) == 0


def test_cosine_is_the_published_schedule() -> None:
    # The published loop sets the rate after an iteration, so iteration i runs at the rate of i - 1.
    published = np.load(PARITY / "simmim_lr_schedules.npz")["cosine"]
    ours = [cosine(max(i - 1, 0), 200, peak=4e-4, warmup=40, floor=1e-5, start=1e-6) for i in range(200)]
    np.testing.assert_allclose(ours, published, rtol=1e-9)


def finetuning_groups(encoder: Any, decay: float) -> dict[str, tuple[float, float]]:
    """Name -> (lr_scale, weight_decay) of a classifier as the job groups it."""
    model = Classifier(encoder, 2)

    def layer(name: str) -> int:
        return encoder.layer(name.removeprefix("encoder.")) if name.startswith("encoder.") else encoder.depth + 1

    groups = param_groups(
        model.named_parameters(),
        weight_decay=0.05,
        no_decay=lambda name: name.removeprefix("encoder.") in encoder.no_weight_decay(),
        layer=layer,
        layers=encoder.depth + 2,
        layer_decay=decay,
    )
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("case", ["mae_layer_decay_0.65_depth3", "simmim_layer_decay_vit_0.65"])
def test_layer_decay_groups_are_the_published_ones(case: str) -> None:
    table = np.load(PARITY / f"{case}.npz")
    ours = finetuning_groups(small_vit(), 0.65)
    compared = set()
    for name, scale, weight_decay in zip(table["names"], table["lr_scale"], table["weight_decay"], strict=True):
        first, _, rest = str(name).partition(".")
        candidates = [f"encoder.backbone.{name}", f"{RENAMED.get(first, first)}.{rest}"]
        for candidate in set(candidates) & set(ours):
            assert ours[candidate] == (pytest.approx(scale), weight_decay), candidate
            compared.add(candidate)
    # All of ours stand in the published table, but for what the published encoder has not.
    lacking = set(ours) - compared
    if case.startswith("simmim"):
        qkv = {f"encoder.backbone.blocks.{i}.attn.qkv.bias" for i in range(3)}
        assert (
            lacking
            == {"encoder.backbone.pos_embed", "encoder.backbone.norm.weight", "encoder.backbone.norm.bias"} | qkv
        )
    else:
        assert not lacking


SMALL: dict[str, dict[str, Any]] = {
    "vit": {"patch_px": 16, "width": 8, "depth": 2, "heads": 2, "positions": "relative", "layer_scale": 0.1},
    "swin": {"width": 8, "depths": [1, 1], "heads": [1, 2], "window": 4},
    "conv": {"base": 4, "layers": 3, "bottleneck": 8},
    "alexnet": {"base": 6},
}


def encoder_of(name: str) -> Any:
    size = (96, 96) if name == "alexnet" else (32, 32)
    return build(ENCODERS, check(EncoderOf, {"encoder": {"name": name, **SMALL[name]}}, "row").encoder, size, 3)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_pretraining_decays_what_the_published_code_decays(name: str) -> None:
    table = np.load(PARITY / "simmim_pretrain_wd_groups.npz")
    encoder = encoder_of(name)
    grid, colours = encoder.grid, (0.5,) * 3
    fill = MaskToken(encoder.embed_width, grid, colours, colours)
    model = MaskedModel(encoder, fill, HEADS["linear"](encoder.width, encoder.output, Entries(3, 16)))
    no_decay = partial(undecayed, model)
    groups = param_groups(model.named_parameters(), weight_decay=0.05, no_decay=no_decay)
    ours = {key: group["weight_decay"] > 0 for group in groups for key in group["names"]}
    met = set()
    for key, decays in ((f"{name}/decay", True), (f"{name}/no_decay", False)):
        for published in map(str, table[key]):
            inner = published.replace("encoder.mask_token", "fill.token").replace("decoder.0.", "head.project.")
            inner = inner.replace("encoder.", "encoder.backbone.").replace("layers.0.downsample", "layers.1.downsample")
            if inner in ours:
                assert ours[inner] == decays, inner
                met.add(inner)
    # The published table is that of a model with one block (a stage).
    assert {key for key in ours if "blocks.1." not in key} == met


def test_fine_tuning_a_swin_leaves_its_tables_of_relative_positions() -> None:
    encoder = encoder_of("swin")
    assert {name.split(".")[-1] for name in encoder.no_weight_decay()} == {"relative_position_bias_table"}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_has_a_layer(name: str) -> None:
    encoder = encoder_of(name)
    layers = {encoder.layer(key) for key, _ in encoder.named_parameters()}
    blocks = set(range(1, encoder.depth + 1))
    # Convolutional encoders have nothing before the first of them, or after the last.
    assert layers == blocks if encoder.grid.patch_px == 1 else layers == blocks | {0, encoder.depth + 1}
    assert encoder.no_weight_decay() <= {key for key, _ in encoder.named_parameters()}


def test_groups_hold_every_trainable_parameter_once_and_no_frozen_one() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Linear(1, 2))
    model[2].weight.requires_grad_(False)
    groups = param_groups(model.named_parameters(), weight_decay=0.1)
    names = sorted(name for group in groups for name in group["names"])
    assert names == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias"]
    # A matrix of one row is still a matrix.
    assert [group["names"] for group in groups if group["weight_decay"]] == [["0.weight"]]


def one_weight(rate: float, clip: float | None = None) -> tuple[nn.Parameter, Player]:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    groups = param_groups([("w", weight)], weight_decay=0.0, layers=2, layer_decay=0.5)
    return weight, Player(adamw(groups, (0.9, 0.999)), lambda step: rate * (step + 1), clip)


def test_a_player_steps_at_its_rate_times_the_layers_scale_and_clears_gradients() -> None:
    weight, player = one_weight(0.1)
    weight.grad = torch.tensor([1.0, -1.0])
    norm = player.step(1)
    assert norm.item() == pytest.approx(2**0.5)
    assert weight.grad is None
    # Adam's first step is the sign of the gradient times the rate: 0.1 * 2 * 0.5.
    torch.testing.assert_close(weight.detach(), torch.tensor([2.9, 4.1]))


def test_clipping_scales_the_gradient_and_tells_the_norm_before() -> None:
    weight, player = one_weight(0.1, clip=1.0)
    weight.grad = torch.tensor([30.0, 40.0])
    assert player.step(0).item() == pytest.approx(50)
    first_moment = player.optimiser.state[weight]["exp_avg"]
    torch.testing.assert_close(first_moment, 0.1 * torch.tensor([0.6, 0.8]))


def test_rates_that_a_recorded_step_reads_are_saved_as_numbers() -> None:
    weight, player = one_weight(0.1)
    weight.grad = torch.ones(2)
    player.step(0)
    player.record()
    player.set_rates(3)
    (group,) = player.optimiser.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert group["lr"].item() == pytest.approx(0.2)  # 0.1 * 4 * 0.5
    (saved,) = player.state_dict()["optimiser"]["param_groups"]
    assert (type(saved["lr"]), saved["capturable"]) == (float, False)
    player.record(False)
    assert group["lr"] == pytest.approx(0.2)
    weight.grad = torch.ones(2)
    player.step(1)


def test_layer_decay_of_a_swin_is_simmims() -> None:
    encoder = build(
        ENCODERS,
        check(EncoderOf, {"encoder": {**SMALL["swin"], "name": "swin", "depths": [2, 1]}}, "row").encoder,
        (32, 32),
        3,
    )
    # SimMIM's fine-tuning: embeddings 0, block k of all stages k + 1, merging with the block before it, the rest last.
    layers = {
        "backbone.patch_embed.": 0,
        "backbone.layers.0.blocks.0.": 1,
        "backbone.layers.0.blocks.1.": 2,
        "backbone.layers.1.downsample.": 2,
        "backbone.layers.1.blocks.0.": 3,
        "backbone.norm.": 4,
    }
    ours = finetuning_groups(encoder, 0.9)
    for name, (scale, weight_decay) in ours.items():
        inner = name.removeprefix("encoder.")
        at = next((layer for begins, layer in layers.items() if inner.startswith(begins)), 4)
        assert scale == pytest.approx(0.9 ** (4 - at)), name
        spared = name.endswith((".bias", "relative_position_bias_table")) or "norm" in name
        assert weight_decay == (0 if spared else 0.05), name
    assert len({scale for scale, _ in ours.values()}) == 5


def test_layer_decay_of_convolutions_goes_by_their_order() -> None:
    encoder = encoder_of("conv")
    ours = finetuning_groups(encoder, 0.5)
    # Four convolutions, and nothing before or after them but the task's own layers.
    for index in range(4):
        assert ours[f"encoder.stages.{index}.0.weight"] == (0.5 ** (5 - (index + 1)), 0.05)
    assert ours["classify.weight"] == (1.0, 0.05)
    assert ours["classify.bias"] == (1.0, 0.0)


def test_a_factor_multiplies_the_rate_of_its_parameters() -> None:
    named = [("a.weight", nn.Parameter(torch.ones(2, 2))), ("b.weight", nn.Parameter(torch.ones(2, 2)))]
    groups = param_groups(
        named, weight_decay=0.0, layers=2, layer_decay=0.5, factor=lambda name: 3.0 if "b" in name else 1.0
    )
    assert {group["names"][0]: group["lr_scale"] for group in groups} == {"a.weight": 0.5, "b.weight": 1.5}


def stepped(make: Any, steps: int = 4, weight_decay: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Step a matrix and a vector by given gradients at rates 0.1, 0.2, ...; gives where they end, and the gradients."""
    rng = torch.Generator().manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((3, 4), (4,)))
    groups = param_groups([("m", matrix), ("v", vector)], weight_decay=weight_decay)
    player = Player(make(groups), lambda step: 0.1 * (step + 1))
    gradients = [torch.randn(16, generator=rng) for _ in range(steps)]
    for step, gradient in enumerate(gradients):
        matrix.grad, vector.grad = gradient[:12].reshape(3, 4).clone(), gradient[12:].clone()
        player.step(step)
    return [matrix.detach(), vector.detach()], gradients


@pytest.mark.parametrize("trust", [0.001, 0.02])
def test_lars_is_that_of_maes_linear_probe(trust: float) -> None:
    ended, gradients = stepped(lambda groups: lars(groups, momentum=0.9, trust=trust))
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for shape in ((3, 4), (4,))]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step, gradient in enumerate(gradients):
        for at, part in enumerate((gradient[:12].reshape(3, 4), gradient[12:])):
            if weights[at].ndim > 1:
                part = part * trust * weights[at].norm() / part.norm()
            momenta[at] = 0.9 * momenta[at] + part
            weights[at] = weights[at] - 0.1 * (step + 1) * momenta[at]
    for ours, wanted in zip(ended, weights, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_sgd_is_heavy_ball_momentum_and_decays_matrices_only() -> None:
    ended, gradients = stepped(lambda groups: sgd(groups, momentum=0.5), weight_decay=0.1)
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng) for shape in ((3, 4), (4,))]
    momenta: list[Any] = [0.0, 0.0]
    for step, gradient in enumerate(gradients):
        for at, part in enumerate((gradient[:12].reshape(3, 4) + 0.1 * weights[0], gradient[12:])):
            momenta[at] = 0.5 * momenta[at] + part
            weights[at] = weights[at] - 0.1 * (step + 1) * momenta[at]
    for ours, wanted in zip(ended, weights, strict=True):
        torch.testing.assert_close(ours, wanted)


class Block(nn.Module):
    """What timm's transformer blocks call their matrices, which do not act here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.head = nn.Linear(width, 5)


def block(width: int = 16) -> Block:
    torch.manual_seed(0)
    return Block(width)


def nudge(model: nn.Module, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def moved_by_muon(**given: Any) -> dict[str, torch.Tensor]:
    model = block()
    groups = param_groups(model.named_parameters(), weight_decay=0.1)
    player = Player(OPTIMISERS["muon"](groups, betas=(0.9, 0.95), **given), lambda step: 0.01 * (step + 1))
    for step in range(3):
        nudge(model, step)
        player.step(step)
    return dict(model.named_parameters())


def test_muon_moves_the_matrices_of_blocks_as_torchs_own() -> None:
    ours = moved_by_muon(momentum=0.9)
    model = block()
    peers = {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight")}
    del peers["head.weight"]
    # Queries, keys and values are three matrices.
    peers |= {f"{at}": nn.Parameter(part) for at, part in enumerate(peers.pop("attn.qkv.weight").detach().chunk(3))}
    peer = torch.optim.Muon(
        peers.values(), momentum=0.9, weight_decay=0.1, ns_steps=5, eps=1e-7, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        nudge(model, step)
        grad = model.attn["qkv"].weight.grad
        assert grad is not None
        for at, part in enumerate(grad.chunk(3)):
            peers[f"{at}"].grad = part
        peer.param_groups[0]["lr"] = 0.01 * (step + 1)
        peer.step()
    wanted = {**peers, "attn.qkv.weight": torch.cat([peers[f"{at}"] for at in range(3)])}
    began = dict(block().named_parameters())
    for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
        ways = [one[name].detach() - began[name].detach() for one in (ours, wanted)]
        # Torch's iterates in bfloat16.
        assert (ways[0] - ways[1]).norm() < 0.03 * ways[1].norm(), name


def test_muon_leaves_the_rest_to_adamw() -> None:
    ours, model = moved_by_muon(), block()
    player = Player(
        adamw(param_groups(model.named_parameters(), weight_decay=0.1), (0.9, 0.95)), lambda step: 0.01 * (step + 1)
    )
    for step in range(3):
        nudge(model, step)
        player.step(step)
    for name, wanted in model.named_parameters():
        assert torch.equal(ours[name], wanted) != of_a_block(name), name


def test_an_update_of_muon_has_equal_singular_values_and_the_size_asked_for() -> None:
    model = block()
    before = model.mlp["fc1"].weight.detach().clone()
    groups = param_groups(model.named_parameters(), weight_decay=0.0)
    player = Player(OPTIMISERS["muon"](groups, rms=0.5, iterations=8), lambda step: 0.1)
    nudge(model, 0)
    player.step(0)
    change = (before - model.mlp["fc1"].weight.detach()) / 0.1
    # The published iteration ends between 0.7 and 1.2, not at one.
    singular = torch.linalg.svdvals(change) / (0.5 * math.sqrt(64))
    assert singular.min() > 0.65
    assert singular.max() < 1.25
    assert change.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_goes_on_from_its_state(name: str) -> None:
    def play(player: Player, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.full_like(weight, 1.0 + step) * weight.detach().sign()
            player.step(step)

    def made() -> tuple[Player, nn.Parameter, nn.Module]:
        model = nn.Linear(3, 2, bias=False)
        nn.init.ones_(model.weight)
        average = Average(model, 0.5)
        average.begin()
        # A name that muon takes for a matrix of a block.
        groups = param_groups([("mlp.fc1.weight", model.weight)], weight_decay=0.1)
        return Player(OPTIMISERS[name](groups), lambda step: 0.1, None, average), model.weight, model

    whole, weight, _ = made()
    play(whole, weight, range(5))
    first, begun, _ = made()
    play(first, begun, range(3))
    second, resumed, model = made()
    with torch.no_grad():
        resumed.copy_(begun)
    second.load_state_dict(first.state_dict())
    play(second, resumed, range(3, 5))
    assert torch.equal(weight, resumed)
    assert whole.average is not None
    assert second.average is not None
    assert torch.equal(whole.average.values["weight"], second.average.values["weight"])
    second.average.wear()
    assert torch.equal(model.weight, whole.average.values["weight"])


def test_an_average_moves_by_its_closed_form_and_is_worn_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(1, 1))
    model[2].requires_grad_(False)
    average = Average(model, 0.3)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    average.begin()
    # Trained parameters and running moments, but no frozen parameter and no count.
    assert set(average.values) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    wanted = 1.0
    for step in range(6):
        with torch.no_grad():
            model[0].weight.fill_(2.0 + step)
            model[1].running_mean.fill_(step)
        average.update(step)
        share = min(0.3, (1 + step) / (10 + step))
        wanted = share * wanted + (1 - share) * (2.0 + step)
        assert average.values["0.weight"].item() == pytest.approx(wanted)
    with average.worn():
        assert model[0].weight.item() == pytest.approx(wanted)
    assert model[0].weight.item() == 7.0
    assert average.values["0.weight"].item() == pytest.approx(wanted)
    average.wear()
    assert model[0].weight.item() == pytest.approx(wanted)


TUNE = {"batch": 8, "epochs": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimiser": "larz"}, r"optim\.optimiser\.name: 'larz' is not one of .*did you mean 'lars'"),
        ({"optimiser": {"name": "lars", "trust": 0.0}}, r"optim\.optimiser\.trust: found 0\.0"),
        (
            {"optimiser": "sgd", "betas": [0.5, 0.9]},
            r"found betas \[0\.5, 0\.9\] with the optimiser sgd; they are of adamw and muon",
        ),
        ({"ema": 1.0}, r"optim\.ema: found 1\.0; must be less than 1"),
    ],
)
def test_faults_of_an_optimiser_are_told(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check(FineTune, {**TUNE, **fields}, "optim")
    row = check(FineTune, {**TUNE, "optimiser": "lars"}, "optim")
    assert check(FineTune, row.model_dump(mode="json"), "optim") == row
