"""How a ViT's parameters start: timm's way, MAE's, and that of BEiT and SimMIM's ViT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mim_core.encoders.vit import ViT
from mim_core.positions import sincos

SMALL: dict[str, Any] = {"patch_px": 8, "width": 32, "depth": 2, "heads": 4}
PLAIN, RELATIVE = ("learned", "sincos"), ("relative", "relative_per_block")
FORMS = PLAIN + RELATIVE


@pytest.mark.parametrize("positions", FORMS)
def test_layer_scale_starts_at_its_value(positions: str) -> None:
    names = ("gamma_1", "gamma_2") if positions in RELATIVE else ("ls1.gamma", "ls2.gamma")
    for layer_scale in (1e-5, 0.1):
        encoder = ViT((16, 16), 3, **SMALL, positions=positions, layer_scale=layer_scale)
        for block in encoder.backbone.blocks:
            for name in names:
                assert torch.equal(block.get_parameter(name), torch.full((32,), layer_scale))
    without = ViT((16, 16), 3, **SMALL, positions=positions)
    assert not any("gamma" in name for name, _ in without.named_parameters())


@pytest.mark.parametrize("positions", RELATIVE)
def test_relative_forms_start_as_published(positions: str) -> None:
    torch.manual_seed(0)
    encoder = ViT((32, 32), 3, patch_px=8, width=64, depth=3, heads=4, positions=positions, layer_scale=0.1)
    # A normal cut at one deviation deviates by this share of it.
    cut = math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
    seen = set()
    for name, parameter in encoder.backbone.named_parameters():
        scale = 1.0
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            scale = 1 / math.sqrt(2 * (int(name.split(".")[1]) + 1))
            seen.add(round(scale, 4))
        if name == "cls_token" or (parameter.ndim > 1 and name.endswith("weight")):
            assert parameter.abs().max() <= 0.02 * scale + 1e-8, name
            assert parameter.abs().max() > 0.0195 * scale or name == "cls_token", name
            spread = 0.15 if name == "cls_token" else 0.04
            assert parameter.std().item() == pytest.approx(0.02 * cut * scale, rel=spread), name
        elif name.endswith(("bias", "bias_table")):
            assert not parameter.any(), name
        else:
            assert (parameter == (0.1 if "gamma" in name else 1)).all(), name
    assert seen == {0.7071, 0.5, 0.4082}
    assert not encoder.backbone.blocks[0].attn.k_bias.any()
    assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    tables = [name for name, _ in encoder.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == (1 if positions == "relative" else 3)
    assert encoder.get_parameter(tables[0]).shape == (7 * 7 + 3, 4)


def test_xavier_init_is_maes() -> None:
    torch.manual_seed(0)
    encoder = ViT((32, 32), 3, patch_px=8, width=64, depth=2, heads=4, positions="sincos", init="xavier")
    for name, parameter in encoder.backbone.named_parameters():
        if parameter.ndim > 1 and name.endswith("weight"):
            # The patch embedding counts as linear; queries, keys and values as one layer.
            bound = math.sqrt(6 / (parameter.shape[0] + parameter[0].numel()))
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04), name
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not parameter.any(), name
    assert encoder.backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    np.testing.assert_allclose(encoder.backbone.pos_embed[0, 1:], sincos(encoder.grid, 64), atol=1e-6)


@pytest.mark.parametrize("positions", PLAIN)
def test_plain_forms_start_as_timms(positions: str) -> None:
    torch.manual_seed(0)
    encoder = ViT((32, 32), 3, **SMALL, positions=positions)
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer((32, 32), 8, 3, 0, "token", 32, 2, 4)
    for name, parameter in theirs.named_parameters():
        if name != "pos_embed" or positions == "learned":
            assert torch.equal(encoder.backbone.get_parameter(name), parameter), name


@pytest.mark.parametrize("positions", FORMS)
def test_drop_path_grows_to_the_last_block(positions: str) -> None:
    blocks = ViT((16, 16), 3, **SMALL | {"depth": 3}, positions=positions, drop_path=0.2).backbone.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
