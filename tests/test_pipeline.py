"""The whole shape on real servers: one clone runs the demo with small rows, and the tests look at what came out."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Clone, prefect
from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.orchestration,
    # MLflow's own code warns when its client and its models are loaded.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def manifest(clone: Clone, stage: str, row: str) -> dict[str, Any]:
    return dict(json.loads((clone.folder / "runs" / stage / row / "manifest.json").read_text()))


def mlflow_client(clone: Clone) -> MlflowClient:
    return MlflowClient(f"http://127.0.0.1:{clone.environment['UNMASK_MLFLOW_PORT']}")


def test_demo_prints_the_result_the_time_and_where_to_look(served: Clone) -> None:
    said = served.output
    assert "Traceback" not in said
    for expected in ("simmim_vit_100", "scratch", "test accuracy", "orchestration", "index.html", "compare-runs?runs="):
        assert expected in said
    assert re.search(r"pretrain simmim_vit .*step \d+/\d+ .*loss \d\.\d+ .*images/s", said)


def test_every_run_leaves_a_manifest_and_the_served_records_agree_with_it(served: Clone) -> None:
    client = mlflow_client(served)
    for stage, row in (("pretrain", "simmim_vit"), ("pretrain", "other"), ("downstream", "scratch")):
        said = manifest(served, stage, row)
        assert said["data"]["md5"] == json.loads((served.folder / "packs/scenes/meta.json").read_text())["md5"]
        assert said["git"]["commit"]
        assert not said["git"]["dirty"]
        assert said["device_hours"] > 0
        run = client.get_run(said["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.inputs.dataset_inputs[0].dataset.digest == said["data"]["md5"]
        for key, value in said["metrics"].items():
            assert run.data.metrics[key] == pytest.approx(value)
        flow = prefect(served, "/flow_runs/filter", {"flow_runs": {"id": {"any_": [said["prefect_flow_run_id"]]}}})
        assert [one["state"]["type"] for one in flow] == ["COMPLETED"]
    arm = manifest(served, "downstream", "simmim_vit_100")
    assert arm["parents"] == ["pretrain/simmim_vit"]


def test_runs_are_nested_and_curves_have_each_step_once(served: Clone) -> None:
    client = mlflow_client(served)
    parent = client.get_run(manifest(served, "downstream", "scratch")["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    # Two rates with the first seed, and the second seed at the chosen one.
    assert len(children) == 3
    for child in children:
        history = client.get_metric_history(child.info.run_id, "loss")
        steps = [point.step for point in history]
        assert steps == sorted(set(steps))
        assert len(steps) > 3
        assert child.data.params["encoder.name"] == "vit"
        assert child.data.params["lr"] in {"0.001", "0.003"}


def test_gallery_params_manifest_and_system_metrics_are_in_mlflow(served: Clone) -> None:
    client = mlflow_client(served)
    run = manifest(served, "pretrain", "simmim_vit")["mlflow_run_id"]
    names = {artifact.path for artifact in client.list_artifacts(run)}
    assert {"gallery.png", "manifest.json", "params.json", "curve.csv"} <= names
    assert any(key.startswith("system/") for key in client.get_run(run).data.metrics)


def test_registered_encoder_embeds_images_as_the_weights_do(served: Clone) -> None:
    import mlflow
    import numpy as np
    import torch

    from mim_core.checkpoint import read_weights
    from mim_core.encoders.vit import ViT
    from mim_core.transforms import normalise

    mlflow.set_tracking_uri(f"http://127.0.0.1:{served.environment['UNMASK_MLFLOW_PORT']}")
    try:
        model = mlflow.pyfunc.load_model("models:/simmim_vit/1")
        images = np.load(served.folder / "packs/scenes/test/images.npy")[:3].transpose(0, 2, 3, 1)
        embedded = model.predict(images)
    finally:
        mlflow.set_tracking_uri(None)
    weights, about = read_weights(served.folder / "runs/pretrain/simmim_vit/encoder.safetensors")
    encoder = ViT((32, 32), 3, patch_px=4, width=32, depth=2, heads=2, positions="sincos").eval()
    encoder.load_state_dict(weights)
    with torch.no_grad():
        inputs = normalise(torch.from_numpy(images).permute(0, 3, 1, 2), tuple(about["mean"]), tuple(about["std"]))
        expected = encoder(encoder.embed(inputs)).mean(1)
    np.testing.assert_allclose(embedded, expected.numpy(), atol=1e-5)


def test_prefect_holds_the_gallery_and_the_table(served: Clone) -> None:
    artifacts = prefect(served, "/artifacts/filter", {})
    found = {(one["key"], one["type"]) for one in artifacts}
    assert {("gallery-simmim-vit", "image"), ("result-scratch", "table"), ("table", "markdown")} <= found
    assert ("accuracy", "image") in found


def test_a_second_demo_does_nothing_but_say_so(served: Clone) -> None:
    before = manifest(served, "pretrain", "simmim_vit")
    said = served.unmask("demo")
    assert "Nothing was stale: no stage ran" in said
    assert manifest(served, "pretrain", "simmim_vit") == before


def test_a_changed_ratio_reruns_its_row_and_what_hangs_on_it(served: Clone, tmp_path: Path) -> None:
    params = served.folder / "params" / "pretrain.yaml"
    text = params.read_text()
    before = {name: manifest(served, *name) for name in (("pretrain", "other"), ("downstream", "scratch"))}
    try:
        served.edit("params/pretrain.yaml", ("ratio: 0.6", "ratio: 0.7"))
        assert set(json.loads(served.dvc("status", "--json"))) == {"pretrain@simmim_vit"}
        said = served.dvc("repro")
        ran = re.findall(r"Running stage '(.+)'", said)
        assert ran == ["pretrain@simmim_vit", "downstream@simmim_vit_100", "report"]
        assert {name: manifest(served, *name) for name in before} == before
    finally:
        params.write_text(text)
    said = served.dvc("repro")
    assert "Running stage" not in said  # the earlier state comes back from DVC's cache


def test_experiments_run_and_compare(served: Clone) -> None:
    served.run("git", "add", "dvc.lock")
    served.run("git", "commit", "-qm", "Record the results")
    served.dvc("exp", "run", "--name", "half", "-S", "params/pretrain.yaml:pretrain.simmim_vit.mask.ratio=0.5")
    shown = served.dvc("exp", "show", "--csv")
    assert "half" in shown
    header = shown.splitlines()[0]
    assert "runs/pretrain/simmim_vit/metrics.json:hole_psnr" in header
    changed = json.loads(served.dvc("metrics", "diff", "--json"))
    assert "hole_psnr" in changed["runs/pretrain/simmim_vit/metrics.json"]
    served.run("git", "checkout", "-q", "--", "params", "dvc.lock")
    served.dvc("checkout", "-q")


def test_plots_show_holds_curves_and_pictures(served: Clone, tmp_path: Path) -> None:
    served.dvc("plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots" / "index.html").read_text()
    for expected in ("gallery.png", "accuracy.png", "simmim_vit, pretraining loss"):
        assert expected in page


def borrow(clone: Clone, served: Clone) -> None:
    """Give a clone the data and packs of the one that has run."""
    for name in ("data", "packs"):
        shutil.copytree(served.folder / name, clone.folder / name)


@pytest.mark.parametrize("victim", ["worker", "flow"])
def test_a_killed_training_resumes_to_the_same_weights_and_the_same_run(
    victim: str, clone: Clone, served: Clone
) -> None:
    borrow(clone, served)
    clone.environment |= {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{served.environment['UNMASK_MLFLOW_PORT']}",
        "PREFECT_API_URL": f"http://127.0.0.1:{served.environment['UNMASK_PREFECT_PORT']}/api",
    }
    clone.edit("params/pretrain.yaml", ("epochs: 8", "epochs: 40"))
    command = (sys.executable, "-m", "flows.pretrain", "simmim_vit")
    published, undisturbed = clone.folder / "runs" / "pretrain" / "simmim_vit", clone.folder.parent / "undisturbed"
    clone.run(*command)
    published.rename(undisturbed)
    process = clone.start(*command)
    jobs, end = clone.folder / ".unmask" / "jobs", time.monotonic() + 300
    while not (found := list(jobs.glob("pretrain-simmim_vit-*/seed_0/checkpoints/step_*"))):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    folder = found[0].parents[1]
    worker = int((folder / "worker.pid").read_text())
    run_before = json.loads((folder / "mlflow.json").read_text())["run_id"]
    os.kill(worker if victim == "worker" else process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    if victim == "flow":
        assert not published.exists()
        while Path(f"/proc/{worker}").exists():  # it ends with its parent, so that it cannot write beside the next one
            assert time.monotonic() < end
            time.sleep(0.05)
        clone.run(*command)
    for name in ("encoder.safetensors", "model.safetensors"):
        assert (published / name).read_bytes() == (undisturbed / name).read_bytes()
    client = mlflow_client(served)
    run = client.get_run(run_before)
    assert run.info.status == "FINISHED"
    points = [point.step for point in client.get_metric_history(run_before, "loss")]
    assert len(points) == len(set(points))
    assert max(points) == 320
    assert run.data.tags["mlflow.parentRunId"] == manifest(clone, "pretrain", "simmim_vit")["mlflow_run_id"]


def test_a_stage_runs_and_is_recorded_with_no_server_up(clone: Clone, served: Clone) -> None:
    borrow(clone, served)
    said = clone.dvc("repro", "--single-item", "pretrain@other")
    assert "Traceback" not in said
    client = MlflowClient(f"sqlite:///{clone.folder / '.unmask' / 'mlflow' / 'mlflow.db'}")
    run = client.get_run(manifest(clone, "pretrain", "other")["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"gallery.png", "manifest.json"}
