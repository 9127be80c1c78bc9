"""DVC's experiments on ablations: queued, run in temporary copies, and compared between versions of the data."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Clone, make_clone
from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.orchestration,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
STAGE = "ablate@mask_ratio"
TABLE = "runs/ablate/mask_ratio/table.csv"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone with servers whose ablation has run and is committed."""
    clone = make_clone(tmp_path_factory.mktemp("measured") / "clone")
    try:
        clone.unmask("data", "restore")
        clone.unmask("up")
        clone.dvc("repro", STAGE)
        clone.run("git", "add", "-A")
        clone.run("git", "commit", "-qm", "Measure mask ratios")
        yield clone
    finally:
        clone.unmask("down")


def points(clone: Clone) -> dict[str, float]:
    return {one.parent.name: one.stat().st_mtime for one in clone.folder.glob(".unmask/points/*/result.json")}


def result(clone: Clone, name: str) -> dict[str, Any]:
    return dict(json.loads((clone.folder / "runs" / "ablate" / "mask_ratio" / name).read_text()))


def test_queued_experiments_run_in_copies_that_share_servers_and_points(measured: Clone) -> None:
    before, two_seeds = points(measured), result(measured, "results.json")
    for name, seeds in (("three", "[0,1,2]"), ("one", "[1]")):
        change = f"params/ablations.yaml:ablations.mask_ratio.seeds={seeds}"
        measured.dvc("exp", "run", "--queue", "--name", name, "-S", change, STAGE)
    measured.dvc("exp", "run", "--run-all")
    assert result(measured, "results.json") == two_seeds, "the workspace is as it was"
    shown = csv.DictReader(measured.dvc("exp", "show", "--csv").splitlines())
    revisions = {line["Experiment"]: line["rev"] for line in shown}
    # A new seed is measured: two jobs a point, and one for the encoder from scratch. All else was there.
    after = points(measured)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3 * 2 + 1
    mlflow = MlflowClient(f"http://127.0.0.1:{measured.environment['UNMASK_MLFLOW_PORT']}")
    for name, seeds in (("three", {0, 1, 2}), ("one", {1})):
        # `dvc exp apply` takes over all outputs, and fails where some stage has never run.
        measured.run("git", "checkout", "-q", revisions[name], "--", "dvc.lock")
        measured.dvc("checkout", "-q", STAGE)
        for point in result(measured, "results.json")["points"]:
            assert {run["seed"] for run in point["runs"]} == seeds
        manifest = result(measured, "manifest.json")
        assert mlflow.get_run(manifest["mlflow_run_id"]).info.status == "FINISHED"
        assert not list((measured.folder / ".dvc" / "tmp" / "exps").glob("*/.unmask/points"))
    measured.run("git", "checkout", "-q", "HEAD", "--", "dvc.lock")
    measured.dvc("checkout", "-q", STAGE)


def test_two_versions_of_the_data_stand_side_by_side(measured: Clone, tmp_path: Path) -> None:
    try:
        measured.edit("params/data.yaml", ("seed: 0", "seed: 1"))
        measured.dvc("repro", STAGE)
        measured.run("git", "commit", "-qam", "Draw other scenes")
        said = measured.dvc("plots", "diff", "HEAD~1", "HEAD", "--targets", TABLE, "-o", str(tmp_path))
        page = Path(said.split("file://")[-1].strip()).read_text()
        vega = json.loads(measured.dvc("plots", "diff", "HEAD~1", "HEAD", "--targets", TABLE, "--json", "--split"))
        ((one,),) = vega["data"].values()
        shown = one["anchor_definitions"]["<DVC_METRIC_DATA>"]
        assert {point["rev"] for point in shown} == {"HEAD~1", "HEAD"}
        assert {point["setting"] for point in shown} >= {"0.3", "0.6", "0.9"}
        means = {rev: [point["mean"] for point in shown if point["rev"] == rev] for rev in ("HEAD~1", "HEAD")}
        assert means["HEAD~1"] != means["HEAD"]
        assert "HEAD~1" in page
    finally:
        measured.run("git", "checkout", "-q", "--", "params", "dvc.lock")
