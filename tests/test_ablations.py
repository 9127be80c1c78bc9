"""Ablations from results files of known numbers: what the tables, sentences and figures say, and do not say."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import ablations, figures, strips
from flows.workspace import UserError

# Around a mean, by seed; sums are zero, so that means are the ones that are given.
NOISE = np.array([[0.004, -0.001, -0.003], [-0.002, 0.004, -0.002], [0.001, 0.001, -0.002], [0.002, -0.003, 0.001]])


def run(seed: int, scores: Mapping[str, float], seconds: float) -> dict[str, Any]:
    return {
        "seed": seed, "mlflow_run_id": f"run{seed}", "scores": dict(scores), "pretrain_seconds": seconds,
        "judge_seconds": dict.fromkeys(scores, 20.0), "device_hours": (seconds + 20) / 3600, "images_seen": 48_000,
        "parameters": 1000, "encoder_parameters": 900, "hidden_share": 0.6, "avg_distance_px": 2.3,
    }  # fmt: skip


def results(
    means: Mapping[str, float],
    values: Sequence[Mapping[str, Any]],
    *,
    name: str = "planted",
    form: str = "grid",
    baseline: int = 0,
    judges: Sequence[str] = ("judge",),
    seeds: Sequence[int] = (0, 1, 2),
    seconds: Sequence[float] = (60.0,) * 12,
    failed: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """A results file with points of these means, which share half a point a seed, and one from scratch at 10 %."""
    lost = failed or {}
    points = []
    for place, (label, mean) in enumerate([*means.items(), ("from scratch", 0.1)]):
        scratch = label == "from scratch"
        points.append({
            "label": label, "values": {} if scratch else values[place], "baseline": place == baseline,
            "scratch": scratch, "row": None if scratch else {"mask": {}},
            "runs": [
                run(seed, {j: mean - 0.1 * k + 0.005 * seed + NOISE[place % 4, seed] for k, j in enumerate(judges)},
                    0.0 if scratch else seconds[place])
                for seed in seeds if seed not in lost.get(label, ())
            ],
            "failed": [{"seed": s, "error": f"Traceback\n ValueError: loss | nan at {s}"} for s in lost.get(label, ())],
        })  # fmt: skip
    return {
        "name": name, "base": "simmim_vit", "change": {"optim.epochs": 4}, "form": form, "axes": list(values[0]),
        "data": {"name": "scenes", "md5": "0" * 32}, "seeds": list(seeds), "wall_seconds": 100.0, "device_hours": 0.3,
        "judges": {j: {"metric": "accuracy", "task": {"name": "classify"}, "labels": 1000} for j in judges},
        "points": points,
    }  # fmt: skip


def ratios(means: Mapping[str, float], **other: Any) -> dict[str, Any]:
    return results(means, [{"mask.ratio": float(label)} for label in means], **other)


def planted(**other: Any) -> ablations.Ablation:
    return ablations.of(ratios({"0.6": 0.3, "0.3": 0.2, "0.7": 0.4, "0.9": 0.301}, **other))


def test_an_effect_is_claimed_and_marked_and_noise_is_not() -> None:
    table = planted().tables[0]
    assert [line.label for line in table.lines] == ["0.6", "0.3", "0.7", "0.9", "from scratch"]
    claimed = {line.label: line.compared.claimed for line in table.lines if line.compared}
    assert claimed == {"0.3": True, "0.7": True, "0.9": False}
    assert [line.label for line in table.lines if line.best] == ["0.7"]
    assert (table.tested, table.count) == (3, 3)
    scratch = table.lines[-1]
    assert scratch.compared is None
    assert scratch.difference
    assert scratch.difference.mean == pytest.approx(-0.2)
    said = ablations.headline(planted())
    assert "0.7 is better than 0.6" in said
    assert "2 of 3 differences" in said


def test_a_table_without_an_effect_says_what_it_would_miss() -> None:
    found = ablations.of(ratios({"0.6": 0.300, "0.3": 0.301, "0.7": 0.299}))
    said = ablations.headline(found)
    share = found.tables[0].detectable
    assert "no difference to 0.6" in said
    assert f"differences below {100 * share:.1f} points would be missed more than one time in five" in said
    text = ablations.markdown(found)
    assert "No point is marked best" in text
    assert "for the 2 comparisons" in text
    assert "| **" not in text


def test_markdown_has_the_papers_form() -> None:
    text = ablations.markdown(planted(seconds=[60, 60, 90, 30]))
    head, _, base, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert head == (
        "| mask.ratio | validation accuracy, % [95 %] | per seed, % | difference, points [95 %] | Holm p | cost "
        "| pretraining |"
    )
    assert base.startswith("| 0.6 (baseline) | 30.5 [")
    assert base.endswith("| 30.4, 30.4, 30.7 | baseline | - | 1.00x | 1 min 00 s |")
    best = next(line for line in text.splitlines() if line.startswith("| **0.7** | **40.5 ["))
    assert "| 1.50x | 1 min 30 s |" in best
    scratch = next(line for line in text.splitlines() if line.startswith("| from scratch"))
    assert scratch.endswith("| - | - | - |")


def test_failed_seeds_and_points_are_there_with_their_reason() -> None:
    found = planted(failed={"0.3": [1], "0.9": [0, 1, 2]})
    text = ablations.markdown(found)
    assert "(1 of 3 seeds failed: ValueError: loss \\| nan at 1) | 19.8, 20.8 |" in text
    assert "| 0.9 | failed: ValueError: loss \\| nan at 0 | - | - | - | - | - |" in text
    table = found.tables[0]
    # The one without runs is no comparison; the one with two seeds is compared over those.
    assert table.tested == 2
    assert {line.label: line.difference.count for line in table.lines if line.difference} == {
        "0.3": 2, "0.7": 3, "from scratch": 3
    }  # fmt: skip
    assert "failed" in ablations.terminal(found)[1][3][1]
    assert figures.ablation(found)


def test_one_seed_makes_a_table_and_no_claim() -> None:
    found = planted(seeds=[0])
    assert "nothing was compared" in ablations.headline(found)
    assert "nothing is tested: there is no claim" in ablations.markdown(found)
    assert not any(line.best for line in found.tables[0].lines)
    assert figures.ablation(found)


def test_csv_has_plain_numbers_for_each_point_and_judge() -> None:
    found = planted(judges=["judge", "probe"], failed={"0.9": [2]})
    lines = list(csv.DictReader(io.StringIO(ablations.table_csv(found))))
    assert [(line["judge"], line["setting"]) for line in lines[::5]] == [("judge", "0.6"), ("probe", "0.6")]
    assert len(lines) == 10
    for line in lines:
        assert all(float(line[key]) is not None for key in list(line)[4:])
    one = lines[2]
    assert (one["mask.ratio"], one["best"], one["baseline"], one["claimed"]) == ("0.7", "1", "0", "1")
    assert float(one["mean"]) == pytest.approx(0.405)
    assert float(one["mean"]) + float(one["error"]) == pytest.approx(float(one["high"]), abs=1e-5)
    assert float(one["difference_mean"]) == pytest.approx(0.1)
    assert (lines[3]["seed_2"], lines[3]["failed"], lines[4]["mask.ratio"]) == ("nan", "1", "nan")


def test_a_terminal_of_120_columns_is_wide_enough() -> None:
    long = {f"{letter}: a head with a name of which nobody sees the end in any table at all": 0.3 for letter in "abc"}
    given = results(long, [{"head": label} for label in long], form="points", judges=["a_judge_with_a_long_name", "b"])
    for found in (planted(), ablations.of(given)):
        head, lines = ablations.terminal(found)
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 120
    assert head[:2] == ["judge", "setting"]
    assert any(name.startswith("a: a head") and name.endswith("\N{HORIZONTAL ELLIPSIS}") for _, name, *_ in lines)


def test_latex_escapes_and_marks_the_best() -> None:
    text = ablations.latex(planted())
    assert "\\toprule\nmask.ratio & validation accuracy, \\% [95 \\%]" in text
    assert "\\textbf{0.7} & \\textbf{40.5 [" in text
    assert text.index("\\midrule\nfrom scratch") < text.index("\\bottomrule")


def test_published_numbers_stand_beside_ours_with_their_scale() -> None:
    means = {"hidden": 0.3, "all": 0.29}
    found = ablations.of(results(means, [{"loss.scope": label} for label in means], name="loss_scope"))
    text = ablations.markdown(found)
    assert "| loss.scope | here, validation accuracy, % | SimMIM (Xie et al., CVPR 2022), % |" in text
    assert "| hidden | 30.5 | 82.8 |" in text
    assert "| all | 29.5 | 81.7 |" in text
    assert "- SimMIM (Xie et al., CVPR 2022): Swin-B, 192 px, 100 epochs of ImageNet-1K, fine-tuned, top-1.\n" in text
    assert "Published" not in ablations.markdown(planted())


def test_every_published_number_has_a_source_and_a_scale_and_is_a_per_cent() -> None:
    for name, entries in ablations.published().items():
        for one in entries:
            assert one.source, name
            assert one.scale, name
            assert all(50 < number < 100 for number in one.numbers.values()), name
    assert ablations.published()["mask_ratio_mae"][0].numbers == {"0.75": 84.9}


def test_summaries_have_names_that_mlflow_takes() -> None:
    means = {"l2": 0.3, "l2 + adversarial, 0.001": 0.2}
    found = ablations.of(results(means, [{"adversarial": label} for label in means], form="points"))
    numbers = ablations.summary(found)
    assert numbers["judge.l2_adversarial_0.001.difference"] == pytest.approx(-0.1)
    assert numbers["judge.claims"] == 1
    assert all(np.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda given: given.pop("points"), "'points' is missing"),
        (lambda given: given["points"][0].update(runs=[]), "no baseline with a run"),
        (lambda given: given["points"][1]["runs"][0]["scores"].clear(), "'judge' is missing"),
        (lambda given: given["points"][1].update(label="0.6"), "two points have the same label"),
        (lambda given: given.update(judges=None), "not a whole ablation"),
    ],
)
def test_a_broken_file_says_what_is_wrong_and_how_to_mend_it(spoil: Any, said: str, tmp_path: Path) -> None:
    given = json.loads(json.dumps(ratios({"0.6": 0.3, "0.3": 0.2})))
    spoil(given)
    with pytest.raises(UserError, match=said) as caught:
        ablations.of(given, {}, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "results.json"))
    assert "run `unmask ablate planted` again" in str(caught.value)


def test_figures_are_pictures_that_equal_results_make_equal() -> None:
    crossed = {f"ratio {a}, unit {b}": {"mask.ratio": a, "mask.unit_px": b} for a in (0.3, 0.6) for b in (4, 8)}
    grid = ablations.of(results(dict.fromkeys(crossed, 0.3), list(crossed.values())))
    heads = {label: {"head": label} for label in ("linear", "mlp")}
    words = ablations.of(results(dict.fromkeys(heads, 0.3), list(heads.values()), form="points", name="head"))
    epochs = {str(count): {"optim.epochs": count} for count in (1, 2, 4, 8)}
    line = ablations.of(
        results(dict.fromkeys(epochs, 0.3), list(epochs.values()), name="budget", seconds=[15, 30, 60, 120])
    )
    assert (ablations.axis(line), ablations.axis(grid), ablations.axis(words)) == ("optim.epochs", None, None)
    for found in (grid, words, line):
        drawn = figures.ablation(found)
        assert Image.open(io.BytesIO(drawn)).width == figures.WIDTH_IN * figures.DPI
    assert figures.ablation(words) == figures.ablation(words)


def test_recoveries_of_all_points_are_one_picture(tmp_path: Path) -> None:
    """The same images a row; a column for the original, what is seen of it, and each point."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pictures = {key: rng.integers(0, 255, (5, 1, 8, 16), np.uint8) for key in ("originals", "composites")}
        np.savez(tmp_path / f"{name}.npz", **pictures, hidden=rng.random((5, 8, 16)) < 0.5)
    drawn = Image.open(io.BytesIO(strips.recovered({name: tmp_path / f"{name}.npz" for name in ("a", "b")})))
    # Four columns of images twice as wide as high, in four rows.
    assert drawn.width > 1.2 * drawn.height
    assert strips.recovered({})
