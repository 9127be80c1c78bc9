"""Tokenizers: the contract over the table, published weights and numbers, the likelihood, quantiser and palette."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

from mim_core.tokenizers import TOKENIZERS
from mim_core.tokenizers import palette as palette_module
from mim_core.tokenizers.dalle import DALLE, Block, logit_laplace, map_pixels, unmap_pixels
from mim_core.tokenizers.palette import Palette
from mim_core.tokenizers.quantizer import Quantizer
from mim_core.tokenizers.small import SmallDVAE, SmallVQ

PARITY = Path(__file__).parent / "parity"
SMALL: dict[str, dict[str, Any]] = {
    "dvae": {"codes": 12, "base": 8, "blocks": 1},
    "dvae_small": {"codes": 12, "layers": 2, "width": 8, "code_width": 6},
    "vq_small": {"codes": 12, "layers": 2, "width": 8, "code_width": 6},
    "palette": {"codes": 12},
}
AUTOENCODERS = [name for name in TOKENIZERS if name != "palette"]
VAES = [name for name in AUTOENCODERS if name != "vq_small"]


def small(name: str, channels: int = 3, **params: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name](channels, **SMALL[name] | params)
    if name == "palette":
        tokenizer.colours.uniform_()
    return tokenizer.eval()


def weights(case: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): torch.tensor(case[key]).float() for key in case if key.startswith(prefix)}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_the_likeliest_codes_and_decode_to_pictures(name: str, channels: int) -> None:
    tokenizer = small(name, channels)
    images = torch.rand(2, channels, 16, 24)
    shape = (16 // tokenizer.stride, 24 // tokenizer.stride)
    logits, tokens = tokenizer.logits(images), tokenizer.tokens(images)
    assert logits.shape == (2, tokenizer.codes, *shape)
    assert tokens.shape == (2, *shape)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(1))
    pictures = tokenizer.decode(tokens)
    assert pictures.shape == images.shape
    assert not pictures.requires_grad
    assert 0 <= pictures.min() <= pictures.max() <= 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_weights_are_all_that_a_tokenizer_is(name: str) -> None:
    tokenizer, other = small(name), TOKENIZERS[name](3, **SMALL[name])
    other.load_state_dict(tokenizer.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(other.eval().tokens(images), tokenizer.tokens(images))


@pytest.mark.parametrize("name", VAES)
def test_decoding_tokens_is_reconstructing_their_one_hot(name: str) -> None:
    tokenizer = small(name)
    tokens = torch.randint(12, (2, 2, 3))
    one_hot = F.one_hot(tokens, 12).movedim(-1, 1).float()
    expected = tokenizer.pictures(tokenizer.reconstruct(one_hot))
    torch.testing.assert_close(tokenizer.decode(tokens), expected)


@pytest.mark.parametrize("name", VAES)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    tokenizer = small(name)
    images = torch.rand(2, 3, 16, 16)
    maps = tokenizer.reconstruct(tokenizer.logits(images).softmax(1))
    tokenizer.errors(maps, images).mean().backward()
    for key, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_logits_are_made_in_fp32_under_autocast(name: str) -> None:
    tokenizer = small(name)
    images = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = tokenizer.logits(images)
    assert logits.dtype == torch.float32
    # The last convolution's own rounding is absent: its output takes values that bf16 has not.
    assert (logits.bfloat16().float() != logits).any()


def test_dalles_published_encoder_comes_out_of_ours() -> None:
    case = np.load(PARITY / "dalle_encoder_nhid16_blk1_v64.npz")
    tokenizer = DALLE(3, codes=64, base=16, blocks=1)
    published = weights(case, "enc/")
    renamed = {f"{key[:-2]}{'.weight' if key.endswith('.w') else '.bias'}": value for key, value in published.items()}
    tokenizer.encoder.load_state_dict(renamed)
    images = torch.tensor(case["x01"]).float()
    np.testing.assert_allclose(map_pixels(images), case["x_mapped"], atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(tokenizer.logits(images), case["logits"], atol=1e-4)
    np.testing.assert_array_equal(tokenizer.tokens(images), case["tokens"])


def test_the_large_tokenizer_has_the_published_size() -> None:
    with torch.device("meta"):
        tokenizer = DALLE(3)
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    assert shapes["encoder.blocks.input.weight"] == (256, 3, 7, 7)
    assert shapes["encoder.blocks.group_4.block_1.id_path.weight"] == (2048, 1024, 1, 1)
    assert shapes["encoder.blocks.group_4.block_2.res_path.conv_4.weight"] == (2048, 512, 1, 1)
    assert shapes["encoder.blocks.output.conv.weight"] == (8192, 2048, 1, 1)
    assert shapes["decoder.blocks.input.weight"] == (128, 8192, 1, 1)
    assert shapes["decoder.blocks.group_1.block_1.res_path.conv_1.weight"] == (512, 128, 1, 1)
    assert shapes["decoder.blocks.group_1.block_1.res_path.conv_4.weight"] == (2048, 512, 3, 3)
    assert shapes["decoder.blocks.output.conv.weight"] == (6, 256, 1, 1)
    assert {module.gain for module in tokenizer.modules() if isinstance(module, Block)} == {1 / 64}


def test_the_large_tokenizers_convolutions_start_at_the_published_scale() -> None:
    torch.manual_seed(0)
    tokenizer = DALLE(3, codes=64, base=32, blocks=1)
    for name, module in tokenizer.named_modules():
        if isinstance(module, nn.Conv2d):
            count, fan_in = module.weight.numel(), module.weight[0].numel()
            spread = 5 / math.sqrt(2 * count)
            assert module.weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=spread), name
            assert module.bias is not None
            assert not module.bias.any()


def published_small() -> tuple[Any, SmallDVAE]:
    case = np.load(PARITY / "dvae_lucidrains_style_loss.npz")
    tokenizer = SmallDVAE(3, codes=32, layers=3, width=8, code_width=16, likelihood="l2")
    tokenizer.load_state_dict(weights(case, "sd/"))
    return case, tokenizer


@torch.no_grad()
def test_the_small_published_tokenizer_comes_out_of_ours() -> None:
    case, tokenizer = published_small()
    # The case's inputs are normalised already, with mean and deviation 0.5.
    images = torch.tensor(case["x"]).float() / 2 + 0.5
    logits = tokenizer.logits(images)
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)
    np.testing.assert_array_equal(tokenizer.tokens(images), case["tokens"])
    soft = ((logits + torch.tensor(case["gumbel_noise"])) / 0.9).softmax(1)
    maps = tokenizer.reconstruct(soft)
    np.testing.assert_allclose(maps, case["recon"], atol=1e-4)
    assert tokenizer.errors(maps, images).mean().item() == pytest.approx(float(case["recon_mse"]), abs=1e-5)


def test_the_likelihood_decides_the_decoders_maps() -> None:
    codes = torch.zeros(1, 12, 4, 4)
    assert small("dvae_small").reconstruct(codes).shape == (1, 6, 16, 16)
    assert small("dvae_small", likelihood="l2").reconstruct(codes).shape == (1, 3, 16, 16)
    assert small("dvae").reconstruct(codes).shape == (1, 6, 32, 32)
    assert small("vq_small").draw(codes[:, :6]).shape == (1, 6, 16, 16)
    assert small("vq_small", likelihood="l2").draw(codes[:, :6]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["dvae_small", "vq_small"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("blocks", [0, 2])
def test_layers_of_a_small_tokenizer_give_its_stride(name: str, layers: int, blocks: int) -> None:
    tokenizer = small(name, layers=layers, blocks=blocks)
    assert tokenizer.tokens(torch.rand(1, 3, 16, 16)).shape == (1, 16 // 2**layers, 16 // 2**layers)


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("likelihood", ["laplace", "l2"])
def test_true_maps_have_the_least_error_and_draw_the_picture(name: str, likelihood: str) -> None:
    tokenizer = small(name)
    tokenizer.likelihood = likelihood
    images = torch.rand(1, 3, 4, 4) * 0.9 + 0.05
    scales = torch.zeros_like(images)
    true = torch.cat([torch.logit(map_pixels(images)), scales], 1) if likelihood == "laplace" else 2 * images - 1
    torch.testing.assert_close(tokenizer.pictures(true), images)
    for change in (-0.3, 0.3):
        moved = true.clone()
        moved[:, :3] += change
        assert (tokenizer.errors(moved, images) > tokenizer.errors(true, images)).all()


def test_mapped_pixels_stay_clear_of_the_ends_and_map_back() -> None:
    images = torch.linspace(0, 1, 11)
    mapped = map_pixels(images)
    assert (mapped.min().item(), mapped.max().item()) == pytest.approx((0.1, 0.9))
    torch.testing.assert_close(unmap_pixels(mapped), images)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.5)])
def test_the_logit_laplace_is_a_density_on_the_unit_interval(mean: float, log_scale: float) -> None:
    def density(x: float) -> float:
        maps = torch.tensor([mean, log_scale], dtype=torch.float64).view(1, 2, 1, 1)
        return math.exp(-logit_laplace(maps, torch.full((1, 1, 1, 1), x, dtype=torch.float64)).item())

    peak = 1 / (1 + math.exp(-mean))
    # The logarithm of x(1 - x) is what a change of variable from the real line to (0, 1) adds.
    for x in (0.1, 0.37, 0.9):
        expected = stats.laplace.pdf(math.log(x / (1 - x)), mean, math.exp(log_scale)) / (x * (1 - x))
        assert density(x) == pytest.approx(expected)
    total, _ = integrate.quad(density, 1e-9, 1 - 1e-9, points=[peak], limit=200)
    assert total == pytest.approx(1, abs=1e-3)


def around(directions: torch.Tensor, times: int) -> torch.Tensor:
    """Vectors [1, d, times, k] of any length, a few degrees about k directions."""
    near = directions + 0.05 * torch.randn(times, *directions.shape)
    return (near * torch.rand(times, len(directions), 1).add(0.5)).permute(2, 0, 1)[None]


def test_the_quantised_and_the_variational_small_tokenizer_have_the_same_halves() -> None:
    shapes = []
    for name in ("dvae_small", "vq_small"):
        state = small(name, code_width=12).state_dict()  # so that both encoders end in 12 maps
        shapes.append({key: one.shape for key, one in state.items() if key.startswith(("encoder.", "decoder."))})
    assert shapes[0] == shapes[1]


def test_the_quantised_tokenizers_logits_are_distances_on_the_sphere() -> None:
    tokenizer = small("vq_small")
    images = torch.rand(2, 3, 16, 16)
    vectors, logits = tokenizer.encode(images), tokenizer.logits(images)
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    far = torch.cdist(directions.movedim(1, -1).reshape(-1, 6), tokenizer.quantizer.codebook) ** 2
    torch.testing.assert_close(logits.movedim(1, -1).reshape(-1, 12), -far, atol=1e-5, rtol=1e-5)
    nearest = tokenizer.look_up(tokenizer.tokens(images))
    assert torch.equal(tokenizer.decode(tokenizer.tokens(images)), tokenizer.pictures(tokenizer.draw(nearest)))


def test_a_gradient_goes_straight_through_the_quantiser_to_the_encoder() -> None:
    tokenizer = small("vq_small").train()
    images = torch.rand(2, 3, 16, 16)
    found = tokenizer.quantise(images)
    tokenizer.errors(tokenizer.draw(found.vectors), images).mean().backward()
    for key, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    quantizer, vectors = Quantizer(12, 6), torch.randn(1, 6, 3, 4, requires_grad=True)
    weight = torch.randn(1, 6, 3, 4)
    (quantizer(vectors).vectors * weight).sum().backward()
    straight, vectors.grad = vectors.grad, None
    (F.normalize(vectors, dim=1) * weight).sum().backward()
    assert straight is not None
    torch.testing.assert_close(straight, vectors.grad)


def test_quantised_vectors_are_the_codes_of_before_and_the_loss_is_their_squared_error() -> None:
    torch.manual_seed(0)
    quantizer, vectors = Quantizer(12, 6, commitment=0.25), torch.randn(2, 6, 3, 4)
    quantizer(vectors)
    before = quantizer.codebook.clone()
    found = quantizer(vectors)
    codes = before[found.tokens].movedim(-1, 1)
    torch.testing.assert_close(found.vectors, codes)
    assert found.loss.item() == pytest.approx(0.25 * F.mse_loss(F.normalize(vectors, dim=1), codes).item())
    assert not torch.equal(quantizer.codebook, before)


def test_the_first_batch_starts_the_codes_at_its_clusters() -> None:
    torch.manual_seed(1)
    directions = F.normalize(torch.randn(5, 16), dim=1)
    quantizer = Quantizer(40, 16)
    quantizer(around(directions, 30))
    # More codes than clusters, so that k-means leaves none of these out, from wherever it begins.
    assert (directions @ quantizer.codebook.T).amax(1).min() > 0.95
    assert (directions @ quantizer.codebook.T).amax(0).min() > 0.9
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(40))
    assert quantizer.usage.sum().item() == pytest.approx(150)
    assert quantizer.started


def test_fewer_vectors_than_codes_start_them_too() -> None:
    quantizer = Quantizer(40, 6)
    vectors = torch.randn(1, 6, 2, 3)
    found = quantizer(vectors)
    torch.testing.assert_close(found.vectors, F.normalize(vectors, dim=1), atol=1e-3, rtol=0)
    assert len(found.tokens.unique()) > 1


def test_codes_move_by_the_decay_to_the_mean_of_their_vectors_and_the_unused_stay() -> None:
    quantizer = Quantizer(3, 2, decay=0.75)
    quantizer.codebook.copy_(torch.eye(3, 2))
    quantizer.codebook[2] = torch.tensor([-0.6, -0.8])
    quantizer.started.fill_(True)
    unused = quantizer.codebook[2].clone()
    # Lengths do not count: both vectors of the first code have the length 1 in its mean.
    tokens = quantizer(torch.tensor([[[[0.9, 5.0, 0.0]], [[0.0, 3.0, 0.1]]]])).tokens
    assert tokens.tolist() == [[[0, 0, 1]]]
    mean = F.normalize(torch.tensor([1.0, 0.0]) + torch.tensor([5.0, 3.0]) / math.sqrt(34), dim=0)
    expected = F.normalize(0.75 * torch.tensor([1.0, 0.0]) + 0.25 * mean, dim=0)
    torch.testing.assert_close(quantizer.codebook[0], expected)
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([0.0, 1.0]))
    assert torch.equal(quantizer.codebook[2], unused)
    torch.testing.assert_close(quantizer.usage, torch.tensor([0.5, 0.25, 0.0]))


@pytest.mark.parametrize("restart", [0.0, 0.1])
def test_an_idle_code_begins_again_at_a_vector_of_the_batch(restart: float) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(4, 6, decay=0.5, restart=restart)
    quantizer.started.fill_(True)
    quantizer.codebook.copy_(F.normalize(torch.tensor([[1.0] * 6, [-1.0] * 6, [1.0, -1] * 3, [-1.0, 1] * 3]), dim=1))
    quantizer.usage.copy_(torch.tensor([0.0, 1.0, 0.3, 0.15]))
    before = quantizer.codebook.clone()
    # All near the first code: the second and the third are idle, not for long enough yet, and the last for too long.
    vectors = torch.rand(2, 6, 3, 1) + 0.5
    tokens = quantizer(vectors).tokens
    assert not tokens.any()
    assert torch.equal(quantizer.codebook[1:3], before[1:3])
    torch.testing.assert_close(quantizer.usage, torch.tensor([3.0, 0.5, 0.15, max(0.075, restart)]))
    directions = F.normalize(vectors, dim=1).movedim(1, -1).reshape(-1, 6)
    found = (directions - quantizer.codebook[3]).norm(dim=1).min().item() < 1e-6
    assert found == (restart > 0)
    assert torch.equal(quantizer.codebook[3], before[3]) == (restart == 0)


def test_evaluation_changes_no_code() -> None:
    tokenizer = small("vq_small").train()
    tokenizer.quantise(torch.rand(2, 3, 16, 16))
    before = {key: one.clone() for key, one in tokenizer.state_dict().items()}
    tokenizer.eval()
    tokenizer.quantise(torch.rand(2, 3, 16, 16))
    tokenizer.tokens(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(one, before[key]) for key, one in tokenizer.state_dict().items())


def test_all_that_a_quantiser_learns_by_moving_averages_is_in_its_state() -> None:
    images = torch.rand(3, 2, 3, 16, 16)
    one, other = SmallVQ(3, **SMALL["vq_small"]), SmallVQ(3, **SMALL["vq_small"])
    one.quantise(images[0])
    other.load_state_dict(one.state_dict())
    for batch in images[1:]:
        first, second = one.quantise(batch), other.quantise(batch)
        assert torch.equal(first.tokens, second.tokens)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_quantising_keeps_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    quantizer, vectors = Quantizer(12, 6), torch.randn(1, 6, 3, 4)
    quantizer(vectors)
    copy = Quantizer(12, 6)
    copy.load_state_dict(quantizer.state_dict())
    plain = quantizer(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        found = copy(vectors)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert torch.equal(copy.codebook, quantizer.codebook)


def colours(count: int, seed: int = 0) -> np.ndarray:
    """Images whose pixels take `count` distinct colours."""
    rng = np.random.default_rng(seed)
    distinct = np.unique(rng.integers(0, 256, (4 * count, 3), dtype=np.uint8), axis=0)
    chosen = distinct[rng.permutation(len(distinct))[:count]]
    pixels = np.concatenate([chosen, chosen[rng.integers(count, size=2 * 16 * 16 - count)]])
    return pixels.reshape(2, 16, 16, 3).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_the_nearest_colour_is_that_of_exhaustive_search(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palette_module, "CHUNK", chunk)
    palette = small("palette")
    pixels = torch.rand(2, 5, 7, 3)
    exhaustive = ((pixels[..., None, :] - palette.colours).double() ** 2).sum(-1).argmin(-1)
    assert torch.equal(palette.nearest(pixels), exhaustive)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(palette.nearest(pixels), exhaustive)


def test_a_colour_of_the_palette_is_its_own_code() -> None:
    palette = small("palette")
    assert palette.nearest(palette.colours).tolist() == list(range(12))
    torch.testing.assert_close(palette.decode(palette.tokens(small_picture(palette))), small_picture(palette))


def small_picture(palette: Palette) -> torch.Tensor:
    return palette.colours.reshape(1, 3, 4, 3).movedim(-1, 1)


def test_as_many_codes_as_colours_give_the_image_back() -> None:
    images = colours(12)
    palette = Palette(3, codes=12)
    palette.fit(images, seed=0)
    pictures = torch.from_numpy(images) / 255
    torch.testing.assert_close(palette.decode(palette.tokens(pictures)), pictures)


def test_a_fitted_palette_depends_on_the_seed_alone_and_beats_random_colours() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    fitted = []
    for seed in (0, 0, 1):
        fitted.append(Palette(3, codes=16))
        fitted[-1].fit(images, seed)
    assert torch.equal(fitted[0].colours, fitted[1].colours)
    assert not torch.equal(fitted[0].colours, fitted[2].colours)
    assert 0 <= fitted[0].colours.min() <= fitted[0].colours.max() <= 1
    pictures = torch.from_numpy(images) / 255
    errors = [((one.decode(one.tokens(pictures)) - pictures) ** 2).mean() for one in (fitted[0], small("palette"))]
    assert errors[0] < 0.7 * errors[1]


def test_a_palette_of_many_images_is_found_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palette_module, "IMAGES", 2)
    monkeypatch.setattr(palette_module, "PIXELS", 100)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    palette = Palette(1, codes=4)
    palette.fit(images, seed=0)
    assert len(palette.colours.unique()) == 4


def test_fewer_colours_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes: found 13; .* hold 12 distinct colours.*; lower it to 12"):
        Palette(3, codes=13).fit(colours(12), seed=0)
