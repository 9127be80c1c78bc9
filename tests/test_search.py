"""A search's study: what it tries, that it keeps its budget, and that a kill changes nothing. Measured scores are made
up here, by a law; the flow with its real workers is below, among the slow tests."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Clone, Tried, make_clone
from optuna.trial import TrialState

from flows import warm, workspace
from flows.spaces import Choice, Scale, Space, same, tokenizers
from flows.study import COMPLETE, FAIL, HOUR, PRUNED, Course, Ongoing, latest, masked, places, storage_address
from flows.workers import wait_until
from mim_core.params import PretrainRow
from mim_core.spec import check

BASE = check(
    PretrainRow,
    {
        "data": "scenes",
        "encoder": {"name": "vit", "patch_px": 4, "width": 32, "depth": 2, "heads": 2, "positions": "sincos"},
        "mask": {"name": "random", "ratio": 0.6, "unit_px": 4},
        "fill": "mask_token",
        "head": "linear",
        "target": "pixels",
        "loss": "l1",
        "optim": {"lr": 1.0e-3, "batch": 32, "epochs": 8, "clip": 5.0},
    },
    "base",
).model_dump(mode="json")
SEARCH: dict[str, Any] = {
    "change": {"optim.epochs": 4},
    "space": {
        "mask.ratio": {"low": 0.3, "high": 0.9, "step": 0.1, "log": False},
        "optim.lr": {"low": 1.0e-4, "high": 1.0e-2, "step": None, "log": True},
        "optim.batch": {"low": 16, "high": 64, "step": 16, "log": False},
        "head": ["linear", {"name": "mlp"}],
        "goal": {
            "pixels": {"target": "pixels", "loss": "l1"},
            "hog": {"target": {"name": "hog", "cell_px": 2}, "loss": "l2"},
        },
    },
    "sampler": {"name": "tpe", "startup": 4},
    "pruner": {"name": "asha", "reduction": 2, "evaluations": 4, "labels": 64},
    "trials": 12,
    "budget_device_hours": 1000.0,
    "seed": 0,
    "trial_seeds": [0],
    "seeds": [1, 2],
    "warm_start": [],
    "storage": None,
}
SECONDS = 10.0
"""What a whole trial costs here."""
Hook = Callable[[str], None]


def course(folder: Path, workers: int = 1, name: str = "made_up", **changes: Any) -> Course:
    search = {**SEARCH, **changes}
    return Course(name, search, Space(search, BASE), "key", folder, workers)


def law(settings: Mapping[str, Any]) -> float:
    """A score with one summit, at lr 3e-3 and a ratio of 0.7."""
    off = math.log10(settings["optim.lr"] / 3e-3) ** 2 + (settings["mask.ratio"] - 0.7) ** 2
    return 0.5 * math.exp(-2 * off) + (0.05 if settings["goal"] == "hog" else 0.0)


def measure(course: Course, one: Ongoing, hook: Hook = lambda event: None, seconds: float = SECONDS) -> None:
    """Pretrain and judge a trial as the flow does, with made-up numbers."""
    for step in range(1, 5):
        hook(f"probe {step}")
        one.seconds["pretrain"] = seconds * step / 5
        course.follow(one, [{"step": step * 25, "steps": 100, "probe_score": law(one.settings) * (0.5 + step / 10)}])
        if course.ends(one):
            break
    hook("end")
    if one.pruned:
        course.finish(one, PRUNED)
    elif one.stopped:
        one.keep(stopped=True)
        course.finish(one, FAIL)
    else:
        one.seconds["judge"] = seconds / 5
        course.finish(one, COMPLETE, law(one.settings), cost=seconds)


def run(course: Course, hook: Hook = lambda event: None) -> list[dict[str, Any]]:
    while one := course.next():
        hook("begun")
        measure(course, one, hook)
    return course.report()


def killed_at(moment: int, work: Callable[[Hook], Any]) -> None:
    """Begin a search in a process of its own, and kill that at its n-th event."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        events = iter(range(1000))

        def hook(event: str) -> None:
            if next(events) == moment:
                os.write(writer, b"x")
                time.sleep(600)

        try:
            work(hook)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x", "it ended before"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(course(tmp_path_factory.mktemp("undisturbed")))


def test_settings_make_rows_and_rows_tell_their_settings() -> None:
    space = Space(SEARCH, BASE)
    assert space.settings(space.default) == {
        "mask.ratio": 0.6, "optim.lr": 1e-3, "optim.batch": 32, "head": "linear", "goal": "pixels"
    }  # fmt: skip
    rng = random.Random(0)
    for _ in range(20):
        chosen: dict[str, Any] = {}
        for axis in space.axes:
            if isinstance(axis, Choice):
                chosen[axis.name] = rng.choice(list(axis.labels))
            else:
                steps = round((axis.high - axis.low) / axis.step) if axis.step else 0
                by_step = axis.low + (axis.step or 0) * rng.randint(0, steps)
                chosen[axis.name] = by_step if axis.step else 10 ** rng.uniform(-4, -2)
        row = space.row(chosen)
        assert same(check(PretrainRow, row, "row").model_dump(mode="json"), row)
        found = space.settings(row)
        assert found == space.tidy(chosen)
        assert isinstance(row["optim"]["batch"], int)
        assert len(str(row["mask"]["ratio"])) == 3
        assert row["optim"]["epochs"] == 4
        assert (row["target"]["name"], row["loss"]["name"]) == (
            ("hog", "l2") if chosen["goal"] == "hog" else ("pixels", "l1")
        )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mask", {"name": "random", "ratio": 0.65, "unit_px": 4}),
        ("loss", "smooth_l1"),
        ("optim.lr", 0.1),
        ("optim.clip", 1.0),
    ],
)
def test_a_row_outside_the_space_has_no_settings(path: str, value: Any) -> None:
    space = Space(SEARCH, BASE)
    other = Space({**SEARCH, "change": {**SEARCH["change"], path: value}}, BASE).default
    assert space.settings(other) is None


def test_settings_that_make_no_row_say_why() -> None:
    space = Space(
        {**SEARCH, "space": {"mask": [{"name": "random", "ratio": 0.5}, {"name": "random", "rato": 0.5}]}}, BASE
    )
    wrong = next(label for label in space.axes[0].labels if "rato" in label)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="rato"):
        space.row({"mask": wrong})


def test_tokenizers_of_every_choice_are_found() -> None:
    search = {
        **SEARCH,
        "space": {"target": {"a": {"target": {"name": "tokens", "fitted": "codes"}}, "b": {"target": "pixels"}}},
    }
    assert tokenizers(search, BASE) == ["codes"]
    assert tokenizers({**SEARCH, "space": {"target": ["pixels", {"name": "tokens", "fitted": "dvae"}]}}, BASE) == [
        "dvae"
    ]
    assert tokenizers(SEARCH, BASE) == []


def test_the_first_trial_is_the_default_row_and_the_rest_is_sampled(undisturbed: list[dict[str, Any]]) -> None:
    assert [one["place"] for one in undisturbed] == list(range(12))
    assert undisturbed[0]["settings"] == Space(SEARCH, BASE).settings(Space(SEARCH, BASE).default)
    assert [one["origin"] for one in undisturbed] == ["default row", *["sampler"] * 11]
    assert max(one["score"] or 0 for one in undisturbed) > undisturbed[0]["score"]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "gp"])
def test_a_seed_makes_the_same_trials_and_another_seed_others(sampler: str, tmp_path: Path) -> None:
    given = {"sampler": {"name": sampler, "startup": 3}, "trials": 5}
    first, again, other = (
        run(course(tmp_path / name, **given, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert [one["settings"] for one in first[1:]] != [one["settings"] for one in other[1:]]
    assert len({json.dumps(one["settings"]) for one in first}) == 5


@pytest.mark.parametrize("pruner", ["asha", "hyperband"])
def test_a_search_killed_at_any_moment_ends_as_an_undisturbed_one(pruner: str, tmp_path: Path) -> None:
    given = {"pruner": {**SEARCH["pruner"], "name": pruner}, "trials": 9}
    undisturbed = run(course(tmp_path / "undisturbed", **given))
    assert {"pruned", "complete"} <= {one["state"] for one in undisturbed}
    for moment in (3, 7, 8, 13):
        killed_at(moment, lambda hook: run(course(tmp_path / "killed", **given), hook))
    assert run(course(tmp_path / "killed", **given)) == undisturbed


def test_a_finished_search_tries_nothing_more(tmp_path: Path) -> None:
    there = course(tmp_path, trials=4)
    run(there)
    there.close()
    assert course(tmp_path, trials=4).next() is None
    longer = course(tmp_path, trials=5)
    one = longer.next()
    assert one
    assert one.place == 4
    longer.leave(one)


def test_trials_that_lag_are_pruned_and_the_default_row_never_is(tmp_path: Path) -> None:
    there = course(tmp_path, sampler={"name": "random", "startup": 1})
    bad = {
        **{axis.name: value for axis, value in zip(there.space.axes, (0.6, 1e-3, 32, "linear", "pixels"), strict=True)}
    }
    run(there)
    states = [one["state"] for one in there.report()]
    assert states[0] == "complete"
    assert "pruned" in states
    pruned = [one for one in there.report() if one["state"] == "pruned"]
    assert all(one["score"] is None and 1 <= len(one["reports"]) <= 4 for one in pruned)
    assert all(one["device_seconds"] < SECONDS for one in pruned)
    # One that is planted to be far worse than all is ended at its first probe.
    there.study.enqueue_trial({**bad, "optim.lr": 1e-4, "mask.ratio": 0.3}, user_attrs={"origin": "sampler"})
    planted = there.next()
    assert planted
    measure(there, planted)
    assert list(there.report()[-1]["reports"]) == ["1"]
    assert there.report()[-1]["state"] == "pruned"


def test_without_a_pruner_every_trial_runs_to_its_end(tmp_path: Path) -> None:
    there = run(course(tmp_path, trials=5, pruner={**SEARCH["pruner"], "name": "none"}))
    assert [one["state"] for one in there] == ["complete"] * 5


def hours(seconds: float) -> float:
    return seconds / HOUR


@pytest.mark.parametrize("workers", [1, 2])
def test_the_budget_holds_trials_and_the_final_comparison(workers: int, tmp_path: Path) -> None:
    # A whole trial and four runs of the final comparison cost 50 s of a worker; the rest is for more trials.
    given = {"budget_device_hours": hours(120) / workers, "trials": 100, "pruner": {**SEARCH["pruner"], "name": "none"}}
    there = course(tmp_path, workers, **given)
    run(there)
    assert there.spent() + there.reserve() <= there.budget == pytest.approx(120)
    assert len(there.report()) == 7  # 7 x 10 s, and 1.1 x 4 x 10 s reserved: one more would exceed 120 s
    there.close()
    for seed in (1, 2):
        there.note_final(f"default {seed}", SECONDS)
        there.note_final(f"{there.label(there.best())} {seed}", SECONDS)
    assert there.spent() <= there.budget
    assert there.reserve() == 0
    assert course(tmp_path, workers, **given).next() is None


def test_a_run_of_the_comparison_costs_a_trials_share_of_one_seed(tmp_path: Path) -> None:
    reserved = []
    for seeds in ([0], [0, 3]):
        there = course(tmp_path, name=f"of_{len(seeds)}", trials=1, trial_seeds=seeds)
        run(there)
        reserved.append(there.reserve())
    # The default row is as yet the best: two arms of two seeds, a tenth more than the trial took.
    assert reserved == [pytest.approx(1.1 * 4 * SECONDS), pytest.approx(1.1 * 4 * SECONDS / 2)]


def test_a_budget_that_cannot_hold_the_comparison_is_refused_after_one_trial(tmp_path: Path) -> None:
    with pytest.raises(workspace.UserError, match=r"budget_device_hours: found .* alone take 0\.015"):
        run(course(tmp_path, budget_device_hours=hours(40)))


def test_a_trial_that_meets_the_budget_is_stopped_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    given = {"trials": 3, "pruner": {**SEARCH["pruner"], "name": "none"}}
    there = course(tmp_path, budget_device_hours=hours(100), **given)
    one = there.next()
    assert one
    measure(there, one)
    long = there.next()
    assert long
    measure(there, long, seconds=200)
    assert there.report()[1]["state"] == "stopped"
    assert there.next() is None
    again = course(tmp_path, budget_device_hours=hours(1000), **given)
    taken = again.next()
    assert taken
    assert (taken.place, taken.settings) == (1, long.settings)
    assert again.spent() == pytest.approx(SECONDS + long.spent)
    measure(again, taken, seconds=SECONDS)
    assert [one["place"] for one in run(again)] == [0, 1, 2]


def test_a_trial_that_fails_is_kept_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    there = course(tmp_path, trials=4)
    while one := there.next():
        if one.place == 1:
            there.finish(one, FAIL, error="mask.ratio: it does not fit")
        else:
            measure(there, one)
    states = {one["place"]: (one["state"], one["error"]) for one in there.report()}
    assert states[1] == ("failed", "mask.ratio: it does not fit")
    assert {state for place, (state, _) in states.items() if place != 1} <= {"complete", "pruned"}


def test_a_trial_whose_machine_fell_silent_is_queued_again_in_its_place(tmp_path: Path) -> None:
    there = course(tmp_path, trials=3)
    one = there.next()
    assert one
    one.keep(owner={"host": "elsewhere", "pid": 1, "born": 0.0})
    there.leave(one)
    other = course(tmp_path, trials=3)
    second = other.next()
    assert second
    assert second.place == 1  # the silent one may live
    measure(other, second)
    other.study.tell(one.trial.number, state=TrialState.FAIL)  # as a stale heartbeat does
    other.again(other.study, other.trials()[one.trial.number])
    taken = other.next()
    assert taken
    assert (taken.place, taken.settings, taken.trial.number) == (0, one.settings, 2)
    measure(other, taken)
    run(other)
    assert sorted(places(other.trials()).values()) == [0, 0, 1, 2]
    assert {place: trial.number for place, trial in latest(other.trials()).items()} == {0: 2, 1: 1, 2: 3}
    assert [one["place"] for one in other.report()] == [0, 1, 2]


def test_two_workers_measure_the_number_of_trials_that_was_asked_for(tmp_path: Path) -> None:
    there = course(tmp_path, 2, trials=6)
    running: list[Ongoing] = []
    while True:
        while len(running) < 2 and (one := there.next()):
            running.append(one)
        if not running:
            break
        measure(there, running.pop(0))
    assert sorted(one["place"] for one in there.report()) == list(range(6))


def ablation(
    folder: Path,
    rows: Mapping[str, Any],
    judges: Mapping[str, Any],
    md5: str,
    seeds: Sequence[int] = (0, 1),
    code: str | None = None,
) -> None:
    """Publish an ablation with a point a row; scores are 0.30, 0.32, ... for seed 0 and 0.1 more for those above."""
    folder.mkdir(parents=True)
    (judge,) = judges
    points = [
        {
            "label": label,
            "row": row,
            "scratch": False,
            "runs": [{"seed": seed, "scores": {judge: 0.30 + 0.02 * index + 0.1 * bool(seed)}} for seed in seeds],
            "failed": [],
        }
        for index, (label, row) in enumerate(rows.items())
    ]
    scratch = {"label": "from scratch", "row": None, "scratch": True, "runs": [], "failed": []}
    workspace.write_json(
        folder / "results.json", {"data": {"name": "scenes", "md5": md5}, "points": [*points, scratch]}
    )
    manifest = {"code": code or workspace.code_fingerprint(), "params": {"judges": judges}}
    workspace.write_json(folder / "manifest.json", manifest)


def test_ablations_are_told_first_and_what_does_not_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "run_folder", lambda kind, row: tmp_path / kind / row)
    space, judge, data = Space(SEARCH, BASE), {"judge_1000": {"lr_grid": [0.001]}}, {"name": "scenes", "md5": "m"}
    rows = {f"{ratio:g}": space.row({**space.settings(space.default), "mask.ratio": ratio}) for ratio in (0.3, 0.9)}  # type: ignore[dict-item]
    rows["0.65"] = {**rows["0.3"], "mask": {**rows["0.3"]["mask"], "ratio": 0.65}}
    for name, changes in (
        ("ratio", {}),
        ("seeds", {"seeds": (1, 2)}),
        ("other_data", {"md5": "other"}),
        ("other_judge", {"judges": {"judge_1000": {"lr_grid": [0.1]}}}),
        ("old_code", {"code": "old"}),
    ):
        ablation(tmp_path / "ablate" / name, rows, **{"judges": judge, "md5": "m", **changes})
    names = ["ratio", "seeds", "other_data", "other_judge", "old_code", "absent"]
    told = warm.known(names, space, judge, data, [0])
    assert [(one["settings"]["mask.ratio"], one["score"], one["origin"]) for one in told["taken"]] == [
        (0.3, 0.30, "ablation ratio (seed 0)"),
        (0.9, 0.32, "ablation ratio (seed 0)"),
        (0.3, pytest.approx(0.40), "ablation seeds (seeds 1, 2)"),
        (0.9, pytest.approx(0.42), "ablation seeds (seeds 1, 2)"),
    ]
    said = "\n".join(told["left"])
    for part in (
        "0.65: its row is outside",
        "other_data: it is of other data, or of another pack of the same",
        "other_judge: its judges are not judge_1000",
    ):
        assert part in said
    # Trials of several seeds are scored over them, and so is what is told of an ablation that has them all.
    several = warm.known(["ratio", "seeds"], space, judge, data, [1, 0])["taken"]
    assert [(one["score"], one["origin"]) for one in several[::2]] == [
        (pytest.approx(0.35), "ablation ratio (seeds 1, 0)"),
        (pytest.approx(0.40), "ablation seeds (seeds 1, 2)"),
    ]
    assert "old_code: it is of other code" in said
    assert "absent: it is not published" in said
    there = course(tmp_path, trials=2)
    there.tell(lambda: told)
    report = run(there)
    assert [one["place"] for one in report] == [None] * 4 + [0, 1]
    assert [one["score"] for one in report[:4]] == [0.30, 0.32, pytest.approx(0.40), pytest.approx(0.42)]
    # A search that goes on knows what it knew.
    assert course(tmp_path, trials=2).tell(lambda: {"taken": [], "left": []}) == told
    assert len(course(tmp_path, trials=2).report()) == 6


def test_an_address_with_its_password_is_never_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "postgresql+psycopg://me:secret@127.0.0.1:1/studies"
    assert "secret" not in masked(secret)
    assert "me" in masked(secret)
    with pytest.raises(workspace.UserError, match="it holds a password") as refused:
        storage_address({"storage": secret}, tmp_path / "a.db")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("UNMASK_OPTUNA_STORAGE", secret)
    assert storage_address({"storage": None}, tmp_path / "a.db") == secret
    with pytest.raises(workspace.UserError, match="does not open") as unanswered:
        course(tmp_path)
    assert "secret" not in str(unanswered.value)
    monkeypatch.setenv("UNMASK_OPTUNA_STORAGE", "mysql://me:secret@127.0.0.1/studies")
    with pytest.raises(workspace.UserError, match="must begin with postgresql") as wrong:
        course(tmp_path)
    assert "secret" not in str(wrong.value)


def test_numbers_of_the_space_stay_in_their_range() -> None:
    scale = Scale("optim.lr", 1e-4, 1e-2, None, True)
    assert scale.find({"optim": {"lr": 1e-2}}) == [1e-2]
    assert scale.find({"optim": {"lr": 2e-2}}) == []
    assert scale.find({"optim": {"lr": None}}) == []
    whole = Scale("optim.epochs", 2, 8, 2, False)
    assert whole.find({"optim": {"epochs": 4.0}}) == [4]
    assert whole.find({"optim": {"epochs": 5.0}}) == []
    assert whole.changes(4) == {"optim.epochs": 4}


def one_worker(clone: Clone) -> subprocess.Popen[str]:
    """Begin the search with one core to itself, so that one trial runs after another."""
    core = min(os.sched_getaffinity(0))
    begin = (
        f"import os, runpy; os.sched_setaffinity(0, [{core}]); runpy.run_module('flows.search', run_name='__main__')"
    )
    return clone.start(sys.executable, "-c", f"import sys; sys.argv = ['search', 'recipe']; {begin}")


def outcome(clone: Clone) -> dict[str, Any]:
    """What a search came to, without what differs from run to run: times, and the ids of records."""
    said = json.loads((clone.folder / "runs/search/recipe/results.json").read_text())
    runs = [run for arm in said["finals"].values() for run in arm.values()]
    for one in (*said["trials"], *runs):
        for key in ("device_seconds", "device_hours", "mlflow_run_id"):
            one.pop(key, None)
    return {key: said[key] for key in ("trials", "importances", "best", "default", "finals")}


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.orchestration
def test_a_flow_and_a_worker_killed_mid_trial_end_as_an_undisturbed_search(tmp_path: Path, tried: Tried) -> None:
    outcomes = []
    for name in ("undisturbed", "killed"):
        clone = make_clone(tmp_path / name)
        clone.unmask("data", "restore")
        clone.run(sys.executable, "-m", "flows.prepare", "scenes")
        if name == "killed":
            for victim in ("flow", "worker"):
                process = one_worker(clone)
                points = clone.folder / ".unmask" / "points"
                busy = next(iter(wait_for(lambda points=points: unfinished(points))))  # type: ignore[misc]
                pid = process.pid if victim == "flow" else int((busy / "worker.pid").read_text())
                children = psutil.Process(process.pid).children()
                os.kill(pid, signal.SIGKILL)
                if victim == "worker":
                    said, _ = process.communicate(timeout=900)  # the job is gone on with, inside its trial
                    assert process.returncode == 0, said
                else:
                    process.wait()
                    for server in (one for one in children if "uvicorn" in one.cmdline()):
                        server.kill()  # Prefect's own temporary one, which outlives a flow that is killed
                    process.communicate()
        else:
            said, _ = one_worker(clone).communicate(timeout=900)
            assert "Traceback" not in said
        outcomes.append(outcome(clone))
        trials = outcomes[-1]["trials"]
        assert [one["place"] for one in trials] == [0, 1, 2, 3]
        # The same command again reads all.
        before = measured_at(clone)
        said, _ = one_worker(clone).communicate(timeout=900)
        assert measured_at(clone) == before
        assert outcome(clone) == outcomes[-1]
    assert outcomes[0] == outcomes[1]
    tried("SIGKILL of a search's flow, and of its worker", 2, "no trial lost or measured twice, the same result")


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.orchestration
def test_servers_killed_under_a_search_change_nothing(tmp_path: Path, tried: Tried) -> None:
    """Both get kill -9; whether the flow lives through it or not, the same command ends as an undisturbed search."""
    outcomes = []
    for name in ("undisturbed", "killed"):
        clone = make_clone(tmp_path / name)
        points = clone.folder / ".unmask" / "points"
        try:
            clone.unmask("data", "restore")
            clone.unmask("up")
            clone.run(sys.executable, "-m", "flows.prepare", "scenes")
            process = one_worker(clone)
            if name == "killed":
                wait_for(lambda points=points: list(points.glob("*/result.json")))  # type: ignore[misc]
                for server in json.loads((clone.folder / ".unmask" / "servers.json").read_text()).values():
                    os.killpg(server["pid"], signal.SIGKILL)
                process.communicate(timeout=900)
                before = measured_at(clone)
                clone.unmask("up")
                process = one_worker(clone)
            said, _ = process.communicate(timeout=900)
            assert process.returncode == 0, said
            outcomes.append(outcome(clone))
            if name == "killed":
                assert before.items() <= measured_at(clone).items(), "a finished measurement was run again"
        finally:
            clone.unmask("down")
    assert outcomes[0] == outcomes[1]
    tried("SIGKILL of both servers during a search", 1, "no trial lost or measured twice, the same result")


def measured_at(clone: Clone) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in clone.folder.glob(".unmask/points/*/result.json")}


def unfinished(points: Path) -> list[Path]:
    """Folders of measurements that have a checkpoint and no result: their worker is at work."""
    begun = [path.parent for path in points.glob("*/checkpoints") if any(path.iterdir())]
    return [folder for folder in begun if not (folder / "result.json").exists()]


def wait_for(found: Callable[[], list[Path]], seconds: float = 600) -> list[Path]:
    there: list[Path] = []

    def look() -> bool:
        there[:] = found()
        return bool(there)

    assert wait_until(look, seconds, every=0.02)
    return there
