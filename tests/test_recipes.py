"""The papers' full-size recipes: they resolve to their golden text, say their rates, and take steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_pieces import tiny_pack
from test_params import leaves

from mim_core.data.pack import ANNOTATIONS, Pack, Sample, Source, open_pack, write
from mim_core.files import read_curve
from mim_core.jobs import downstream, fit_target, pretrain
from mim_core.params import DownstreamRow, PretrainRow, TargetRow, load_recipes
from mim_core.spec import check

GOLDEN = Path(__file__).parent / "golden" / "recipes"
RECIPES = load_recipes(Path(__file__).parents[1] / "params")
ROWS: dict[str, TargetRow | PretrainRow] = {**RECIPES.targets, **RECIPES.pretrained()}
JUDGED = RECIPES.judged()
VIT = {"name": "vit", "patch_px": 16, "width": 768, "depth": 12, "heads": 12}
# The rate of a step, as the papers' code arrives at it.
RATES = {
    "dalle": 1e-4,
    "beit_b16_800": 1.5e-3,
    "simmim_swin_b_clusters": 8e-4,
    "simmim_swin_b_100": 8e-4,
    "simmim_swin_b_800": 4e-4,
    "simmim_vit_b16_800": 4e-4,
    "mae_b16": 2.4e-3,
    "mae_l16": 2.4e-3,
    "maskfeat_b16": 1.6e-3,
    "vit_mpp_b16": 2e-4,
    "context_encoder_inpainting": 2e-3,
    "context_encoder_alexnet": 2e-3,
}
# Sizes that keep the architecture and spare the pixels.
TINY = {"dalle": 32, "context_encoder_inpainting": 128, "context_encoder_alexnet": 99, "swin": 96}


@pytest.mark.parametrize("name", [*ROWS, *JUDGED])
def test_a_recipe_resolves_to_its_golden_text(name: str, update_golden: bool) -> None:
    row = {**ROWS, **JUDGED}[name]
    text = "".join(sorted(f"{path} = {value!r}\n" for path, value in leaves(row.model_dump(mode="json"))))
    golden = GOLDEN / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), "a new recipe: run `pytest --update-golden` and commit what it writes"
    assert text == golden.read_text()
    assert {path.stem for path in GOLDEN.glob("*.txt")} <= {*ROWS, *JUDGED}


def test_steps_learn_at_the_papers_effective_rates() -> None:
    found = {name: row.optim.rate for name, row in ROWS.items() if row.optim}
    assert found == pytest.approx(RATES)


def tiny(name: str) -> tuple[dict[str, Any], int]:
    """The recipe with two steps of two images, and the size of those."""
    row = ROWS[name]
    content = row.model_dump(mode="json")
    size = TINY.get(name, TINY["swin"] if "swin" in name else 64)
    if content["optim"]:
        content["optim"] |= {"batch": 2, "epochs": 2 / 32, "warmup_epochs": 0.0}
    if isinstance(row, PretrainRow) and row.mask.params().get("count"):
        content["mask"] |= {"count": 7, "least": 4}
    if content.get("least_perplexity"):
        content["least_perplexity"] = 1.0
    return content, size


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    content, size = tiny(name)
    pack = tiny_pack(tmp_path / "pack", size=(size, size))
    if name in RECIPES.targets:
        row = check(TargetRow, content, name)
        fit_target(row, pack, tmp_path, seed=0)
    else:
        pretrain(check(PretrainRow, content, name), pack, tmp_path, 0, fitted(name, tmp_path))
    last = read_curve(tmp_path / "curve.jsonl")[-1]
    assert last["step"] == (2 if ROWS[name].optim else 1)


def fitted(name: str, folder: Path) -> Path | None:
    """The tokenizer that a recipe needs, fitted for two steps."""
    row = ROWS[name]
    if not isinstance(row, PretrainRow) or row.fitted is None:
        return None
    content, size = tiny(row.fitted)
    fit_target(check(TargetRow, content, name), tiny_pack(folder / "codes", size=(size, size)), folder / "fitted", 0)
    return folder / "fitted" / "tokenizer.safetensors"


def annotated_pack(folder: Path, side: int) -> Pack:
    """Noise with one bright rectangle an image, annotated in every way."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(len(split))
        for index in range(8):
            image, label = rng.integers(0, 90, (3, side, side)).astype(np.uint8), index % 2
            box = np.array([[side // 8, side // 8, side // 2, side // 2 + 4, label]], np.float32)
            instances = np.zeros((side, side), np.uint8)
            instances[side // 8 : side // 2 + 4, side // 8 : side // 2] = 1
            image[:, instances == 1] += np.uint8(100)
            presence = np.array([1 - label, label], np.int8)
            semantic = instances * np.uint8(label + 1)
            yield Sample(image, label, boxes=box, instances=instances, semantic=semantic, presence=presence)

    counts = dict.fromkeys(("train", "validation", "test"), 8)
    source = Source(["a", "b"], counts, samples, annotations=ANNOTATIONS, segments=["background", "a", "b"])
    write(source, folder, {"name": "annotated"})
    return open_pack(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGED)
def test_a_recipe_of_a_task_takes_two_steps(name: str, tmp_path: Path) -> None:
    row = JUDGED[name]
    content = row.model_dump(mode="json")
    begun = RECIPES.pretrained().get(row.init)
    encoder = content["encoder"] or (begun.encoder.model_dump(mode="json") if begun else VIT)
    # Windows of 7 tile nothing smaller than 224 px, and AlexNet takes 67 px at least.
    side = {"swin": 224, "alexnet": 131}.get(encoder["name"], 64)
    content |= {"init": "scratch", "encoder": encoder, "precision": "fp32"}
    content["optim"] |= {"batch": 2, "epochs": 0.5, "warmup_epochs": 0.0}
    pack = annotated_pack(tmp_path / "pack", side)
    found = downstream(check(DownstreamRow, content, name), pack, tmp_path, 0, 1e-5, None, test=True)
    assert found["steps"] == 2
    assert 0 <= found["test_score"] <= 1
