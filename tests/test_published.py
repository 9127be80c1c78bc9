"""Published weights: read without running a file's code, recognised, and written under our names."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mim_core import checkpoint
from mim_core.encoders import ENCODERS
from mim_core.grid import Entries
from mim_core.published import convert, import_file, model, read_state, tokenizer
from mim_core.published.imported import IMAGENET, Imported, Pieces
from mim_core.spec import build, check
from mim_core.tokenizers import TOKENIZERS

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2]), "b": torch.ones(0)}
LAYOUTS = pytest.mark.parametrize("new", [True, False], ids=["zip", "before_1.6"])


def saved(path: Path, content: Any, new: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of modules that keep weights as plain attributes, as the published tokenizer does; gone on reading."""
    module = ModuleType("far_away")

    class Conv(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(n_out, n_in, 1, 1))
            self.b = nn.Parameter(torch.randn(n_out))
            self.register_buffer("kept", torch.arange(3))
            self.register_buffer("transient", torch.arange(3), persistent=False)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(2, 3)))
            self.blocks = nn.Sequential(OrderedDict(input=Conv(3, 2), group=inner))
            self.device = torch.device("cpu")

    for one in (Conv, Encoder):
        one.__module__, one.__qualname__ = "far_away", one.__name__
        setattr(module, one.__name__, one)
    monkeypatch.setitem(sys.modules, "far_away", module)
    return module


def test_safetensors_and_both_layouts_of_torch_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert_same(read_state(tmp_path / "a.safetensors"), STATE)
    for new in (True, False):
        assert_same(read_state(saved(tmp_path / "a.pth", STATE, new)), STATE)


@LAYOUTS
@pytest.mark.parametrize("key", ["model", "state_dict", "module", "model_state"])
def test_checkpoints_are_unwrapped(tmp_path: Path, key: str, new: bool) -> None:
    # A Namespace is a class that torch does not load as weights; training codes save their arguments so.
    content = {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        key: {f"module.{name}": tensor for name, tensor in STATE.items()},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3),
    }
    assert_same(read_state(saved(tmp_path / "a.pth", content, new)), STATE)


@LAYOUTS
def test_views_of_one_storage_stay_what_they_were(tmp_path: Path, new: bool) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "column": whole[:, 1], "half": whole.to(torch.bfloat16), "turned": whole.T}
    content = {"model": state, "args": argparse.Namespace()}
    assert_same(read_state(saved(tmp_path / "a.pth", content, new)), state)


@LAYOUTS
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_whole_modules_give_their_weights_without_their_package(
    tmp_path: Path, package: ModuleType, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    module = package.Encoder()
    saved(tmp_path / "a.pkl", module, new)
    monkeypatch.delitem(sys.modules, "far_away")
    assert_same(read_state(tmp_path / "a.pkl"), module.state_dict())


class Call:
    """An object whose pickle calls a function on being read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@LAYOUTS
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, getattr])
def test_a_files_code_is_not_run(tmp_path: Path, function: Any, new: bool) -> None:
    made = tmp_path / "made"
    arguments = {
        os.system: [f"touch {made}"],
        eval: [f"__import__('os').mkdir({str(made)!r})"],
        exec: [f"import os; os.mkdir({str(made)!r})"],
        os.mkdir: [str(made)],
        getattr: [Call(os.mkdir, str(made)), "x"],
    }[function]
    live = Call(function, *arguments)
    if function is not getattr:
        # The payload is live: pickle itself runs it.
        pickle.loads(pickle.dumps(live))
        assert made.exists()
        made.rmdir() if made.is_dir() else made.unlink()
    assert_same(read_state(saved(tmp_path / "a.pth", {"model": STATE, "args": live}, new)), STATE)
    with pytest.raises(ValueError, match="no tensors by name"):
        read_state(saved(tmp_path / "b.pth", live, new))
    assert not made.exists()


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"safetensors file or one that torch\.save wrote"):
        read_state(path)
    path.write_bytes(pickle.dumps({"a": Call(os.mkdir, str(tmp_path / "made"))}))
    with pytest.raises(ValueError, match=r"a pickle that torch\.save did not write"):
        read_state(path)
    assert not (tmp_path / "made").exists()
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_state(path)
    torch.save({"epoch": 3, "lr": [0.1]}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"found \['epoch', 'lr'\], no tensors by name"):
        read_state(tmp_path / "b.pth")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "absent.pth")


@LAYOUTS
def test_torn_files_are_refused(tmp_path: Path, new: bool) -> None:
    path = saved(tmp_path / "a.pth", {"model": STATE, "args": argparse.Namespace()}, new)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="fetch it again"):
        read_state(path)


SMALL: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1},
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "swin_base_patch4_window7_224": {
        "img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4
    },
}  # fmt: skip


def timms(name: str, **changes: Any) -> Any:
    """A small timm model whose weights are random, tables and LayerScale too."""
    torch.manual_seed(0)
    found = timm.create_model(name, **{**SMALL[name], **changes}).eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.5)
    return found


def encoder_of(imported: Imported) -> Any:
    return model(imported).encoder


@torch.no_grad()
def assert_features(encoder: Any, theirs: Any, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    expected = theirs.forward_features(images)
    found, summary = encoder.encode(encoder.embed(images))
    if expected.ndim == 4:
        expected = expected.flatten(1, 2)
    torch.testing.assert_close(torch.cat([summary, found], 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(SMALL))
def test_timms_models_are_recognised(name: str) -> None:
    theirs = timms(name)
    side = SMALL[name]["img_size"]
    imported = convert(theirs.state_dict(), size=(side, side))
    assert imported.pieces.head is None
    assert imported.pieces.fill is None
    # Its classifier is no part of the encoder.
    assert (
        "head.fc.weight" in imported.unused or "head.weight" in imported.unused or "fc_norm.weight" in imported.unused
    )
    if "fc_norm.weight" not in theirs.state_dict():
        assert_features(encoder_of(imported), theirs, (side, side))


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, "relative_per_block"),
        ({"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, "relative"),
        ({"init_values": 0, "img_size": (32, 48)}, "relative_per_block"),
    ],
)
def test_relative_vits_of_all_forms(changes: dict[str, Any], positions: str) -> None:
    theirs = timms("beit_base_patch16_224", global_pool="token", num_classes=0, **changes)
    size = changes.get("img_size", (32, 32))
    imported = convert(theirs.state_dict(), size=None if size == (32, 32) else size)
    assert imported.size == size
    params = imported.pieces.encoder.params()  # type: ignore[union-attr]
    assert (params["positions"], params["layer_scale"]) == (positions, None if "init_values" in changes else 0.1)
    assert_features(encoder_of(imported), theirs, size)


def test_a_model_that_normalises_after_its_mean_is_told_so() -> None:
    theirs = timms("beit_base_patch16_224")
    imported = convert(theirs.state_dict())
    assert "fine-tuned to normalise after the mean" in imported.notes[0]
    torch.testing.assert_close(encoder_of(imported).backbone.norm.weight, theirs.fc_norm.weight)


def test_a_plain_vits_attention_heads_are_assumed_and_told_or_given() -> None:
    theirs = timms("vit_base_patch16_224", num_classes=0)
    assert "1 attention heads are assumed for a width of 64" in convert(theirs.state_dict()).notes[0]
    four = timms("vit_base_patch16_224", num_classes=0, num_heads=4)
    imported = convert(four.state_dict(), heads=4)
    assert not any("assumed" in note for note in imported.notes)
    assert_features(encoder_of(imported), four, (32, 32))
    odd = timms("vit_base_patch16_224", embed_dim=48, num_heads=4).state_dict()
    with pytest.raises(ValueError, match=r"heads: shapes do not tell .* of width 48; give heads"):
        convert(odd)


def test_the_published_huge_vit_has_sixteen_heads() -> None:
    with torch.device("meta"):
        state = timm.create_model("vit_huge_patch14_224", depth=1, num_classes=0).state_dict()
    weights = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    assert convert(weights).pieces.encoder.params()["heads"] == 16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "size", "pattern"),
    [
        ({"pre_norm": True}, None, "norm_pre.bias, norm_pre.weight; the architectures here have no such parts"),
        ({"reg_tokens": 2}, None, "a table of positions of 18 rows is of no square image"),
        ({"class_token": False, "global_pool": "avg"}, None, "of no square image"),
        ({"img_size": (32, 48)}, None, "a table of positions of 24 rows is of no square image; give size"),
        ({}, (32, 64), r"size: found \[32, 64\], which is \[4, 8\] patches of 8 px; the file's table"),
        ({"qkv_bias": False}, None, "blocks.0.attn.qkv.bias is missing"),
        ({"qk_norm": True}, None, "has no place"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], size: tuple[int, int] | None, pattern: str) -> None:
    state = timms("vit_base_patch16_224", **changes).state_dict()
    with pytest.raises(ValueError, match=pattern):
        convert(state, size=size)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found a\.bias, a\.weight, b, .* these are no names of a family known here"):
        convert(STATE)


def test_a_swins_size_follows_from_its_tables_or_is_assumed() -> None:
    # At 64 px the last map is 8 patches of a window of 8; at 96 px of 12.
    whole = timms("swin_base_patch4_window7_224", window_size=8, depths=(2, 2, 2), num_heads=(1, 2, 4)).state_dict()
    assert convert(whole).size == (64, 64)
    windows = timms("swin_base_patch4_window7_224", window_size=4).state_dict()
    imported = convert(windows)
    assert imported.size == (192, 192)
    assert "192 x 192 px are assumed" in imported.notes[0]
    with pytest.raises(
        ValueError, match=r"size: found \[40, 40\]; the tables of the stages are of windows of \[4, 4\]"
    ):
        convert(windows, size=(40, 40))


def test_a_swin_as_published_has_its_merging_at_the_end_of_a_stage() -> None:
    theirs = timms("swin_base_patch4_window7_224", depths=(2, 2, 2), num_heads=(2, 4, 4), num_classes=0, img_size=128)
    state = {
        f"layers.{int(name[7]) - 1}{name[8:]}" if ".downsample." in name else name: tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert "layers.0.downsample.norm.weight" in state
    imported = convert({f"encoder.{name}": tensor for name, tensor in state.items()}, size=(128, 128))
    assert_features(encoder_of(imported), theirs, (128, 128))


def test_maes_encoder_alone() -> None:
    theirs = timms("vit_base_patch16_224", num_classes=0)
    state = {**theirs.state_dict(), "mask_token": torch.zeros(1, 1, 32)}
    imported = convert(state)
    assert (imported.pieces.fill, imported.pieces.head, imported.unused) == (None, None, ("mask_token",))
    assert imported.colours == IMAGENET


def test_an_inpainting_net_with_running_moments_gives_the_same_picture() -> None:
    """In evaluation, where a bias before a norm counts: ours has none, and the running mean takes it."""
    torch.manual_seed(0)
    leaky, norm, up = (lambda: nn.LeakyReLU(0.2)), nn.BatchNorm2d, nn.ConvTranspose2d
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), leaky(), nn.Conv2d(4, 4, 4, 2, 1), norm(4), leaky(),
        nn.Conv2d(4, 8, 4, 2, 1), norm(8), leaky(), nn.Conv2d(8, 6, 4),
    )  # fmt: skip
    theirs = nn.Sequential(
        encoder, norm(6), leaky(), up(6, 8, 4), norm(8), nn.ReLU(), up(8, 4, 4, 2, 1), norm(4), nn.ReLU(),
        up(4, 3, 4, 2, 1), nn.Tanh(),
    ).eval()  # fmt: skip
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_().abs_().add_(0.5) if name.endswith("var") else tensor.normal_(std=0.3)
    imported = convert(theirs.state_dict())
    assert (imported.size, imported.entries) == ((32, 32), Entries(3, 8))
    found = model(imported)
    images = torch.randn(2, 3, 32, 32)
    features, summary = found.encoder.encode(found.encoder.embed(images))
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[1:3, 1:3] = True
    values = found.head(features, wanted.flatten().expand(2, -1), None, summary).reshape(2, 2, 2, 3, 8, 8)
    picture = values.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    torch.testing.assert_close(picture, theirs(images), atol=1e-5, rtol=1e-4)


# Files: what a job would read.


def test_an_imported_encoder_is_written_as_a_runs_product(tmp_path: Path) -> None:
    theirs = timms("vit_base_patch16_224", num_classes=0)
    saved(tmp_path / "a.pth", {"model": theirs.state_dict(), "args": argparse.Namespace()}, True)
    report = import_file(tmp_path / "a.pth", tmp_path / "out")
    assert [path.name for path in report.files] == ["encoder.safetensors"]
    assert report.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert "features on 2 random images" in report.checks[0]
    weights, about = checkpoint.read_weights(report.files[0])
    assert about.keys() == {"encoder", "size", "channels", "mean", "std"}
    piece = check(Pieces, {"encoder": about["encoder"]}, "file").encoder
    assert piece is not None
    encoder = build(ENCODERS, piece, tuple(about["size"]), about["channels"])
    encoder.load_state_dict(weights)
    assert_features(encoder.eval(), theirs, (32, 32))
    assert report.call is not None
    assert report.call.startswith("timm.create_model('vit_base_patch16_224', checkpoint_path='timm.safetensors'")


@pytest.mark.parametrize(
    "case", ["simmim_vit_sharedrpb", "simmim_swin_2stage_shift", "mae_pix", "context_encoder_center128"]
)
def test_a_pretrained_model_is_written_whole(tmp_path: Path, case: str) -> None:
    with np.load(Path(__file__).parent / "parity" / f"{case}.npz") as arrays:
        prefix = "G/" if case.startswith("context") else "sd/"
        state = {
            key.removeprefix(prefix): torch.from_numpy(arrays[key]).float() for key in arrays if key.startswith(prefix)
        }
    save_file(state, tmp_path / "a.safetensors")
    hints: dict[str, Any] = {"heads": 3, "decoder_heads": 2} if case == "mae_pix" else {"size": (64, 64)}
    report = import_file(tmp_path / "a.safetensors", tmp_path / "out", **({} if "context" in case else hints))
    assert [path.name for path in report.files] == ["encoder.safetensors", "model.safetensors"]
    assert len(report.checks) == 2
    _, about = checkpoint.read_weights(report.files[1])
    assert about["pieces"] == report.pieces
    assert "head" in about["pieces"]


class Conv(nn.Module):
    """A convolution as the published tokenizer keeps it."""

    def __init__(self, n_in: int, n_out: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, side, side) * 0.2)
        self.b = nn.Parameter(torch.randn(n_out) * 0.2)


def pickled_half(path: Path, source: Any) -> None:
    """Write a tokenizer's half as a pickled module of another package's classes, under its published names."""
    half = nn.Module()
    for name, tensor in source.state_dict().items():
        at: nn.Module = half
        *places, last = name.split(".")
        for place in places[:-1]:
            if place not in at._modules:
                at.add_module(place, nn.Sequential())
            at = at.get_submodule(place)
        if last == "weight":
            conv = Conv(tensor.shape[1], tensor.shape[0], tensor.shape[-1])
            conv.w = nn.Parameter(tensor)
            at.add_module(places[-1], conv)
        else:
            at.get_submodule(places[-1]).b = nn.Parameter(tensor)
    torch.save(half, path)


def test_a_tokenizer_in_two_pickled_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = TOKENIZERS["dvae"](3, codes=12, base=8, blocks=2).eval()
    pickled_half(tmp_path / "encoder.pkl", theirs.encoder)
    pickled_half(tmp_path / "decoder.pkl", theirs.decoder)
    report = import_file(tmp_path / "encoder.pkl", tmp_path / "out", decoder=tmp_path / "decoder.pkl")
    assert report.pieces == {"tokenizer": {"name": "dvae", "codes": 12, "base": 8, "blocks": 2}}
    assert not report.notes
    weights, about = checkpoint.read_weights(report.files[0])
    assert about == {**report.pieces, "channels": 3}
    assert_same(weights, theirs.state_dict())
    alone = convert(read_state(tmp_path / "encoder.pkl"))
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(tokenizer(alone).logits(images), theirs.logits(images))
    assert "draws every token as grey" in alone.notes[0]
    grey = tokenizer(alone).decode(theirs.tokens(images))
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5))
    other = convert(read_state(tmp_path / "decoder.pkl"))
    torch.testing.assert_close(tokenizer(other).decode(theirs.tokens(images)), theirs.decode(theirs.tokens(images)))


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    state = timms("vit_base_patch16_224", num_classes=0).state_dict()
    state["norm.bias"][3] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"found numbers in backbone\.norm\.bias that are not finite"):
        import_file(tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_and_a_tokenizer_are_not_taken_for_each_other() -> None:
    vit = convert(timms("vit_base_patch16_224").state_dict())
    with pytest.raises(ValueError, match="it is no tokenizer"):
        tokenizer(vit)
    small = convert(TOKENIZERS["dvae_small"](3, codes=8, width=8, code_width=8).state_dict())
    with pytest.raises(ValueError, match="it has no encoder"):
        model(small)


@pytest.mark.parametrize("params", [{}, {"layers": 2, "blocks": 2, "likelihood": "l2"}, {"blocks": 0}])
def test_small_tokenizers_of_all_forms(params: dict[str, Any]) -> None:
    params = {"codes": 8, "width": 8, "code_width": 16, **params}
    theirs = TOKENIZERS["dvae_small"](3, **params)
    found = convert(theirs.state_dict()).pieces.tokenizer
    assert found is not None
    assert {**found.params(), **params} == found.params()
