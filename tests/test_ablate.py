"""An ablation on real servers: what it leaves behind, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Clone, Tried, make_clone, prefect
from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.orchestration,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def results(clone: Clone, name: str = "mask_ratio") -> dict[str, Any]:
    return dict(json.loads((clone.folder / "runs" / "ablate" / name / "results.json").read_text()))


def scores(found: dict[str, Any]) -> dict[str, dict[int, float]]:
    """The first judge's score by point and seed."""
    return {
        point["label"]: {run["seed"]: next(iter(run["scores"].values())) for run in point["runs"]}
        for point in found["points"]
    }


def client(clone: Clone) -> MlflowClient:
    return MlflowClient(f"http://127.0.0.1:{clone.environment['UNMASK_MLFLOW_PORT']}")


def test_every_point_is_measured_over_every_seed_beside_the_encoder_from_scratch(served: Clone) -> None:
    found = results(served)
    assert {label: set(of) for label, of in scores(found).items()} == {
        label: {0, 1} for label in ("0.3", "0.6", "0.9", "from scratch")
    }
    assert [point["label"] for point in found["points"] if point["baseline"]] == ["0.6"]
    for point in found["points"]:
        assert not point["failed"]
        for run in point["runs"]:
            # A grid cell of 8 x 8 patches less or more, as a whole number of them is hidden.
            if point["row"]:
                assert run["hidden_share"] == pytest.approx(point["row"]["mask"]["ratio"], abs=1 / 64)
            assert run["pretrain_seconds"] == 0 or point["row"]


def test_points_share_what_is_random(served: Clone) -> None:
    """The encoder from scratch, which no axis reaches, scores the same in both ablations of the clone."""
    first, second = (scores(results(served, name))["from scratch"][0] for name in ("mask_ratio", "targets"))
    assert first == second


def test_a_point_of_two_ablations_is_measured_once(served: Clone) -> None:
    for kind in ("pretrain", "downstream"):
        folders = [one for one in (served.folder / ".unmask" / "points").iterdir() if one.name.startswith(kind)]
        assert folders
        for folder in folders:
            assert not (folder / "checkpoints").exists(), "what nobody reads again is dropped"
        # What else is there are trials of the search that were pruned.
        unfinished = [folder for folder in folders if not (folder / "result.json").exists()]
        assert len(unfinished) <= (kind == "pretrain") * len(folders) / 2


def test_mlflow_holds_a_run_a_point_and_the_axis_as_a_curve(served: Clone) -> None:
    found, there = results(served), client(served)
    manifest = json.loads((served.folder / "runs/ablate/mask_ratio/manifest.json").read_text())
    (experiment,) = (one for one in there.search_experiments() if one.name == "unmask")
    asked = f"tags.ablation = 'mask_ratio' and tags.data_md5 = '{found['data']['md5']}'"
    runs = there.search_runs([experiment.experiment_id], asked)
    assert {(run.data.tags["point"], int(run.data.tags["seed"])) for run in runs} == {
        (label, seed) for label, of in scores(found).items() for seed in of
    }
    for run in runs:
        assert run.data.tags["mlflow.parentRunId"] == manifest["mlflow_run_id"]
        assert run.info.status == "FINISHED"
        score = scores(found)[run.data.tags["point"]][int(run.data.tags["seed"])]
        assert run.data.metrics["validation_score"] == pytest.approx(score)
        assert next(iter(run.data.metrics)) == "validation_score", "the first is what the page that compares shows"
        if run.data.tags["point"] != "from scratch":
            assert set(run.data.params) == {"mask.ratio", "point", "seed"}
            assert run.data.params["mask.ratio"] == run.data.tags["point"]
            assert there.get_metric_history(run.info.run_id, "loss")
    curve = there.get_metric_history(manifest["mlflow_run_id"], "accuracy_by_mask.ratio_percent")
    means = {round(100 * float(label)): sum(of.values()) / 2 for label, of in scores(found).items() if label[0] == "0"}
    assert {point.step: pytest.approx(point.value) for point in curve} == means
    names = {artifact.path for artifact in there.list_artifacts(manifest["mlflow_run_id"])}
    assert {"table.md", "table.csv", "figure.png", "recoveries.png", "results.json"} <= names


def test_a_label_that_mlflow_takes_for_no_name_costs_no_record(served: Clone) -> None:
    manifest = json.loads((served.folder / "runs/ablate/targets/manifest.json").read_text())
    parent = client(served).get_run(manifest["mlflow_run_id"])
    assert parent.data.params["points.pixels raw.target"] == "pixels"
    assert parent.data.metrics


def test_prefect_shows_a_task_a_point_and_the_table(served: Clone) -> None:
    manifest = json.loads((served.folder / "runs/ablate/mask_ratio/manifest.json").read_text())
    tasks = prefect(
        served, "/task_runs/filter", {"flow_runs": {"id": {"any_": [manifest["prefect_flow_run_id"]]}}, "limit": 100}
    )
    assert {task["name"] for task in tasks} >= {f"{label}, seed {seed}" for label in ("0.3", "0.9") for seed in (0, 1)}
    (shown,) = prefect(served, "/artifacts/filter", {"artifacts": {"key": {"any_": ["ablation-mask-ratio"]}}})
    assert "from scratch" in shown["data"]


def test_an_ablation_that_has_run_is_not_stale(served: Clone) -> None:
    said = served.unmask("ablate", "mask_ratio")
    assert "didn't change" in said
    assert "from scratch" in said
    assert "Running stage" not in said


def test_an_unknown_ablation_names_the_nearest(served: Clone) -> None:
    said = served.unmask("ablate", "mask_ration", fails=True)
    assert "did you mean 'mask_ratio'?" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def alone(served: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A packed clone whose ablation lasts some seconds a point; it records on the servers of the other."""
    clone = make_clone(tmp_path_factory.mktemp("killed") / "clone")
    ports = {name: served.environment[f"UNMASK_{name}_PORT"] for name in ("PREFECT", "MLFLOW")}
    clone.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{ports['PREFECT']}/api"
    clone.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{ports['MLFLOW']}"
    clone.edit("params/ablations.yaml", ("optim.epochs: 2", "optim.epochs: 12"))
    clone.unmask("data", "restore")
    clone.run(sys.executable, "-m", "flows.prepare", "scenes")
    return clone


def ablate(clone: Clone, home: Path) -> Any:
    clone.environment["UNMASK_HOME"] = str(home)
    return clone.start(sys.executable, "-m", "flows.ablate", "mask_ratio")


def finished(home: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in (home / "points").glob("*/result.json")}


def wait(true: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.reliability
@pytest.mark.slow
def test_a_killed_ablation_loses_no_point_runs_none_twice_and_ends_in_the_same_table(
    alone: Clone, tmp_path: Path, tried: Tried
) -> None:
    undisturbed = ablate(alone, tmp_path / "undisturbed")
    output, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, output
    expected = results(alone)

    killed = tmp_path / "killed"
    process = ablate(alone, killed)
    wait(lambda: len(finished(killed)) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = finished(killed)
    # Its workers end with it, or their points would be run beside it.
    assert len(before) < len(finished(tmp_path / "undisturbed"))
    again = ablate(alone, killed)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert scores(results(alone)) == scores(expected)
    after = finished(killed)
    assert {name: after[name] for name in before} == before, "a finished point was run again"
    assert after.keys() == finished(tmp_path / "undisturbed").keys()
    tried("SIGKILL of the flow of an ablation", 1, "no point lost or measured twice, the same table")


def test_a_point_that_fails_is_in_the_table_and_stops_no_other(alone: Clone, tmp_path: Path) -> None:
    # A rate at which the loss is not finite, which no check can tell beforehand.
    text = (alone.folder / "params/ablations.yaml").read_text()
    try:
        alone.edit(
            "params/ablations.yaml", ("grid: {mask.ratio: [0.3, 0.6, 0.9]}", "grid: {optim.lr: [1.0e-3, 1.0e+30]}")
        )
        process = ablate(alone, tmp_path / "failing")
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        found = results(alone)
        fine, bad = found["points"][0], found["points"][1]
        assert [run["seed"] for run in fine["runs"]] == [0, 1]
        assert not bad["runs"]
        assert [one["seed"] for one in bad["failed"]] == [0, 1]
        assert "lower optim.lr" in bad["failed"][0]["error"]
        assert "failed" in (alone.folder / "runs/ablate/mask_ratio/table.md").read_text()
    finally:
        (alone.folder / "params/ablations.yaml").write_text(text)


@pytest.mark.reliability
@pytest.mark.slow
def test_servers_that_die_in_the_middle_cost_no_point(tmp_path: Path, tried: Tried) -> None:
    """Both servers get kill -9: the flow goes on without them, and the same command ends in the same table."""
    own = make_clone(tmp_path / "clone")
    own.edit("params/ablations.yaml", ("optim.epochs: 2", "optim.epochs: 12"))
    home = own.folder / ".unmask"
    try:
        own.unmask("data", "restore")
        own.unmask("up")
        own.run(sys.executable, "-m", "flows.prepare", "scenes")
        process = own.start(sys.executable, "-m", "flows.ablate", "mask_ratio")
        wait(lambda: len(finished(home)) >= 3)
        for server in json.loads((home / "servers.json").read_text()).values():
            os.killpg(server["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        before = finished(home)
        said = own.unmask("ablate", "mask_ratio")
        assert "from scratch" in said
        disturbed, after = scores(results(own)), finished(home)
        assert {name: after[name] for name in before} == before, "a finished point was run again"
        runs = client(own).search_runs(["1"], "tags.ablation = 'mask_ratio'")
        assert {run.info.status for run in runs} == {"FINISHED"}
        # The flow that went on without servers has its record, too: it waited on disk for the second.
        of = [run.data.tags["mlflow.parentRunId"] for run in runs]
        assert [of.count(parent) for parent in set(of)] == [sum(map(len, disturbed.values()))] * 2

        undisturbed = ablate(own, tmp_path / "undisturbed")
        output, _ = undisturbed.communicate(timeout=600)
        assert undisturbed.returncode == 0, output
        assert scores(results(own)) == disturbed
    finally:
        own.environment.pop("UNMASK_HOME", None)
        own.unmask("down")
    tried("SIGKILL of both servers during an ablation", 1, "no point lost or measured twice, the same table")
