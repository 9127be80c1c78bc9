"""What is recommended: no more than differences on validation images support, in a form that runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import ENCODER, PIECES, Published
from test_ablations import results as ablation_results
from test_searches import results as search_results

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from flows import page, recommend, workspace
from flows import results as published_results
from mim_core.params import load

SEEDS = {"seeds": [0, 1, 2], "labels": 1000}
SCRATCH = {0: 0.100, 1: 0.110, 2: 0.105}
LOW = {0: 0.250, 1: 0.262, 2: 0.254}
HIGH = {0: 0.350, 1: 0.361, 2: 0.357}
MAE = {
    "mask": {"name": "random", "ratio": 0.75, "unit_px": 4},
    "fill": "drop",
    "head": {"name": "transformer_decoder", "width": 48, "depth": 1, "heads": 3},
    "target": {"name": "pixels", "normalise": "patch"},
    "loss": "l2",
}
RATIOS = {"data": "scenes", "base": "simmim_vit", "seeds": [0, 1, 2], "judges": {"simmim_ft": {}}}
SEARCH = {
    "data": "scenes", "base": "simmim_vit", "judge": {"simmim_ft": {"lr_grid": [1.0e-3]}},
    "space": {"head": ["linear", "mlp"]}, "trials": 4, "budget_device_hours": 1.0, "seeds": [1, 2, 3],
}  # fmt: skip


class Laboratory(Published):
    """Published runs of a small family, and of ablations and searches that begin from it."""

    def family(self, mae: Mapping[int, float] = HIGH, simmim: Mapping[int, float] = LOW) -> None:
        judged = {"simmim_ft": {**SEEDS, "init": "simmim_vit"}, "mae_ft": {**SEEDS, "init": "mae"}}
        laboratory = {
            "ablations": {"mask_ratio": {**RATIOS, "grid": {"mask.ratio": [0.3, 0.6, 0.8]}}},
            "search": {"recipe": SEARCH},
        }
        self.rows({"simmim_vit": {}, "mae": MAE}, {"scratch": SEEDS}, judged, laboratory=laboratory)
        self.pack()
        self.pretrained("simmim_vit", hours=0.4)
        self.pretrained("mae", hours=0.6)
        self.judged("scratch", "scratch", SCRATCH)
        self.judged("simmim_ft", "simmim_vit", simmim)
        self.judged("mae_ft", "mae", mae)

    def ablation(self, means: Mapping[str, float], **changes: Any) -> None:
        values = [{"mask.ratio": float(label)} for label in means]
        said = ablation_results(means, values, name="mask_ratio") | changes
        folder = self.root / "runs" / "ablate" / "mask_ratio"
        self._manifest(folder, "ablate", "mask_ratio", 0.3, {}, {})
        self._json(folder / "results.json", said)

    def search(self, gain: float = 0.05, **changes: Any) -> None:
        said = search_results(gain) | changes
        row = {"data": "scenes", **PIECES}
        said |= {"default": {**said["default"], "row": row}}
        said |= {"best": {**said["best"], "row": {**row, "head": "mlp", "mask": {**PIECES["mask"], "ratio": 0.75}}}}
        for seed, shift in (("1", 0.002), ("2", 0.0), ("3", -0.001)):
            said["finals"]["best"][seed]["validation_score"] += shift
        folder = self.root / "runs" / "search" / "recipe"
        self._manifest(folder, "search", "recipe", 0.38, {}, {})
        self._json(folder / "results.json", said)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    monkeypatch.delenv("UNMASK_HOME", raising=False)
    there = Laboratory(tmp_path / "work")
    monkeypatch.chdir(there.root)
    workspace.root.cache_clear()
    shutil.copy(Path(__file__).parents[1] / "params/recipes.yaml", there.root / "params")
    yield there
    workspace.root.cache_clear()


def only() -> recommend.Recommendation:
    (found,) = recommend.recommend(published_results.read())
    return found


def appended(made: Laboratory, found: recommend.Recommendation) -> Any:
    """The row as the loader of params/ reads it from the end of the file it belongs to."""
    folder = made.root.parent / "appended"
    shutil.copytree(made.root / "params", folder, dirs_exist_ok=True)
    path = folder / "pretrain.yaml"
    # Rows stand below their section, two spaces in; PyYAML wrote ours without blank lines.
    path.write_text(path.read_text() + recommend.as_yaml([found]))
    return load(folder).pretrained()[found.name]


def test_the_better_row_is_recommended_where_the_difference_is_shown(made: Laboratory) -> None:
    made.family()
    found = only()
    assert (found.start, found.values, found.recipe) == ("mae", {}, "mae_b16")
    said = " ".join(found.evidence)
    assert "simmim_vit 25.5 [24.0, 27.1] % (3 seeds), over its encoder from scratch +15.0 points [" in said
    assert "mae 35.6 [34.2, 37.0] % (3 seeds) is better than simmim_vit, which costs less: +10.1 points [" in said
    assert "Holm p 0.00" in said
    assert "On test images, as a report only: mae_ft 35.6" in said
    row = appended(made, found)
    assert (row.encoder.params()["width"], row.encoder.params()["patch_px"]) == (768, 4)
    assert (row.data, row.fill.name, row.mask.params()["ratio"], row.head.params()["width"]) == (
        "scenes", "drop", 0.75, 512,
    )  # fmt: skip
    assert row.optim.epochs == 1600
    assert "Not tried: the encoder vit (768, 12) and the length, batch and rate of mae_b16" in " ".join(found.unknown)


def test_the_cheapest_is_recommended_where_no_difference_is_shown(made: Laboratory) -> None:
    made.family(mae={0: 0.249, 1: 0.280, 2: 0.251})
    found = only()
    assert (found.start, found.recipe) == ("simmim_vit", "simmim_vit_b16_800")
    said = " ".join(found.evidence)
    assert "No difference was shown between simmim_vit and what costs more (mae) with 3 seeds" in said
    assert appended(made, found).optim.epochs == 800


def test_test_images_choose_nothing(made: Laboratory) -> None:
    made.family(mae={0: 0.249, 1: 0.280, 2: 0.251})
    path = made.root / "runs/downstream/mae_ft/results.json"
    said = json.loads(path.read_text())
    for one in said["seeds"]:
        one["test_score"] = 0.9
    path.write_text(json.dumps(said))
    assert only().start == "simmim_vit"


def test_it_is_said_where_pretraining_was_not_shown_to_pay(made: Laboratory) -> None:
    made.family(mae={0: 0.10, 1: 0.13, 2: 0.09}, simmim={0: 0.09, 1: 0.12, 2: 0.10})
    found = only()
    assert found.start == "simmim_vit"
    said = " ".join(found.evidence)
    assert "No row was shown to be better than its encoder from scratch" in said
    assert "pretraining may not pay here" in said
    assert "Careful: scratch, which is not pretrained, has 10.5" in said


def test_one_seed_shows_nothing(made: Laboratory) -> None:
    made.family(mae={0: 0.9}, simmim={0: 0.3})
    assert only().start == "simmim_vit"
    assert "No row was shown to be better" in only().evidence[0]


def test_what_an_ablation_claims_is_taken_over_and_what_it_does_not_is_not(made: Laboratory) -> None:
    made.family(mae=LOW)
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40})
    found = only()
    assert found.values == {"mask.ratio": 0.8}
    assert found.evidence[-1].startswith("The ablation mask_ratio: 0.8 over 0.6 +10.")
    assert found.evidence[-1].endswith("claimed after Holm's correction. It is taken over.")
    row = appended(made, found)
    assert row.mask.params()["ratio"] == 0.8
    assert row.encoder.params()["width"] == 768
    assert "measured at the shorter budget" in " ".join(found.unknown)
    made.ablation({"0.6": 0.300, "0.3": 0.301, "0.8": 0.299})
    assert only().values == {}
    assert "The ablation mask_ratio: no setting was shown to be better than 0.6." in only().evidence


def test_an_ablation_of_another_row_or_of_other_pieces_changes_nothing(made: Laboratory) -> None:
    made.family()  # recommends mae
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40})
    assert only().values == {}
    assert any("Not taken over, as it began from simmim_vit." in one for one in only().evidence)
    made.family(mae=LOW)
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40}, change={"target": "pixels"})
    assert only().values == {}
    assert any("as all its points differ from simmim_vit in target" in one for one in only().evidence)


def test_a_searchs_pieces_go_together_before_an_ablations(made: Laboratory) -> None:
    made.family(mae=LOW)
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40})
    made.search()
    found = only()
    assert found.values == {"mask": {**PIECES["mask"], "ratio": 0.75}, "head": "mlp"}
    assert any("as it was not tried together with what is" in one for one in found.evidence)
    assert appended(made, found).head.name == "mlp"
    made.search(gain=0.0005)
    assert only().values == {"mask.ratio": 0.8}


def test_an_encoder_without_a_recipe_keeps_its_size(made: Laboratory) -> None:
    (made.root / "params/recipes.yaml").unlink()
    made.family()
    found = only()
    assert found.recipe is None
    assert appended(made, found).encoder.params()["width"] == ENCODER["width"]
    assert "the row has the size that was tried" in " ".join(found.unknown)


def test_without_judged_rows_there_is_nothing_or_what_was_ablated(made: Laboratory) -> None:
    made.family()
    shutil.rmtree(made.root / "runs/downstream")
    assert recommend.recommend(published_results.read()) == []
    text = recommend.as_yaml([])
    assert text.startswith("# Nothing is recommended yet")
    assert yaml.safe_load(text) is None
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40})
    assert (only().start, only().values) == ("simmim_vit", {"mask.ratio": 0.8})


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links |= {value or "" for key, value in attrs if key == "href"}

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_shows_all_of_it_escaped_and_linked(made: Laboratory, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\n  x: 1"
    made.family(mae=LOW)
    made.ablation({"0.6": 0.30, "0.3": 0.20, "0.8": 0.40})
    path = made.root / "runs/ablate/mask_ratio/results.json"
    said = json.loads(path.read_text())
    said["points"][2]["label"] = bad
    path.write_text(json.dumps(said))
    made.search(gain=0.0)
    built = page.build(tmp_path / "report", {"mlflow_url": "http://127.0.0.1:5000"})
    shown = Tags(Path(built["index"]).read_text())
    assert "script" not in shown.tags
    for words in (
        "Ablations",
        "Searches",
        "best row found (trial 6)",
        "Recommended",
        "all runs, each once",
        "importance",
    ):
        assert words in shown.words
    assert {f"http://127.0.0.1:5000/#/runs/run{seed}" for seed in range(3)} <= shown.links
    assert "Ablation mask_ratio" in built["headline"]
    text = (tmp_path / "report/recommended.yaml").read_text()
    assert set(yaml.safe_load(text)) == {"scenes_recommended"}
    assert "ablate,mask_ratio" in (tmp_path / "report/ledger.csv").read_text()


def test_each_number_of_a_seed_in_an_ablation_links_to_its_run(made: Laboratory, tmp_path: Path) -> None:
    made.family()
    made.ablation({"0.6": 0.3, "0.3": 0.2})
    path = made.root / "runs/ablate/mask_ratio/results.json"
    said = json.loads(path.read_text())
    for point in said["points"]:
        point["runs"] = [{**run, "mlflow_run_id": f"{point['label']}-{run['seed']}"} for run in point["runs"][::-1]]
    path.write_text(json.dumps(said))
    text = Path(page.build(tmp_path / "linked", {"mlflow_url": "http://127.0.0.1:5000"})["index"]).read_text()
    linked = re.findall(r'href="[^"]*/runs/(0\.3-\d)" title="seed (\d), MLflow run [^"]*">([\d.]+)</a>', text)
    (low,) = [point for point in said["points"] if point["label"] == "0.3"]
    scores = {run["mlflow_run_id"]: next(iter(run["scores"].values())) for run in low["runs"]}
    assert linked == [(f"0.3-{seed}", str(seed), f"{100 * scores[f'0.3-{seed}']:.1f}") for seed in (0, 1, 2)]
    # Without a server's address the runs are named below their line.
    text = Path(page.build(tmp_path / "named", {})["index"]).read_text()
    assert all(f'title="MLflow run 0.3-{seed}">seed {seed} 0.3-{seed}' in text for seed in (0, 1, 2))
