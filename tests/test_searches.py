"""How a search is read and shown: numbers, words, tables and figure follow from its results alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flows import figures_search, searches, workspace

ROW: dict[str, Any] = {
    "data": "scenes",
    "encoder": {"name": "vit", "patch_px": 4, "width": 32, "depth": 2, "heads": 2, "positions": "sincos"},
    "mask": {"name": "random", "ratio": 0.6, "unit_px": 4},
    "fill": {"name": "mask_token"},
    "head": {"name": "linear", "norm": False},
    "target": {"name": "pixels"},
    "loss": {"name": "l1"},
    "adversarial": None,
    "optim": {"lr": 1.0e-3, "base_lr": None, "batch": 32, "epochs": 4.0},
}


def trial(number: int, place: int | None, state: str, score: float | None = None, **more: Any) -> dict[str, Any]:
    settings = {"mask.ratio": 0.6, "head": "linear", "target": "pixels, l1"}
    return {
        "number": number, "place": place, "state": state, "score": score, "settings": settings, "reports": {},
        "device_seconds": 30.0, "origin": "sampler", "error": None, "mlflow_run_id": None, **more,
    }  # fmt: skip


def results(gain: float = 0.05, better: bool = True, seeds: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """A search's results: two told points, six trials, and a final comparison with a gain and some noise."""
    found = {**ROW, "mask": {**ROW["mask"], "ratio": 0.7}} if better else ROW
    noise = {1: 0.0, 2: 0.01, 3: -0.01}

    def finals(mean: float) -> dict[str, Any]:
        return {
            str(seed): {"validation_score": mean + noise[seed], "test_score": mean - 0.02 + 0.9 * noise[seed]}
            | {"device_hours": 0.01, "mlflow_run_id": None}
            for seed in seeds
        }

    trials = [
        trial(0, None, "complete", 0.27, origin="ablation mask_ratio (seed 0)"),
        trial(1, None, "complete", 0.28, origin="ablation mask_ratio (seed 0)"),
        trial(2, 0, "complete", 0.30, origin="default row", reports={"1": 0.1, "2": 0.2}),
        trial(3, 1, "pruned", reports={"1": 0.05}),
        trial(4, 2, "failed", error="mask.ratio: it does not fit"),
        trial(5, 3, "complete", 0.29, reports={"1": 0.1, "2": 0.21}),
        trial(6, 4, "complete", 0.36 if better else 0.25, settings={"mask.ratio": 0.7, "head": "mlp", "target": "hog"}),
        trial(7, 5, "stopped", reports={"1": 0.1}),
    ]
    best = trials[6] if better else trials[2]
    return {
        "name": "recipe", "base": "simmim_vit", "change": {"optim.epochs": 4}, "data": {"name": "scenes", "md5": "m"},
        "judge": {"simmim_vit_1000": {"lr_grid": [3e-3]}}, "metric": "accuracy",
        "space": {"mask.ratio": {"low": 0.3, "high": 0.9}, "head": ["linear", "mlp"], "target": {"a": {}, "b": {}}},
        "sampler": {"name": "tpe"}, "pruner": {"name": "asha", "evaluations": 2},
        "seed": 0, "trial_seeds": [0], "seeds": list(seeds),
        "budget_device_hours": 0.4, "spent_device_hours": 0.381, "wall_seconds": 1400.0, "trials": trials,
        "importances": {"mask.ratio": 0.7, "target": 0.25, "head": 0.05},
        "best": {"number": best["number"], "settings": best["settings"], "row": found},
        "default": {"number": 2, "settings": trials[2]["settings"], "row": ROW},
        "finals": {"best": finals(0.30 + gain), "default": finals(0.30)},
    }  # fmt: skip


def test_the_headline_says_a_gain_with_its_interval_on_both_splits() -> None:
    said = searches.headline(searches.of(results()))
    assert said.startswith("recipe: 6 trials (3 completed, 1 pruned, 1 stopped by the budget, 1 failed); 2 results of")
    assert "0.381 of 0.400 device-hours" in said
    assert "mask.ratio 0.7, head mlp, target hog" in said
    assert "validation accuracy from 30.0 to 35.0 %: +5.0 points [5.0, 5.0]" in said
    assert "test accuracy from 28.0 to 33.0 %: +5.0 points" in said


def test_the_headline_claims_nothing_that_is_not_there() -> None:
    one = searches.headline(searches.of(results(seeds=(1,))))
    assert "+5.0 points (one seed: no interval)" in one
    assert "1 fresh seed," in one
    noisy = results()
    for seed, score in (("1", 0.25), ("2", 0.40), ("3", 0.31)):
        noisy["finals"]["best"][seed]["test_score"] = score
    assert "no difference (+4.0 points [" in searches.headline(searches.of(noisy))
    assert "None was better than the default row." in searches.headline(searches.of(results(better=False)))


def test_the_tables_hold_settings_importances_finals_and_leaders() -> None:
    text = searches.markdown(searches.of(results()))
    assert "| mask.ratio | 0.6 | 0.7 | 70% |" in text
    assert "| best row found (trial 6) | 35.0 [32.5, 37.5] | 33.0 [30.8, 35.2] | 1, 2, 3 | 0.030 |" in text
    assert "| default row (trial 2) | 30.0 [27.5, 32.5] |" in text
    assert "| 6 | 36.0 | 0.7 | mlp | hog | sampler |" in text
    header, lines = searches.terminal(searches.of(results()))
    assert [len(line) for line in lines] == [len(header)] * 3


def test_a_default_outside_the_space_is_shown_by_its_row() -> None:
    said = results()
    said["default"] |= {"number": None, "settings": None}
    text = searches.markdown(searches.of(said))
    assert "| head | linear (norm False) | mlp | 5% |" in text
    assert "| default row | 30.0" in text


def test_the_csv_has_a_line_a_trial() -> None:
    lines = list(csv.DictReader(io.StringIO(searches.trials_csv(searches.of(results())))))
    assert [line["number"] for line in lines] == [str(number) for number in range(8)]
    assert (lines[2]["probe_1_of_2"], lines[2]["probe_2_of_2"], lines[2]["score"]) == ("0.1", "0.2", "0.3")
    assert (lines[3]["state"], lines[3]["score"]) == ("pruned", "")
    assert lines[4]["error"] == "mask.ratio: it does not fit"


def test_the_best_row_can_be_appended_to_the_file_of_rows(tmp_path: Path) -> None:
    from conftest import SMALL

    from mim_core import params

    text = searches.best_yaml(searches.of(results()))
    for name, content in SMALL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + (text if name == "params/pretrain.yaml" else ""))
    row = params.load(tmp_path / "params").pretrain["recipe_best"]
    assert row.mask.params()["ratio"] == 0.7
    assert "# Test accuracy, 3 fresh seeds: 33.0 [30.8, 35.2] %; over the default row +5.0 points" in text
    assert yaml.safe_load(text)["recipe_best"]["optim"]["batch"] == 32


def test_numbers_for_dvc_and_mlflow_are_finite() -> None:
    for seeds in ((1, 2, 3), (1,)):
        said = searches.summary(searches.of(results(seeds=seeds)))
        assert all(np.isfinite(value) for value in said.values())
        assert said["validation_gain"] == pytest.approx(0.05)
        assert said["best_trial_score"] == 0.36
        assert (said["trials"], said["trials_pruned"]) == (6, 1)
        assert ("test_gain_half_width" in said) == (len(seeds) > 1)


@pytest.mark.parametrize("changes", [{}, {"importances": {}}, {"trials": results()["trials"][2:3]}])
def test_the_figure_is_drawn_the_same_each_time(changes: dict[str, Any]) -> None:
    found = searches.of({**results(), **changes})
    first, again = figures_search.search(found), figures_search.search(found)
    assert first == again
    image = np.asarray(Image.open(io.BytesIO(first)).convert("L"))
    assert image.shape[1] == 1300
    assert (image < 128).mean() > 0.005


def test_published_searches_are_read_and_a_broken_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches.rows, "load", lambda: {"search_fitted": {}, "search": {"recipe": {}, "absent": {}}})
    monkeypatch.setattr(workspace, "run_folder", lambda kind, row: tmp_path / kind / row)
    assert searches.read() == []
    folder = tmp_path / "search" / "recipe"
    workspace.write_json(folder / "results.json", results())
    workspace.write_json(folder / "manifest.json", {"row": "recipe"})
    (found,) = searches.read()
    assert (found.name, found.folder, len(found.tried), len(found.told)) == ("recipe", folder, 6, 2)
    (folder / "results.json").write_text(json.dumps({"name": "recipe"}))
    with pytest.raises(workspace.UserError, match=r"recipe: not a whole result .*run `dvc repro` again"):
        searches.read()
