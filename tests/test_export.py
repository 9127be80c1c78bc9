"""Encoders out: timm builds them from the written file, and its features are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from mim_core import checkpoint
from mim_core.encoders import ENCODERS
from mim_core.published import convert, create_call, export_row, read_state, to_timm
from mim_core.published.export import check as check_export
from mim_core.published.imported import Pieces
from mim_core.spec import build, check
from mim_core.tasks.classify import Classifier

VIT = {"name": "vit", "patch_px": 8, "width": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0}
SWIN = {"name": "swin", "patch_px": 4, "width": 16, "depths": [2, 2], "heads": [2, 4], "window": 4}
ENCODERS_OF_TIMM: dict[str, dict[str, Any]] = {
    "learned": VIT,
    "scaled": {**VIT, "layer_scale": 0.1},
    "sincos": {**VIT, "positions": "sincos", "init": "xavier"},
    "relative": {**VIT, "positions": "relative", "layer_scale": 0.1},
    "relative_unscaled": {**VIT, "positions": "relative"},
    "relative_per_block": {**VIT, "positions": "relative_per_block", "layer_scale": 1e-5, "drop_path": 0.1},
    "swin": SWIN,
}
SIZES = {"learned": (32, 48), "swin": (32, 64)}


def written(path: Path, piece: dict[str, Any], size: tuple[int, int] = (32, 32), channels: int = 3) -> Any:
    """Write an encoder with random weights as a run does; gives it."""
    torch.manual_seed(0)
    chosen = check(Pieces, {"encoder": piece}, "row").encoder
    assert chosen is not None
    encoder = build(ENCODERS, chosen, size, channels)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    about = {"encoder": chosen.model_dump(mode="json"), "size": list(size), "channels": channels}
    checkpoint.write_weights(path, encoder.state_dict(), {**about, "mean": [0.5] * channels, "std": [0.2] * channels})
    return encoder.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", list(ENCODERS_OF_TIMM))
def test_timm_builds_the_encoder_from_the_line_that_is_told(tmp_path: Path, kind: str) -> None:
    size = SIZES.get(kind, (32, 32))
    channels = 1 if kind == "relative" else 3
    ours = written(tmp_path / "encoder.safetensors", ENCODERS_OF_TIMM[kind], size, channels)
    report = export_row(tmp_path / "encoder.safetensors", tmp_path / "out")
    assert report.files == [tmp_path / "out" / "timm.safetensors"]
    assert report.parameters == sum(tensor.numel() for tensor in ours.state_dict().values())
    assert "timm's differ from ours by" in report.checks[0]
    assert report.call is not None
    # As a user pastes it.
    theirs = eval(report.call, {"timm": timm}).eval()
    images = torch.randn(2, channels, *size)
    features, summary = ours.encode(ours.embed(images))
    expected = theirs.forward_features(images)
    expected = expected.flatten(1, 2) if expected.ndim == 4 else expected
    torch.testing.assert_close(torch.cat([summary, features], 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(ENCODERS_OF_TIMM))
def test_what_goes_out_comes_in_again(tmp_path: Path, kind: str) -> None:
    size = SIZES.get(kind, (32, 32))
    ours = written(tmp_path / "encoder.safetensors", ENCODERS_OF_TIMM[kind], size)
    (path,) = export_row(tmp_path / "encoder.safetensors", tmp_path / "out").files
    imported = convert(read_state(path), size=size, heads=4)
    assert imported.size == size
    found = imported.weights["encoder"]
    assert found.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    # Drop path and the start of training are no part of weights.
    untold = {"drop_path": 0.0, "init": "timm"}
    expected = check(Pieces, {"encoder": ENCODERS_OF_TIMM[kind]}, "row").encoder
    assert expected is not None
    assert imported.pieces.encoder is not None
    there = {key: value for key, value in expected.params().items() if key not in {*untold, "layer_scale"}}
    assert {**imported.pieces.encoder.params(), **there} == imported.pieces.encoder.params()


def test_the_header_says_how_to_build_it(tmp_path: Path) -> None:
    written(tmp_path / "encoder.safetensors", SWIN)
    report = export_row(tmp_path / "encoder.safetensors", tmp_path / "out")
    with safe_open(report.files[0], framework="pt") as file:
        about = json.loads(file.metadata()["unmask"])
    assert about["timm"] == report.call
    assert about["size"] == [32, 32]


def test_a_classifiers_encoder_goes_out_without_its_own_layers(tmp_path: Path) -> None:
    encoder = written(tmp_path / "encoder.safetensors", VIT)
    _, about = checkpoint.read_weights(tmp_path / "encoder.safetensors")
    path = tmp_path / "classifier.safetensors"
    checkpoint.write_weights(path, Classifier(encoder, 5).state_dict(), {**about, "classes": list("abcde")})
    report = export_row(path, tmp_path / "out")
    assert report.notes[0] == "4 tensors of the task's own layers are left out."
    assert "cls_token" in read_state(report.files[0])


@pytest.mark.parametrize("piece", [{"name": "conv", "base": 4, "layers": 2, "bottleneck": 8}, {"name": "alexnet"}])
def test_what_timm_does_not_have_is_refused(tmp_path: Path, piece: dict[str, Any]) -> None:
    size = (128, 128)
    written(tmp_path / "encoder.safetensors", piece, size)
    with pytest.raises(ValueError, match="timm has no such architecture; its weights are in encoder"):
        export_row(tmp_path / "encoder.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_an_encoder_is_refused(tmp_path: Path) -> None:
    checkpoint.write_weights(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="found no encoder in the header"):
        export_row(tmp_path / "a.safetensors", tmp_path / "out")


def test_other_features_are_an_error(tmp_path: Path) -> None:
    ours = written(tmp_path / "encoder.safetensors", VIT)
    piece = check(Pieces, {"encoder": VIT}, "row").encoder
    assert piece is not None
    model = to_timm(piece, ours.state_dict(), (32, 32), 3)
    path = tmp_path / "timm.safetensors"
    # A weight that is another, and arguments that change no weight's shape.
    wrong = {**model.weights, "norm.weight": model.weights["norm.weight"] * 1.01}
    checkpoint.write_weights(path, wrong, {})
    with pytest.raises(ValueError, match="features differ from ours by"):
        check_export(piece, ours.state_dict(), (32, 32), 3, model, path)
    checkpoint.write_weights(path, model.weights, {})
    assert check_export(piece, ours.state_dict(), (32, 32), 3, model, path) < 1e-5
    model.arguments["num_heads"] = 2
    with pytest.raises(ValueError, match="features differ from ours by"):
        check_export(piece, ours.state_dict(), (32, 32), 3, model, path)
    wrong["norm.weight"] = torch.full((32,), float("nan"))
    checkpoint.write_weights(path, wrong, {})
    with pytest.raises(ValueError, match="features differ from ours by nan"):
        check_export(piece, ours.state_dict(), (32, 32), 3, model, path)
    assert "num_heads=2" in create_call(model, "a")
