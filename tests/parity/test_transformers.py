"""Models of the `transformers` package, with random weights, and ours with the same weights give the same numbers.

Their names are first put back into those of the published code, so that the importer is under test too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from mim_core.grid import Grid, unpatchify
from mim_core.positions import sincos
from mim_core.published import convert, model, tokenizer

COMMON = {
    r"patch_embeddings\.projection": "patch_embed.proj",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.o_proj": "attn.proj",
    r"(attention\.)?relative_position_bias\.": "attn.",
}


def shaken(module: Any) -> Any:
    """Give every trained weight a random value, so that none is a zero that hides a mistake."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return module.eval()


def published(state: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename tensors, and join queries, keys and values as the published code has them."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, new in {**renames, **COMMON}.items():
            name = re.sub(pattern, new, name)
        out[name] = tensor
    joined = re.compile(r"(.*)attention\.q_proj\.weight")
    for block in [match[1] for name in list(out) if (match := joined.match(name))]:
        parts = {key: out.pop(f"{block}attention.{key}_proj.weight") for key in "qkv"}
        biases = {key: out.pop(f"{block}attention.{key}_proj.bias", None) for key in "qkv"}
        out[f"{block}attn.qkv.weight"] = torch.cat(list(parts.values()))
        if biases["k"] is None:
            out |= {f"{block}attn.{key}_bias": biases[key] for key in "qv"}
        else:
            out[f"{block}attn.qkv.bias"] = torch.cat([biases[key] for key in "qkv"])
    return out


def batch(patches: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Two images and their masks, which hide another number of patches each."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(2, patches, generator=generator) < torch.tensor([[0.4], [0.7]])
    return torch.randn(2, 3, side, side, generator=generator), hidden


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_swin_for_masked_image_modelling() -> None:
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
        encoder_stride=4,
    )  # fmt: skip
    theirs = shaken(SwinForMaskedImageModeling(config))
    renames = {r"^swin\.embeddings\.norm": "swin.patch_embed.norm", r"^swin\.embeddings\.": "swin."}
    renames |= {r"^swin\.encoder\.": "swin.", r"^swin\.layernorm": "swin.norm", r"^swin\.": "encoder."}
    imported = convert(published(theirs.state_dict(), renames), size=(32, 32))
    ours = model(imported)
    images, hidden = batch(256)
    values = ours(images, hidden, hidden.new_ones(2, 64)).reshape(2, 64, -1)
    assert_close(unpatchify(values, (8, 8), 4), theirs(images, bool_masked_pos=hidden).reconstruction)


@torch.no_grad()
@pytest.mark.parametrize("decoder_heads", [2, 4])
def test_vit_mae_for_pretraining(decoder_heads: int) -> None:
    config = ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=32, mask_ratio=0.75, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = shaken(ViTMAEForPreTraining(config))
    # Published weights bring the tables of positions; without them this package has zeros.
    for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
        table[0, 1:] = torch.from_numpy(sincos(Grid(32, 32, 8), table.shape[-1]))
    renames = {r"^vit\.embeddings\.position_embeddings": "pos_embed", r"^vit\.embeddings\.": ""}
    renames |= {r"^vit\.layers": "blocks", r"^vit\.layernorm\.": "norm.", r"^decoder\.decoder_layers": "decoder_blocks"}
    renames |= {r"^decoder\.": ""}
    imported = convert(published(theirs.state_dict(), renames), heads=4, decoder_heads=decoder_heads)
    assert imported.pieces.encoder is not None
    assert imported.pieces.encoder.params()["positions"] == "sincos"
    ours = model(imported)
    images, _ = batch(16)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    out = theirs(images, noise=noise)
    hidden = out.mask.bool()
    values = ours(images, hidden, torch.ones_like(hidden)).reshape(2, 16, 3, 8, 8)
    assert_close(values.permute(0, 1, 3, 4, 2).flatten(2), out.logits)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_beit_for_masked_image_modelling(shared: bool) -> None:
    config = BeitConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=16, use_shared_relative_position_bias=shared, use_relative_position_bias=not shared,
        use_mask_token=True, layer_scale_init_value=0.1, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = shaken(BeitForMaskedImageModeling(config))
    renames = {r"^beit\.embeddings\.": "", r"^beit\.shared_position_bias": "rel_pos_bias", r"^beit\.layers": "blocks"}
    renames |= {r"lambda_": "gamma_", r"^layernorm": "norm"}
    ours = model(convert(published(theirs.state_dict(), renames)))
    images, hidden = batch(16)
    logits = theirs(images, bool_masked_pos=hidden).logits
    assert_close(ours(images, hidden, hidden), logits[hidden])


@torch.no_grad()
def test_flava_image_codebook_is_dalles_encoder() -> None:
    config: Any = FlavaImageCodebookConfig(
        num_groups=4, input_channels=3, num_blocks_per_group=2, hidden_size=8, vocab_size=16, freeze=False
    )
    theirs = shaken(FlavaImageCodebook(config))
    state = {re.sub(r"\.(group|path)\.", ".", name): tensor for name, tensor in theirs.state_dict().items()}
    ours = tokenizer(convert(state))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mapped = 0.8 * images + 0.1
    assert_close(ours.logits(images), theirs(mapped))
    assert torch.equal(ours.tokens(images), theirs.get_codebook_indices(mapped))
