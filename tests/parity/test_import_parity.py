"""Published weights, brought under our names, give what the published implementations computed.

Each case goes through the importer, then through the encoder, head, loss and gradients of this project; tolerances are
those that came with the numbers: 1e-5 of a loss and 1e-4 of features in fp32, 1e-9 of a loss in float64.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_core.adversarial import Critic
from mim_core.fit_target import kl_to_uniform
from mim_core.grid import Entries, Grid, patchify, unpatchify
from mim_core.losses import LOSSES
from mim_core.masks import MASKS
from mim_core.pretext import MaskedModel, Pretext, Scope
from mim_core.published import Imported, convert, model, tokenizer
from mim_core.targets import TARGETS
from mim_core.tokenizers.dalle import map_pixels
from mim_core.tokenizers.quantizer import Quantizer

HINTS: dict[str, dict[str, Any]] = {
    "simmim_vit_sharedrpb": {},
    "simmim_swin_2stage_shift": {"size": (64, 64)},
    "beit_mim_sharedrpb_ls0.1": {},
    "mae_pix": {"heads": 3, "decoder_heads": 2},
    "dalle_encoder_nhid16_blk1_v64": {},
    "dvae_lucidrains_style_loss": {},
    "context_encoder_center128": {},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])


@cache
def case(name: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return {key: tensor.float() if tensor.dtype is torch.float16 else tensor for key, tensor in tensors.items()}


def weights(name: str, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in case(name).items() if key.startswith(prefix)}


def imported(name: str, prefix: str = "sd/") -> Imported:
    return convert(weights(name, prefix), **HINTS[name])


def loss_of(found: MaskedModel, target: Any, loss: str, images: Tensor, hidden: Tensor, entries: Tensor) -> Tensor:
    """The project's own objective over the hidden part, as it trains."""
    pretext = Pretext(found, target, LOSSES[loss], Scope(), None, None)  # type: ignore[arg-type]
    wanted, weight = pretext.wanted(hidden)
    prediction = found(images, hidden, wanted)
    return pretext.mean_loss(prediction, entries[wanted], None if weight is None else weight[wanted])


def assert_loss(loss: Tensor, expected: Tensor) -> None:
    tolerance = 1e-9 if loss.dtype is torch.float64 else 1e-5 * max(1.0, abs(expected.item()))
    assert abs(loss.item() - expected.item()) <= tolerance


def assert_gradients(found: MaskedModel, name: str, published: dict[str, str]) -> None:
    """`published`: our parameter by the published name."""
    squares = [parameter.grad.double().square().sum() for parameter in found.parameters() if parameter.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()
    assert norm == pytest.approx(case(name)["grad_norm"].item(), rel=1e-4)
    for theirs, ours in published.items():
        gradient = found.get_parameter(ours).grad
        assert gradient is not None
        torch.testing.assert_close(gradient.float(), case(name)[f"grad/{theirs}"], atol=1e-6, rtol=1e-4)


@DTYPES
@pytest.mark.parametrize("name", ["simmim_vit_sharedrpb", "simmim_swin_2stage_shift"])
def test_simmims_features_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    found, arrays = model(imported(name)).to(dtype), case(name)
    images, hidden = arrays["x"].to(dtype), arrays["mask"].flatten(1).bool()
    features, _, _ = found.encode(images, hidden)
    maps = features.transpose(1, 2).unflatten(2, found.encoder.output.shape)
    torch.testing.assert_close(maps.float(), arrays["z"], atol=1e-4, rtol=0)
    target = TARGETS["pixels"](found.encoder.output, (0.5,) * 3, (0.5,) * 3)
    loss = loss_of(found, target, "l1", images, hidden, target(images))
    # The published divisor is the number of hidden pixels and 1e-5 more.
    pixels = found.encoder.grid.pixels(hidden).sum()
    published = loss * pixels / (pixels + 1e-5)
    assert_loss(published, arrays["loss"])
    if dtype is torch.float32:
        assert_loss(published, arrays["loss_fp32"])
    loss.backward()
    assert_gradients(found, name, {"encoder.mask_token": "fill.token"})


def test_simmims_reconstruction_is_in_the_order_of_its_pixel_shuffle() -> None:
    found, arrays = model(imported("simmim_vit_sharedrpb")), case("simmim_vit_sharedrpb")
    hidden = arrays["mask"].flatten(1).bool()
    values = found(arrays["x"], hidden, torch.ones_like(hidden)).reshape(2, 16, -1)
    picture = unpatchify(values, (4, 4), 16)
    torch.testing.assert_close(picture[0, :, :16, :16], arrays["rec_patch0"], atol=1e-4, rtol=0)
    assert picture.mean().item() == pytest.approx(arrays["rec_mean"].item(), abs=1e-6)


@DTYPES
def test_beits_logits_loss_and_gradients(dtype: torch.dtype) -> None:
    name = "beit_mim_sharedrpb_ls0.1"
    found, arrays = model(imported(name)).to(dtype), case(name)
    images, hidden = arrays["x"].to(dtype), arrays["mask"].bool()
    torch.testing.assert_close(found(images, hidden, hidden).float(), arrays["logits_masked"], atol=1e-4, rtol=0)

    class Target:
        entries = Entries(1, 1, 64)

    loss = loss_of(found, Target(), "cross_entropy", images, hidden, arrays["labels"][..., None])
    assert_loss(loss, arrays["loss"])
    loss.backward()
    assert_gradients(found, name, {"mask_token": "fill.token", "cls_token": "encoder.backbone.cls_token"})


@DTYPES
def test_maes_prediction_loss_and_gradients(dtype: torch.dtype) -> None:
    name = "mae_pix"
    found, arrays = model(imported(name)).to(dtype), case(name)
    # The case was computed with tables that had been rounded to float16; ours are not part of the weights.
    found.head.positions = arrays["sd/decoder_pos_embed"][0, 1:].to(dtype)
    images, hidden = arrays["x"].to(dtype), arrays["mask"].bool()
    values = found(images, hidden, torch.ones_like(hidden)).reshape(2, 16, 3, 16, 16)
    # Theirs run over (row, column, channel).
    theirs = values.permute(0, 1, 3, 4, 2).reshape(2, 16, -1)
    torch.testing.assert_close(theirs.float(), arrays["pred"], atol=1e-4, rtol=0)
    target = TARGETS["pixels"](found.encoder.output, (0.5,) * 3, (0.5,) * 3)
    loss = loss_of(found, target, "l2", images, hidden, target(images))
    assert_loss(loss, arrays["loss"])
    loss.backward()
    assert_gradients(found, name, {"mask_token": "head.token", "cls_token": "encoder.backbone.cls_token"})


def test_maes_noise_hides_the_patches_of_its_mask() -> None:
    arrays = case("mae_pix")
    kept = arrays["noise"].argsort(1)[:, : int(16 * (1 - 0.75))]
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(hidden, arrays["mask"].bool())
    ours = MASKS["random"](np.random.default_rng(0), Grid(64, 64, 16), ratio=0.75, unit_px=16)
    assert ours.sum() == hidden[0].sum()


def test_dalles_tokens() -> None:
    name = "dalle_encoder_nhid16_blk1_v64"
    found, arrays = tokenizer(imported(name, "enc/")), case(name)
    torch.testing.assert_close(map_pixels(arrays["x01"]), arrays["x_mapped"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.logits(arrays["x01"]), arrays["logits"], atol=1e-4, rtol=0)
    assert torch.equal(found.tokens(arrays["x01"]), arrays["tokens"])


def test_the_small_tokenizers_tokens_and_loss() -> None:
    name = "dvae_lucidrains_style_loss"
    found, arrays = tokenizer(imported(name)).double(), case(name)
    images = (arrays["x"].double() + 1) / 2
    logits = found.encoder(2 * images - 1)
    torch.testing.assert_close(found.float().logits(images.float()), arrays["logits"], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(1), arrays["tokens"])
    soft = ((logits + arrays["gumbel_noise"]) / 0.9).softmax(1)
    found.double()
    maps = found.reconstruct(soft)
    torch.testing.assert_close(maps.float(), arrays["recon"], atol=1e-4, rtol=0)
    error = (maps - arrays["x"]).square().mean()
    assert error.item() == pytest.approx(arrays["recon_mse"].item(), abs=1e-5)
    # As coded, the divergence is a sum over the batch's tokens that nothing divides.
    divergence = kl_to_uniform(logits).sum()
    assert divergence.item() == pytest.approx(arrays["kl_batchmean_as_coded"].item(), rel=1e-5)
    assert (error + 0.1 * divergence).item() == pytest.approx(arrays["loss_kl0p1"].item(), abs=1e-5)


@DTYPES
def test_a_step_of_the_quantiser_and_its_codes(dtype: torch.dtype) -> None:
    arrays = case("beit2_normema_quantizer_step")
    quantizer = Quantizer(16, 8).to(dtype)
    quantizer.codebook.copy_(arrays["codebook_before"])
    quantizer.started.fill_(True)
    vectors = arrays["z"].to(dtype, copy=True).requires_grad_()
    found = quantizer(vectors)
    assert_loss(found.loss, arrays["loss"])
    assert torch.equal(found.tokens.flatten(), arrays["ids"])
    found.loss.backward()
    # All but the loss was kept in fp32.
    for ours, name in ((found.vectors, "z_q"), (quantizer.codebook, "codebook_after")):
        torch.testing.assert_close(ours.float(), arrays[name], atol=1e-7, rtol=0)
    torch.testing.assert_close(quantizer.usage.float(), arrays["cluster_size_after"], atol=1e-8, rtol=0)
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad.float(), arrays["grad_z_from_commit_loss"], atol=1e-9, rtol=1e-6)
    assert vectors.grad.any()


def inpainting() -> tuple[MaskedModel, Tensor, Tensor, Tensor]:
    """The generator in training mode and float64, real holes, recovered holes, and images whose holes are filled."""
    arrays = case("context_encoder_center128")
    found = model(imported("context_encoder_center128", "G/")).double().train()
    images = arrays["x"].double()
    filled = images.clone()
    # The hole is 64 px of 128; a ring of 4 px of it is shown.
    filled[:, :, 36:92, 36:92] = arrays["fill"].view(1, 3, 1, 1)
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[1:3, 1:3] = True
    features, summary = found.encoder.encode(found.encoder.embed(filled))
    values = found.head(features, wanted.flatten().expand(2, -1), None, summary)
    fake = unpatchify(values.reshape(2, 4, -1), (2, 2), 32)
    return found, images[:, :, 32:96, 32:96], fake, filled


def critic() -> Critic:
    found = Critic((64, 64), 3, 2)
    state = {f"layers.{name}": tensor for name, tensor in weights("context_encoder_center128", "D/").items()}
    missing, unexpected = found.load_state_dict(state, strict=False)
    # Training mode makes its own moments, and the case has none.
    assert not unexpected
    assert all("running" in name or "tracked" in name for name in missing)
    return found.double().train()


def test_the_context_encoder_recovers_the_same_holes() -> None:
    arrays = case("context_encoder_center128")
    _, real, fake, filled = inpainting()
    torch.testing.assert_close(filled[0, :, 30:40, 30:40].float(), arrays["ctx_probe"], atol=1e-6, rtol=0)
    torch.testing.assert_close(fake[0, :, ::2, ::2].float(), arrays["fake0"], atol=1e-6, rtol=0)
    error = LOSSES["l2"](patchify(fake, 32), patchify(real, 32)).mean()
    assert error.item() == pytest.approx(arrays["l2"].item(), abs=1e-9)


def test_the_context_encoders_two_players_and_their_gradient() -> None:
    arrays, judge = case("context_encoder_center128"), critic()
    _, real, fake, _ = inpainting()
    # The critic's scores are taken in fp32.
    assert judge.loss(real, fake).item() == pytest.approx(arrays["errD"].item(), abs=1e-6)
    error, fooled = (fake - real).square().mean(), judge.fooled(fake)
    assert fooled.item() == pytest.approx(arrays["adv"].item(), abs=1e-6)
    assert (0.999 * error + 0.001 * fooled).item() == pytest.approx(arrays["errG_reported"].item(), abs=1e-8)
    leaf = fake.detach().requires_grad_()
    ring = torch.full((64, 64), 10.0)
    ring[4:60, 4:60] = 1.0
    loss = 0.999 * ((leaf - real).square() * ring).mean() + 0.001 * judge.fooled(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.norm().item() == pytest.approx(arrays["grad_wrt_fake_norm"].item(), rel=1e-6)
    torch.testing.assert_close(gradient[0, :, :8, :8].float(), arrays["grad_wrt_fake_patch"], atol=1e-9, rtol=1e-5)
