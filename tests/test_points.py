"""Changes to rows, the points of ablations and the choices of searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from core_pieces import ABLATION, PRETRAIN

from mim_core.changes import changed, label, value_at, words
from mim_core.params import AblationRow, PretrainRow, derived, load, points
from mim_core.spec import SpecError, check

BASE = check(PretrainRow, PRETRAIN, "base")
ROWS = load(Path(__file__).parents[1] / "params")


def ablation(**changes: Any) -> AblationRow:
    return check(AblationRow, {**{key: one for key, one in ABLATION.items() if key != "grid"}, **changes}, "ablation")


def test_a_change_replaces_the_value_at_its_path_and_nothing_else() -> None:
    row = {"mask": {"name": "random", "ratio": 0.6}, "head": "linear", "seed": 0}
    new = changed(row, {"mask.ratio": 0.9, "head": {"name": "mlp"}, "head.hidden": 8})
    assert new == {"mask": {"name": "random", "ratio": 0.9}, "head": {"name": "mlp", "hidden": 8}, "seed": 0}
    assert row == {"mask": {"name": "random", "ratio": 0.6}, "head": "linear", "seed": 0}
    assert value_at(new, "mask.ratio") == 0.9
    assert value_at(new, "mask.unit.px") is None


def test_a_piece_written_as_a_name_can_be_given_params() -> None:
    assert changed({"loss": "l1"}, {"loss.scope": "all"}) == {"loss": {"name": "l1", "scope": "all"}}


def test_a_path_through_nothing_says_where_it_ends() -> None:
    with pytest.raises(ValueError, match=r"adversarial.weight: found None at 'adversarial', which holds no 'weight'"):
        changed({"adversarial": None}, {"adversarial.weight": 1.0})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.6, "0.6"),
        (1.0e-3, "0.001"),
        (None, "none"),
        (True, "yes"),
        ("mlp", "mlp"),
        ([0.2, 0.3], "0.2 to 0.3"),
        ({"name": "random"}, "random"),
        ({"name": "random", "ratio": 0.6, "unit_px": 4}, "random (ratio 0.6, unit_px 4)"),
    ],
)
def test_values_are_said_in_short_words(value: Any, said: str) -> None:
    assert words(value) == said


def test_a_point_of_several_values_names_each_by_the_end_of_its_path() -> None:
    assert label({"mask.ratio": 0.6, "head": "mlp"}) == "ratio 0.6, head mlp"


def test_a_grid_holds_every_combination_and_a_zip_pairs() -> None:
    axes: dict[str, Any] = {"mask.ratio": [0.3, 0.6], "optim.epochs": [5, 9]}
    grid, zipped = (points(ablation(**{form: axes}), BASE, "") for form in ("grid", "zip"))
    assert [(one.row.mask.params()["ratio"], one.row.optim.epochs) for one in grid] == [
        (0.3, 5), (0.3, 9), (0.6, 5), (0.6, 9)
    ]  # fmt: skip
    assert [one.label for one in grid if one.baseline] == ["ratio 0.6, epochs 5"]
    # The pair (0.6, 5) of the base row is not among those zipped: it comes first.
    assert [(one.label, one.baseline) for one in zipped] == [
        ("ratio 0.6, epochs 5", True), ("ratio 0.3, epochs 5", False), ("ratio 0.6, epochs 9", False)
    ]  # fmt: skip


def test_the_baseline_is_the_base_row_with_what_is_changed_in_every_point() -> None:
    found = points(ablation(points={"mlp": {"head": "mlp"}}, change={"optim.epochs": 1}), BASE, "")
    assert [(one.label, one.baseline) for one in found] == [("as it stands", True), ("mlp", False)]
    assert {one.row.optim.epochs for one in found} == {1}
    assert BASE.optim.epochs == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"mask.ratoi": [0.3]}}, "here: 0.3.mask.ratoi: unknown key;* did you mean 'ratio'?"),
        ({"grid": {"data": ["tiny"]}}, "here: tiny: found 'data'; all points share them*"),
        ({"grid": {"mask.ratio": [0.3, 0.30]}}, "here: found values written alike: 0.3, 0.3; delete*"),
        ({"grid": {"adversarial.base": [8]}}, "here: 8.adversarial.base: found None at 'adversarial'*"),
        (
            {"points": {"a": {"mask.ratio": 0.6}, "b": {"head": "linear"}}},
            "here: 'a' and 'b' both come to*",
        ),
    ],
)
def test_bad_points_say_what_is_wrong(changes: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        points(ablation(**changes), BASE, "here")
    at = 0
    for part in message.split("*"):
        at = str(error.value).index(part, at) + len(part)


def test_what_follows_from_the_rows_is_whole_rows() -> None:
    """What the flows read without torch is what the checked rows are."""
    found = derived(ROWS)
    for name, row in ROWS.ablated().items():
        each = points(row, ROWS.pretrained()[row.base], name)
        assert [check(PretrainRow, one["row"], "row") for one in found["points"][name]] == [one.row for one in each]
        assert sum(one["baseline"] for one in found["points"][name]) == 1
        for judge in row.judges:
            assert found["judges"][f"ablate {name}"][judge]["data"] == row.data
    assert {f"search {name}" for name in ROWS.searched()} <= set(found["judges"])


def test_the_papers_ablations_are_there() -> None:
    assert set(ROWS.ablated()) == {
        "mask_ratio", "mask_strategy", "head", "target", "loss", "target_resolution", "loss_scope", "mask_ratio_mae",
        "optimiser", "budget", "adversarial",
    }  # fmt: skip


def test_ablations_of_one_base_share_their_baseline() -> None:
    """It is measured once: its row is the same to the letter."""
    found = derived(ROWS)["points"]
    base = [one["row"] for name in ("mask_ratio", "head", "target", "loss") for one in found[name] if one["baseline"]]
    assert all(row == base[0] for row in base)
