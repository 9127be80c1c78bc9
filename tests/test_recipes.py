"""The papers' full-size recipes: they resolve to their golden text, say their rates, and take steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from core_pieces import tiny_pack
from test_params import leaves

from mim_core.files import read_curve
from mim_core.jobs import fit_target, pretrain
from mim_core.params import PretrainRow, TargetRow, load_recipes
from mim_core.spec import check

GOLDEN = Path(__file__).parent / "golden" / "recipes"
RECIPES = load_recipes(Path(__file__).parents[1] / "params")
ROWS: dict[str, TargetRow | PretrainRow] = {**RECIPES.targets, **RECIPES.pretrained()}
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


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_resolves_to_its_golden_text(name: str, update_golden: bool) -> None:
    text = "".join(sorted(f"{path} = {value!r}\n" for path, value in leaves(ROWS[name].model_dump(mode="json"))))
    golden = GOLDEN / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), "a new recipe: run `pytest --update-golden` and commit what it writes"
    assert text == golden.read_text()
    assert {path.stem for path in GOLDEN.glob("*.txt")} <= set(ROWS)


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
