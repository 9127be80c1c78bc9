"""Where a task begins: files that were fine-tuned, timm's models by name, features that are timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from core_pieces import TUNE, classify_row, tiny_pack
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from mim_core import checkpoint
from mim_core.encoders import ENCODERS
from mim_core.encoders.interpolate import adapt
from mim_core.jobs import downstream
from mim_core.jobs.downstream import begin
from mim_core.published import convert, from_timm
from mim_core.spec import build

# Published architectures, thinner or less deep: what is compared is how they are cut, positioned and normed.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 3}, (160, 256)),
    "deit": ("deit_tiny_patch16_224", {"depth": 2}, (224, 112)),
    "beit": ("beit_base_patch16_224", {"embed_dim": 96, "depth": 2, "num_heads": 3}, (128, 192)),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 48, "depths": (1, 2, 1, 1)}, (224, 448)),
}


def timms(name: str, size: tuple[int, int], **more: Any) -> Any:
    torch.manual_seed(0)
    model, changes, _ = MODELS[name]
    made = timm.create_model(model, img_size=size, num_classes=7, **changes, **more)
    for parameter in made.parameters():
        # Biases and tables that begin at zero would hide a mistake.
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@torch.no_grad()
def features(encoder: Any, images: Tensor) -> Tensor:
    out, summary = encoder.eval().encode(encoder.embed(images))
    return torch.cat([summary, out], 1)


@torch.no_grad()
@pytest.mark.parametrize("other", [False, True], ids=["224", "not_square"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_timms_for_the_same_weights(name: str, other: bool) -> None:
    size = MODELS[name][2] if other else (224, 224)
    model = timms(name, size)
    heads = next(int(one.num_heads) for one in model.modules() if hasattr(one, "num_heads"))
    found = convert(model.state_dict(), size=size, heads=heads)
    assert found.pieces.encoder is not None
    ours = build(ENCODERS, found.pieces.encoder, size, 3)
    ours.load_state_dict(found.weights["encoder"])
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    theirs = model.forward_features(images)
    if name == "beit":  # its norm comes after the mean; here it is the encoder's last
        theirs = model.fc_norm(theirs)
    torch.testing.assert_close(features(ours, images), theirs.flatten(1, 2) if theirs.ndim == 4 else theirs)


def fine_tuned(kind: str) -> dict[str, Tensor]:
    """A state dict as the papers' fine-tuning leaves it, with a classification layer."""
    torch.manual_seed(0)
    if kind.startswith("mae"):
        model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7, global_pool="avg")
    elif kind == "beit":
        model = timms("beit", (224, 224))
    else:
        model = timms(kind, (224, 224))
    state = model.state_dict()
    if kind == "mae_probed":
        state = {name: one for name, one in state.items() if not name.startswith(("head.", "fc_norm."))}
        state |= {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192)}
        state |= {"head.0.running_mean": torch.zeros(192), "head.0.running_var": torch.ones(192)}
        state |= {"head.1.weight": torch.zeros(7, 192), "head.1.bias": torch.zeros(7)}
    return state


@pytest.mark.parametrize("kind", ["mae", "mae_probed", "beit", "vit", "swin"])
def test_a_fine_tuned_file_gives_its_encoder_and_says_that_its_layer_is_left_out(tmp_path: Path, kind: str) -> None:
    state = fine_tuned(kind)
    torch.save({"model": state, "epoch": 99}, tmp_path / "tuned.pth")
    begun = begin(tmp_path / "tuned.pth")
    encoder = build(ENCODERS, begun.encoder, (224, 224), 3)
    encoder.load_state_dict(adapt(begun.weights, encoder, begun.size))
    norm = "fc_norm" if "fc_norm.weight" in state else "norm"
    assert torch.equal(encoder.state_dict()["backbone.norm.weight"], state[f"{norm}.weight"])
    found = convert(state)
    layer = "head.fc" if kind == "swin" else "head.1" if kind == "mae_probed" else "head"
    assert f"{layer}.weight" in found.unused
    assert any(
        "The classification layer" in note and "is left out: a task makes its own" in note for note in found.notes
    )
    assert any(note.startswith("The model was fine-tuned to normalise after the mean") for note in found.notes) == (
        norm == "fc_norm"
    )
    assert not any(
        "classification layer" in note for note in convert({k: v for k, v in state.items() if "head" not in k}).notes
    )


@pytest.mark.parametrize("task", ["classify", "probe", "knn"])
def test_a_job_begins_from_a_published_file_in_its_colours_and_hands_its_notes_on(tmp_path: Path, task: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, num_heads=1, depth=2, num_classes=7
    )
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    learns: dict[str, Any] = {"optim": {**TUNE, "epochs": 0.5}} if task != "knn" else {"optim": None, "lr_grid": []}
    row = classify_row(encoder=None, init="file", task=task, augment=None, drop_path=0.0, **learns)
    found = downstream(row, tiny_pack(tmp_path / "pack"), tmp_path / "job", 0, 1e-30, tmp_path / "tuned.pth", True)
    assert [note.split(" (")[0] for note in found["notes"]][-1] == "The classification layer"
    weights, about = checkpoint.read_weights(tmp_path / "job" / "model.safetensors")
    assert (about["mean"], about["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(weights["encoder.backbone.blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight)


def test_a_distilled_deit_is_refused_in_words() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    with pytest.raises(ValueError, match=r"weights: found dist_token; .* take a DeiT without distillation"):
        convert(model.state_dict())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which may not use the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_tinny_patch16_224",
            r"init: 'timm:vit_tinny_patch16_224': timm .* has no such model; did you mean 'vit_tiny",
        ),
        (
            "deit_tiny_patch16_224",
            r"its weights are not in timm's cache, .* run `python -c \"import timm; .*'supervised'",
        ),
    ],
)
def test_a_model_that_timm_has_not_here_is_told_in_words(cache: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as told:
        begin(Path(f"timm:{name}"))
    assert told.value.__cause__ is None
    assert "\n" not in str(told.value)


def test_a_model_without_pretrained_weights_is_told_in_words() -> None:
    bare = next(one for one in timm.list_models("vit_*") if not timm.list_pretrained(f"{one}*"))
    with pytest.raises(ValueError, match=r"has no pretrained weights of it; name another model|choose one of"):
        from_timm(bare)


def test_a_model_in_timms_cache_is_begun_from(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224")
    found = model.pretrained_cfg["hf_hub_id"]
    snapshot = cache / f"models--{found.replace('/', '--')}" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    save_file(model.state_dict(), snapshot / "model.safetensors")
    begun = begin(Path("timm:deit_tiny_patch16_224"))
    assert begun.size == (224, 224)
    assert {key: begun.encoder.params()[key] for key in ("width", "depth", "heads")} == {
        "width": 192,
        "depth": 12,
        "heads": 3,
    }
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(begun.weights[f"backbone.{name}"], tensor), name
