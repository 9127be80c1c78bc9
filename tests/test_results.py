"""The table of published results: intervals, pairing, verdicts and costs, on numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from published import RATES, Published

from flows import results, workspace
from flows.workspace import UserError

SEEDS = {"seeds": [0, 1, 2], "labels": 1000}
# The 97.5 % quantile of Student's t with 2 degrees of freedom, in closed form.
T2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    monkeypatch.delenv("UNMASK_HOME", raising=False)
    made = Published(tmp_path / "work")
    monkeypatch.chdir(made.root)
    workspace.root.cache_clear()
    yield made
    workspace.root.cache_clear()


def by_row(found: results.Published) -> dict[str, results.Arm]:
    return {arm.row: arm for arm in found.arms}


def test_an_arm_has_its_mean_interval_and_paired_difference(published: Published) -> None:
    published.rows(["simmim"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    published.pack()
    published.pretrained("simmim", hours=0.5)
    published.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.34}, hours=0.1)
    published.judged("simmim_ft", "simmim", {0: 0.55, 1: 0.58, 2: 0.58}, hours=0.2)
    found = results.read()
    assert found.absent == []
    scratch, tuned = found.arms
    assert scratch.score.mean == pytest.approx(0.32)
    # The deviation of 0.30, 0.32, 0.34 is 0.02.
    assert scratch.score.half == pytest.approx(T2 * 0.02 / math.sqrt(3), rel=1e-9)
    assert (scratch.verdict, scratch.difference, scratch.baseline) == ("baseline", None, None)
    assert scratch.total_device_hours == pytest.approx(0.1)
    # The differences by seed are 0.25, 0.26, 0.24; unpaired, the interval would be several times wider.
    gain = tuned.difference
    assert gain
    assert gain.mean == pytest.approx(0.25)
    assert gain.half == pytest.approx(T2 * 0.01 / math.sqrt(3), rel=1e-9)
    assert tuned.verdict == "+25.0 points [22.5, 27.5]"
    assert (tuned.baseline, tuned.lr) == ("scratch", 1.0e-3)
    assert tuned.seeds == {0: 0.55, 1: 0.58, 2: 0.58}
    assert (tuned.device_hours, tuned.pretrain_device_hours) == (0.2, 0.5)
    assert tuned.total_device_hours == pytest.approx(0.7)
    assert tuned.wall_seconds == pytest.approx(360)


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ({0: 0.32, 1: 0.31, 2: 0.35}, "no difference (+0.7 points [-3.1, 4.5])"),
        ({0: 0.20, 1: 0.22, 2: 0.24}, "-10.0 points [-10.0, -10.0]"),
        ({0: 0.30, 1: 0.32, 2: 0.34}, "no difference (+0.0 points [0.0, 0.0])"),
    ],
)
def test_a_null_and_a_loss_are_told_as_such(published: Published, accuracies: dict[int, float], verdict: str) -> None:
    published.rows(["simmim"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    published.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.34})
    published.judged("simmim_ft", "simmim", accuracies)
    arm = by_row(results.read())["simmim_ft"]
    assert arm.verdict == verdict


def test_one_seed_claims_no_interval(published: Published) -> None:
    one = {"seeds": [0], "labels": 1000}
    published.rows(["simmim"], {"scratch": one}, {"simmim_ft": {**one, "init": "simmim"}})
    published.judged("scratch", "scratch", {0: 0.30})
    published.judged("simmim_ft", "simmim", {0: 0.55})
    arm = by_row(results.read())["simmim_ft"]
    assert math.isnan(arm.score.half)
    assert arm.verdict == "+25.0 points (one seed: no interval)"
    text = results.markdown([arm])
    assert "55.0 (one seed)" in text
    assert "nan" not in text


def test_only_the_seeds_that_both_have_are_paired(published: Published) -> None:
    published.rows(["simmim"], {"scratch": SEEDS}, {"a": {**SEEDS, "init": "simmim"}, "b": {**SEEDS, "init": "simmim"}})
    published.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.90})
    published.judged("a", "simmim", {0: 0.40, 1: 0.44, 7: 0.10})
    published.judged("b", "simmim", {8: 0.40, 9: 0.44})
    arms = by_row(results.read())
    gain = arms["a"].difference
    assert gain
    assert gain.count == 2
    assert gain.mean == pytest.approx(0.11)
    assert arms["b"].difference is None
    assert arms["b"].verdict == "no seed in common with scratch"


def test_the_baseline_is_the_strongest_with_the_same_task_and_encoder(published: Published) -> None:
    other = {"encoder": {"name": "vit", "patch_px": 8, "width": 48, "depth": 2, "heads": 3}}
    baselines = {"weak": SEEDS, "strong": SEEDS, "larger": {**SEEDS, **other}, "more": {**SEEDS, "labels": 4000}}
    tuned = {"tuned": {**SEEDS, "init": "simmim"}, "alone": {"seeds": [0, 1, 2], "init": "simmim"}}
    published.rows(["simmim"], baselines, tuned)
    for row, accuracy, labels in (
        ("weak", 0.2, 1000),
        ("strong", 0.3, 1000),
        ("larger", 0.9, 1000),
        ("more", 0.8, 4000),
    ):
        published.judged(row, "scratch", dict.fromkeys((0, 1, 2), accuracy), labels)
    published.judged("tuned", "simmim", dict.fromkeys((0, 1, 2), 0.5))
    published.judged("alone", "simmim", dict.fromkeys((0, 1, 2), 0.5), labels=None)
    arms = by_row(results.read())
    assert arms["tuned"].baseline == "strong"
    assert (arms["alone"].baseline, arms["alone"].verdict) == (None, "no baseline")


@pytest.mark.parametrize("named", ["relative", "relative_per_block"])
def test_a_bias_for_each_block_is_what_fine_tuning_makes_of_a_shared_one(published: Published, named: str) -> None:
    vit = {"name": "vit", "patch_px": 4, "width": 48, "depth": 2, "heads": 3}
    own = {"encoder": {**vit, "positions": "relative"}}
    baselines = {"plain": SEEDS, "same": {**SEEDS, "encoder": {**vit, "positions": named}}}
    published.rows({"beit": own}, baselines, {"tuned": {**SEEDS, "init": "beit"}})
    published.judged("plain", "scratch", dict.fromkeys((0, 1, 2), 0.4))
    published.judged("same", "scratch", dict.fromkeys((0, 1, 2), 0.2))
    published.judged("tuned", "beit", dict.fromkeys((0, 1, 2), 0.5))
    assert by_row(results.read())["tuned"].baseline == "same"


def test_what_weights_begin_as_is_no_part_of_the_encoder(published: Published) -> None:
    vit = {"name": "vit", "patch_px": 4, "width": 48, "depth": 2, "heads": 3, "positions": "sincos"}
    own, plain = {"encoder": {**vit, "init": "xavier"}}, {**SEEDS, "encoder": vit}
    published.rows({"mae": own}, {"scratch": plain}, {"ft": {**SEEDS, "init": "mae"}})
    published.judged("scratch", "scratch", {0: 0.30, 1: 0.32, 2: 0.34})
    published.judged("ft", "mae", {0: 0.55, 1: 0.58, 2: 0.58})
    assert by_row(results.read())["ft"].baseline == "scratch"


def test_an_arm_of_another_encoder_is_compared_with_none(published: Published) -> None:
    wider = {"encoder": {"name": "vit", "patch_px": 4, "width": 96, "depth": 2, "heads": 3}}
    published.rows({"wide": wider}, {"scratch": SEEDS}, {"ft": {**SEEDS, "init": "wide"}})
    published.judged("scratch", "scratch", {0: 0.3, 1: 0.3})
    published.judged("ft", "wide", {0: 0.5, 1: 0.5})
    arm = by_row(results.read())["ft"]
    assert (arm.baseline, arm.difference, arm.verdict) == (None, None, "no baseline with this encoder")


def test_a_fitted_row_costs_its_tokenizer_too(published: Published) -> None:
    published.rows([], {}, {"ft": {**SEEDS, "init": "clusters"}}, fitted={"clusters": {}})
    published.pretrained("clusters", hours=0.5)
    published.judged("ft", "clusters", {0: 0.5, 1: 0.5}, hours=0.1)
    found = results.read()
    assert (found.pretrained["clusters"].device_hours, found.arms[0].total_device_hours) == (None, None)
    published.tokenizer("colours", hours=0.25)
    found = results.read()
    assert found.pretrained["clusters"].fitted == "colours"
    assert found.pretrained["clusters"].device_hours == pytest.approx(0.75)
    assert found.arms[0].total_device_hours == pytest.approx(0.85)
    assert found.tokenizers["colours"].manifest["metrics"]["psnr"] == 27.5


def test_what_is_not_published_is_named(published: Published) -> None:
    published.rows(["simmim", "other"], {"scratch": SEEDS}, {"simmim_ft": {**SEEDS, "init": "simmim"}})
    published.judged("simmim_ft", "simmim", {0: 0.5, 1: 0.6, 2: 0.5})
    found = results.read()
    assert set(found.absent) == {"prepare scenes", "pretrain simmim", "pretrain other", "downstream scratch"}
    arm = found.arms[0]
    assert (arm.pretrain_device_hours, arm.total_device_hours) == (None, None)
    assert results.cells(arm)["with pretraining"] == "unknown"


def test_a_broken_file_is_a_fault_with_its_path(published: Published) -> None:
    published.rows([], {"scratch": SEEDS}, {})
    published.judged("scratch", "scratch", {0: 0.3})
    file = published.root / "runs" / "downstream" / "scratch" / "results.json"
    whole = file.read_text()
    file.write_text(whole[:20])
    with pytest.raises(UserError, match=r"scratch/results.json: cannot be read"):
        results.read()
    file.write_text(json.dumps({**json.loads(whole), "seeds": []}))
    with pytest.raises(UserError, match="not a whole result"):
        results.read()


def test_a_curve_keeps_the_cells_that_are_there(published: Published) -> None:
    published.rows(["simmim"], {}, {})
    published.pretrained("simmim")
    path = published.root / "runs" / "pretrain" / "simmim" / "curve.csv"
    cells = sum(bool(cell) for line in csv.DictReader(path.read_text().splitlines()) for cell in line.values())
    curve = results.read().pretrained["simmim"].curve
    assert sum(map(len, curve)) == cells
    assert "hole_psnr" not in curve[0]


def test_a_result_by_other_code_is_marked(published: Published) -> None:
    published.rows([], {"now": SEEDS, "then": SEEDS}, {})
    published.judged("now", "scratch", {0: 0.3, 1: 0.3})
    published.judged("then", "scratch", {0: 0.3, 1: 0.3}, code="0" * 32)
    arms = by_row(results.read())
    assert {row: results.stale(arm.manifest) for row, arm in arms.items()} == {"now": False, "then": True}
    assert results.cells(arms["then"])["arm"] == "then (made by other code)"


def test_tables_have_a_cell_a_column(published: Published) -> None:
    published.rows([], {"scratch": SEEDS}, {})
    published.judged("scratch", "scratch", {0: 0.3, 1: 0.32}, rates=RATES)
    arms = results.read().arms
    header, lines = results.terminal(arms)
    assert [len(line) for line in lines] == [len(header)]
    top, rule, row = results.markdown(arms).splitlines()[:3]
    assert top.count("|") == rule.count("|") == row.count("|")
    assert results.markdown([]) == "No downstream result is published.\n"


@pytest.mark.parametrize(("seconds", "said"), [(41.4, "41 s"), (725, "12 min 05 s"), (12000, "3 h 20 min")])
def test_durations_are_said_in_words(seconds: float, said: str) -> None:
    assert results.duration(seconds) == said
