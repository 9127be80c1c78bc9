"""Fitting a tokenizer: schedules, the loss and its units, what the scores mean, and that a fit learns."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from test_tokenizers import published_small

from mim_core.data.pack import Pack
from mim_core.devices import choose
from mim_core.fit_target import (
    Anneal,
    ImageFetch,
    QuantisedFit,
    RelaxedFit,
    Tally,
    Temperature,
    TokenizerFit,
    collapse,
    kl_to_uniform,
    objective,
    picture,
    score,
    token_grid,
)
from mim_core.params import TargetRow
from mim_core.spec import check
from mim_core.tokenizers import TOKENIZERS
from mim_core.tokenizers.dalle import DiscreteVAE
from mim_core.tokenizers.palette import Palette
from mim_core.tokenizers.small import SmallDVAE, SmallVQ
from mim_core.transforms import Augment

STEPS = 60
SCHEDULES = {"temperature": Anneal(start=1, end=0.25), "kl_weight": Anneal(start=0, end=2, over=0.5)}
BESIDE = {"dvae_small": "kl", "vq_small": "distance"}


def fit_of(pack: Pack, model: DiscreteVAE | None = None, **changes: Any) -> RelaxedFit:
    torch.manual_seed(0)
    model = model or SmallDVAE(3, codes=16, layers=2, width=16, code_width=8, blocks=0)
    return RelaxedFit(model, pack, choose("cpu", "fp32"), STEPS, **(SCHEDULES | changes))


def chosen(pack: Pack, name: str, **params: Any) -> TokenizerFit:
    """The objective that a small tokenizer gets."""
    torch.manual_seed(0)
    model = TOKENIZERS[name](3, codes=16, layers=2, width=16, code_width=8, blocks=0, **params)
    return objective(model, pack, choose("cpu", "fp32"), STEPS, **SCHEDULES)


def loss_of(fit: TokenizerFit, batch: torch.Tensor, step: int = 0) -> torch.Tensor:
    torch.manual_seed(step)
    ((player, loss),) = fit.losses(batch, step)
    assert player == "model"
    return loss


def test_an_anneal_is_half_a_cosine_and_then_constant() -> None:
    anneal = Anneal(start=1.0, end=0.0625, over=0.5)
    assert anneal.value(0, 100) == 1
    assert anneal.value(25, 100) == pytest.approx((1 + 0.0625) / 2)
    assert anneal.value(10, 100) == pytest.approx(0.0625 + 0.9375 * (1 + math.cos(0.2 * math.pi)) / 2)
    assert anneal.value(50, 100) == anneal.value(100, 100) == 0.0625
    rising = [Anneal(start=0, end=6.6).value(step, 10) for step in range(11)]
    assert rising == sorted(rising)
    assert (rising[0], rising[-1]) == (0, pytest.approx(6.6))


@pytest.mark.parametrize("wrong", [{"over": 0}, {"over": 1.1}, {"start": -1}, {"until": 1}])
def test_an_anneal_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Anneal(**{"start": 1, "end": 0} | wrong)


def test_a_temperature_stays_above_zero(pack: Pack) -> None:
    with pytest.raises(ValidationError, match=r"found 1\.0 to 0\.0; a temperature lies above 0"):
        TypeAdapter(Temperature).validate_python({"start": 1.0, "end": 0.0})
    with pytest.raises(ValueError, match="a temperature lies above 0"):
        fit_of(pack, temperature=Anneal(start=1, end=0))


def test_tokens_that_do_not_fill_the_images_are_refused(pack: Pack) -> None:
    model = SmallDVAE(3, codes=4, layers=5, width=4, code_width=4)
    assert token_grid(model, (32, 64)) == (1, 2)
    with pytest.raises(ValueError, match="stride: found 32 px a token; it must divide the images' 16 x 16 px"):
        fit_of(pack, model)


def test_divergence_from_the_uniform_prior_has_its_bounds_and_torchs_value() -> None:
    assert kl_to_uniform(torch.zeros(1, 8, 1, 1)).item() == pytest.approx(0, abs=1e-6)
    sure = torch.zeros(1, 8, 1, 1)
    sure[0, 3] = 100
    assert kl_to_uniform(sure).item() == pytest.approx(math.log(8))
    logits = torch.randn(2, 8, 3, 4)
    codes = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(2, 3, 4, 8))
    torch.testing.assert_close(kl_to_uniform(logits), torch.distributions.kl_divergence(codes, uniform))


@torch.no_grad()
def test_the_small_published_loss_comes_out_of_ours(pack: Pack) -> None:
    case, model = published_small()
    images = torch.tensor(case["x"]).float() / 2 + 0.5
    # The published code takes the divergence's sum over tokens and images; ours is divided by the images' values.
    weight = 0.1 * images.numel()
    fit = fit_of(pack, model)
    reconstruction, kl = fit.terms(images, torch.tensor(case["logits"]), torch.tensor(case["recon"]))
    assert reconstruction.item() == pytest.approx(float(case["recon_mse"]), abs=1e-5)
    assert kl.item() * images.numel() == pytest.approx(float(case["kl_batchmean_as_coded"]), abs=1e-5)
    assert (reconstruction + weight * kl).item() == pytest.approx(float(case["loss_kl0p1"]), abs=1e-5)


def test_the_weight_of_the_divergence_is_the_papers_beta(pack: Pack) -> None:
    # 8 px a token and 3 channels: "overall loss divided by 256 * 256 * 3", so beta / 192 on a token's mean divergence.
    fit = fit_of(pack, SmallDVAE(3, codes=16, layers=3, width=8, code_width=8))
    images, logits = torch.rand(2, 3, 16, 16), torch.randn(2, 16, 2, 2)
    _, kl = fit.terms(images, logits, torch.zeros(2, 6, 16, 16))
    torch.testing.assert_close(6.6 * kl, 6.6 / 192 * kl_to_uniform(logits).mean())


def test_the_loss_is_that_of_relaxed_codes_at_the_steps_temperature_and_weight(pack: Pack) -> None:
    fit = fit_of(pack)
    batch = torch.from_numpy(pack.split("train").images[:4].copy())
    images, model = batch / 255, fit.model
    for step in (0, 7, STEPS):
        loss = loss_of(fit, batch, step)
        torch.manual_seed(step)
        logits = model.logits(images)
        # Gumbel noise as minus the logarithm of exponential noise, from the generator that the step seeded.
        noise = -torch.empty_like(logits).exponential_().log()
        soft = ((logits + noise) / fit.temperature.value(step, STEPS)).softmax(1)
        errors = model.errors(model.reconstruct(soft), images).mean()
        kl = kl_to_uniform(logits).mean() / (4 * 4 * 3)
        torch.testing.assert_close(loss, errors + fit.kl_weight.value(step, STEPS) * kl)


def test_the_loss_is_a_pure_function_of_weights_batch_and_step(pack: Pack) -> None:
    batch = torch.from_numpy(pack.split("train").images[:4].copy())
    first, second = fit_of(pack), fit_of(pack)
    loss_of(first, batch, 3)
    assert loss_of(first, batch, 5) == loss_of(second, batch, 5) != loss_of(second, batch, 6)


def test_the_objective_is_that_of_a_tokenizers_codes(pack: Pack) -> None:
    assert isinstance(chosen(pack, "dvae_small"), RelaxedFit)
    assert isinstance(chosen(pack, "vq_small"), QuantisedFit)


def test_a_quantised_loss_is_that_of_the_nearest_codes_and_of_how_far_they_are(pack: Pack) -> None:
    fit = chosen(pack, "vq_small", commitment=0.5)
    model = fit.model
    assert isinstance(model, SmallVQ)
    batch = torch.from_numpy(pack.split("train").images[:4].copy())
    loss_of(fit, batch)
    images = batch / 255
    model.eval()
    tokens, logits = model.tokens(images), model.logits(images)
    errors = model.errors(model.draw(model.look_up(tokens)), images).mean()
    model.train()
    # A mean over the 8 entries of a code.
    torch.testing.assert_close(loss_of(fit, batch, 1), errors + 0.5 * -logits.amax(1).mean() / 8)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("likelihood", ["laplace", "l2"])
def test_a_fit_learns(pack: Pack, name: str, likelihood: Any) -> None:
    fit = chosen(pack, name, likelihood=likelihood)
    model = fit.model
    if isinstance(fit, RelaxedFit):
        fit.kl_weight = Anneal(start=0, end=0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = fit.evaluate(pack.split("validation"))
    fetch = ImageFetch(pack.split("train"), None, 0)
    for step in range(STEPS):
        loss = loss_of(fit, fetch([(0, (step * 16 + i) % 64) for i in range(16)]), step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    after = fit.evaluate(pack.split("validation"))
    assert after["psnr"] > before["psnr"] + 3
    assert after["reconstruction"] < before["reconstruction"]
    assert model.training


@pytest.mark.parametrize("name", BESIDE)
def test_scores_are_those_of_the_tokenizer_as_a_target_uses_it(pack: Pack, name: str) -> None:
    fit, held = chosen(pack, name), pack.split("validation")
    scores = fit.evaluate(held, batch=5)
    assert scores.keys() == {"psnr", "codes_used", "perplexity", BESIDE[name], "reconstruction"}
    images = torch.from_numpy(held.images.copy()) / 255
    tokens = fit.model.tokens(images)
    error = F.mse_loss(fit.model.decode(tokens), images).item()
    assert scores["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert scores["codes_used"] == len(tokens.unique()) / 16
    logits = fit.model.logits(images)
    beside = kl_to_uniform(logits) if name == "dvae_small" else -logits.amax(1)
    assert scores[BESIDE[name]] == pytest.approx(beside.mean().item(), rel=1e-4)
    errors = fit.model.errors(fit.model.draw(fit.model.look_up(tokens)), images)
    assert scores["reconstruction"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert score(fit.model, held, fit.compute) == pytest.approx({key: scores[key] for key in list(scores)[:3]})


def test_perplexity_counts_codes_in_even_use() -> None:
    images = torch.rand(1, 3, 4, 4)
    for codes in (1, 2, 4):
        tally = Tally(8)
        tally.add(torch.arange(8).reshape(1, 2, 4) % codes, images, images)
        assert tally.scores() == pytest.approx({"psnr": math.inf, "codes_used": codes / 8, "perplexity": codes})
    tally.add(torch.zeros(1, 2, 4, dtype=torch.int64), images + 0.1, images)
    assert tally.scores()["psnr"] == pytest.approx(-10 * math.log10(0.01 / 2), rel=1e-4)


def test_a_palette_is_scored_too(pack: Pack) -> None:
    palette = Palette(3, codes=32)
    palette.fit(np.asarray(pack.split("train").images), seed=0)
    scores = score(palette, pack.split("validation"), choose("cpu", "fp32"))
    assert scores["psnr"] > 25
    assert scores["perplexity"] > 8


def test_a_collapsed_codebook_is_told_with_what_to_do() -> None:
    scores = {"perplexity": 3.25, "codes_used": 0.05}
    assert collapse(scores, 3.0, "") is None
    complaint = collapse(scores, 64, SmallDVAE.advice)
    assert complaint is not None
    assert complaint.startswith("perplexity: found 3.2, with 5.0% of the codes used")
    for word in ("least_perplexity 64", "kl_weight", "temperature", "codes", "optim.lr", "optim.epochs"):
        assert word in complaint
    assert collapse({"perplexity": math.nan, "codes_used": 0.0}, 2.0, "") is not None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_advice_on_a_collapse_names_keys_that_a_row_of_the_tokenizer_takes(name: str) -> None:
    advice = TOKENIZERS[name].advice  # type: ignore[attr-defined]
    row = {"data": "tiny", "tokenizer": name, "least_perplexity": 2.0}
    if name != "palette":
        row["optim"] = {"lr": 1.0e-3, "batch": 16, "epochs": 1}
    known = check(TargetRow, row, "row").model_dump()
    keys = {*known, *known["tokenizer"], *(known["optim"] or {})}
    named = {word.strip(",:").removeprefix("optim.") for word in advice.split() if "_" in word or "optim." in word}
    assert named
    assert named <= keys
    assert ({"kl_weight", "temperature"} <= set(advice.replace(",", "").split())) == (name in ("dvae", "dvae_small"))


def test_a_fetch_gives_the_images_addressed_and_pickles(pack: Pack) -> None:
    split = pack.split("train")
    batch = ImageFetch(split, None, 0)([(0, 5), (3, 2)])
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.stack([split.tensor(5), split.tensor(2)]))
    augmented = ImageFetch(split, Augment(), 0)
    copy = pickle.loads(pickle.dumps(augmented))
    assert torch.equal(augmented([(1, 5)]), copy([(1, 5)]))
    assert not torch.equal(augmented([(1, 5)]), augmented([(2, 5)]))


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 3), (9, 5)])
def test_the_picture_holds_images_beside_their_reconstructions(count: int, channels: int, tmp_path: Path) -> None:
    images = torch.rand(count, channels, 8, 8)
    sheet = picture(images, images.flip(-1), "Reconstructions", "A note.", tile=16, across=3)
    sheet.save(tmp_path / "sheet.png")
    columns = min(3, count)
    assert sheet.height == 34 + 20 + -(-count // 3) * (16 + 20) + 26
    assert sheet.width >= columns * (2 * 20 + 16) + 8
    shown = images[0, :3] if channels >= 3 else images[0, :1].expand(3, -1, -1)
    first = [sheet.getpixel((10 + left, 54)) for left in (0, 20)]
    assert first[0] == pytest.approx((shown[:, 0, 0] * 255).round().tolist())
    assert first[1] == pytest.approx((shown[:, 0, -1] * 255).round().tolist())
