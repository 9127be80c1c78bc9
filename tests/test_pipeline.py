"""The whole shape on real servers: one clone runs the demo with small rows, and the tests look at what came out."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Clone, Line, make_clone, prefect
from httpx import ReadTimeout
from mlflow.tracking import MlflowClient

from flows import workspace
from flows.stage import Stage, begun, command, encoder_of, outliving_prefect, tokenizer_of

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
    for expected in (
        "simmim_vit_2000",
        "scratch_2000",
        "test accuracy",
        "orchestration",
        "index.html",
        "compare-runs?runs=",
    ):
        assert expected in said
    assert re.search(r"pretrain simmim_vit .*step \d+/\d+ .*loss \d\.\d+ .*images/s", said)


def test_the_demo_runs_its_own_rows_and_dvc_the_rest(served: Clone) -> None:
    ran = re.findall(r"Running stage '(.+)'", served.output)
    assert set(ran[:-1]) == {
        "prepare@scenes", "pretrain@simmim_vit", "baseline@scratch_2000", "downstream@simmim_vit_2000"
    }  # fmt: skip
    assert ran[-1] == "report"
    ran = re.findall(r"Running stage '(.+)'", served.rest)
    assert ran[-1] == "report"
    assert set(ran[:-1]) == {
        "fit_target@codes",
        "pretrain_fitted@tokens",
        "baseline@segment_scratch",
        "baseline@detect_scratch",
        "continued@neighbours",
        "ablate@mask_ratio",
        "ablate_fitted@targets",
        "search@recipe",
    }


@pytest.mark.parametrize(
    ("row", "metric", "parents"),
    [
        ("segment_scratch", "miou", []),
        ("detect_scratch", "ap", []),
        ("neighbours", "accuracy", ["downstream/scratch_2000"]),
    ],
)
def test_every_task_is_a_stage_with_a_manifest_a_run_and_a_picture(
    row: str, metric: str, parents: list[str], served: Clone
) -> None:
    said, folder = manifest(served, "downstream", row), served.folder / "runs" / "downstream" / row
    assert said["parents"] == parents
    results = json.loads((folder / "results.json").read_text())
    assert results["metric"] == metric
    for point in results["seeds"]:
        assert point["test_score"] == point[f"test_{metric}"]
        assert 0 <= point["test_score"] <= 1
    assert said["metrics"][f"test_{metric}"] == pytest.approx(said["metrics"]["test_score"])
    assert ("lr" in said["metrics"]) == (row != "neighbours")
    names = {artifact.path for artifact in mlflow_client(served).list_artifacts(said["mlflow_run_id"])}
    assert {"predictions.png", "results.json", "manifest.json"} <= names
    assert f'alt="Predictions of {row} on test images"' in (served.folder / "report" / "index.html").read_text()


def test_a_fitted_target_is_published_and_names_its_parent(served: Clone) -> None:
    codes, tokens = manifest(served, "targets", "codes"), manifest(served, "pretrain", "tokens")
    assert codes["stage"] == "fit_target"
    assert tokens["parents"] == ["targets/codes"]
    assert codes["metrics"]["psnr"] > 0
    assert 0 < codes["metrics"]["codes_used"] <= 1
    assert 1 <= codes["metrics"]["perplexity"] <= 16
    # 0.4 of the patches at least are asked for.
    assert 0.3 < tokens["metrics"]["hidden_share"] < 0.6
    assert tokens["metrics"]["avg_distance_px"] > 0
    for folder, names in (
        ("targets/codes", ("tokenizer.safetensors", "gallery.png", "curve.csv", "metrics.json")),
        ("pretrain/tokens", ("encoder.safetensors", "model.safetensors", "gallery.png", "recovery.png", "curve.csv")),
    ):
        for name in names:
            assert (served.folder / "runs" / folder / name).stat().st_size > 0
    names = {artifact.path for artifact in mlflow_client(served).list_artifacts(codes["mlflow_run_id"])}
    assert {"gallery.png", "manifest.json", "params.json", "curve.csv"} <= names


def test_dvc_knows_that_the_tokenizer_comes_first(served: Clone) -> None:
    params = served.folder / "params" / "targets.yaml"
    text = params.read_text()
    try:
        served.edit("params/targets.yaml", ("epochs: 2", "epochs: 3"))
        assert set(json.loads(served.dvc("status", "--json", "--with-deps", "pretrain_fitted@tokens"))) == {
            "fit_target@codes"
        }
        assert json.loads(served.dvc("status", "--json", "--with-deps", "downstream@simmim_vit_2000")) == {}
    finally:
        params.write_text(text)


def test_every_run_leaves_a_manifest_and_the_served_records_agree_with_it(served: Clone) -> None:
    client = mlflow_client(served)
    for stage, row in (
        ("targets", "codes"),
        ("pretrain", "tokens"),
        ("pretrain", "simmim_vit"),
        ("downstream", "scratch_2000"),
    ):
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
    arm = manifest(served, "downstream", "simmim_vit_2000")
    assert arm["parents"] == ["pretrain/simmim_vit"]


def test_runs_are_nested_and_curves_have_each_step_once(served: Clone) -> None:
    client = mlflow_client(served)
    parent = client.get_run(manifest(served, "downstream", "scratch_2000")["mlflow_run_id"])
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


def test_arms_are_told_apart_by_what_mlflows_page_that_compares_begins_with(served: Clone) -> None:
    for arm in ("scratch_2000", "simmim_vit_2000"):
        run = mlflow_client(served).get_run(manifest(served, "downstream", arm)["mlflow_run_id"])
        assert next(iter(run.data.metrics)) == "test_score"
        assert min(run.data.params) == "arm"
        assert run.data.params["arm"] == arm


def test_a_trial_is_scored_by_the_mean_over_its_seeds(served: Clone) -> None:
    said = json.loads((served.folder / "runs/search/recipe/results.json").read_text())
    assert said["trial_seeds"] == [0, 3]
    done = [one for one in said["trials"] if one["state"] == "complete" and one["place"] is not None]
    assert done
    for one in done:
        run = mlflow_client(served).get_run(one["mlflow_run_id"])
        first, second = (run.data.metrics[f"{seed}judge.validation_score"] for seed in ("", "seed_3."))
        assert one["score"] == pytest.approx((first + second) / 2)
        assert run.data.metrics["validation_score"] == pytest.approx(one["score"])
        assert run.data.params["seed"] == "0, 3"


def test_gallery_params_manifest_and_system_metrics_are_in_mlflow(served: Clone) -> None:
    client = mlflow_client(served)
    run = manifest(served, "pretrain", "simmim_vit")["mlflow_run_id"]
    names = {artifact.path for artifact in client.list_artifacts(run)}
    assert {"gallery.png", "recovery.png", "manifest.json", "params.json", "curve.csv"} <= names
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
    assert {("gallery-simmim-vit", "image"), ("result-scratch-2000", "table"), ("table", "markdown")} <= found
    assert {("accuracy", "image"), ("family", "markdown"), ("recovery-simmim-vit", "image")} <= found
    assert {("tokenizer-gallery-codes", "image"), ("tokenizer-result-codes", "markdown")} <= found


def test_the_report_tells_of_the_family(served: Clone) -> None:
    table = (served.folder / "report" / "family.md").read_text()
    assert "cost relative to simmim_vit" in table
    for words in ("random (0.6) x mask_token x vit (32, 2) x linear x pixels x l1", "of which the tokenizer codes"):
        assert words in table
    assert "from scratch: vit (32, 2)" in table
    page = (served.folder / "report" / "index.html").read_text()
    assert "<h2>Tokenizers</h2>" in page
    # Three of all, two of each pretraining and of each ablation, one of each tokenizer, arm and search.
    assert page.count("data:image/png;base64,") == 3 + 2 * 2 + 2 * 2 + 1 + 5 + 1


def test_a_second_demo_does_nothing_but_say_so(served: Clone) -> None:
    before = manifest(served, "pretrain", "simmim_vit")
    said = served.unmask("demo")
    assert "Nothing was stale: no stage ran" in said
    assert manifest(served, "pretrain", "simmim_vit") == before


def test_a_changed_ratio_reruns_its_row_and_what_hangs_on_it(served: Clone, tmp_path: Path) -> None:
    params = served.folder / "params" / "pretrain.yaml"
    text = params.read_text()
    before = {name: manifest(served, *name) for name in (("pretrain", "tokens"), ("downstream", "scratch_2000"))}
    try:
        served.edit("params/pretrain.yaml", ("ratio: 0.6", "ratio: 0.7"))
        based_on_it = {"ablate@mask_ratio", "ablate_fitted@targets", "search@recipe"}
        assert set(json.loads(served.dvc("status", "--json"))) == {"pretrain@simmim_vit"} | based_on_it
        said = served.dvc("repro", "downstream")
        ran = re.findall(r"Running stage '(.+)'", said)
        assert ran == ["pretrain@simmim_vit", "downstream@simmim_vit_2000"]
        assert {name: manifest(served, *name) for name in before} == before
    finally:
        params.write_text(text)
    said = served.dvc("repro")
    assert "Running stage" not in said  # the earlier state comes back from DVC's cache


def test_experiments_run_and_compare(served: Clone) -> None:
    served.run("git", "add", "dvc.lock")
    served.run("git", "commit", "-qm", "Record the results")
    served.dvc(
        "exp",
        "run",
        "--name",
        "half",
        "-S",
        "params/pretrain.yaml:pretrain.simmim_vit.mask.ratio=0.5",
        "downstream@simmim_vit_2000",
    )
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
    for expected in ("gallery.png", "recovery.png", "accuracy.png", "simmim_vit, pretraining loss", "codes, PSNR"):
        assert expected in page


def borrow(clone: Clone, served: Clone) -> None:
    """Give a clone the data and packs of the one that has run."""
    for name in ("data", "packs"):
        shutil.copytree(served.folder / name, clone.folder / name)


LONGER = (sys.executable, "-m", "flows.pretrain", "simmim_vit")


def lengthen(clone: Clone, served: Clone) -> None:
    """Give a clone a training long enough to be killed, on the servers of the one that has run."""
    borrow(clone, served)
    clone.environment |= {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{served.environment['UNMASK_MLFLOW_PORT']}",
        "PREFECT_API_URL": f"http://127.0.0.1:{served.environment['UNMASK_PREFECT_PORT']}/api",
    }
    clone.edit("params/pretrain.yaml", ("epochs: 8", "epochs: 40"))


@pytest.fixture(scope="module")
def undisturbed(served: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The products of that training where nothing is killed."""
    there = make_clone(tmp_path_factory.mktemp("undisturbed") / "clone")
    lengthen(there, served)
    there.run(*LONGER)
    return there.folder / "runs" / "pretrain" / "simmim_vit"


@pytest.mark.parametrize("victim", ["worker", "flow"])
def test_a_killed_training_resumes_to_the_same_weights_and_the_same_run(
    victim: str, clone: Clone, served: Clone, undisturbed: Path
) -> None:
    lengthen(clone, served)
    published = clone.folder / "runs" / "pretrain" / "simmim_vit"
    process = clone.start(*LONGER)
    jobs, end = clone.folder / ".unmask" / "jobs", time.monotonic() + 300
    while not (found := list(jobs.glob("pretrain-simmim_vit-*/seed_0/checkpoints/step_*"))):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    folder = found[0].parents[1]
    worker = int((folder / "worker.pid").read_text())
    own = json.loads((folder / "mlflow.json").read_text())["run"]
    os.kill(worker if victim == "worker" else process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    if victim == "flow":
        assert not published.exists()
        while Path(f"/proc/{worker}").exists():  # it ends with its parent, so that it cannot write beside the next one
            assert time.monotonic() < end
            time.sleep(0.05)
        clone.run(*LONGER)
    for name in ("encoder.safetensors", "model.safetensors"):
        assert (published / name).read_bytes() == (undisturbed / name).read_bytes()
    client = mlflow_client(served)
    (run,) = client.search_runs(["1"], f"tags.`unmask.id` = '{own}'")
    assert run.info.status == "FINISHED"
    points = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert len(points) == len(set(points))
    assert max(points) == 320
    assert run.data.tags["mlflow.parentRunId"] == manifest(clone, "pretrain", "simmim_vit")["mlflow_run_id"]


def test_a_prefect_server_that_dies_costs_no_training_and_is_told_of_the_end_later(
    clone: Clone, served: Clone, undisturbed: Path
) -> None:
    lengthen(clone, served)
    there = clone.environment["PREFECT_API_URL"]
    line = Line(int(served.environment["UNMASK_PREFECT_PORT"]))
    clone.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{line.port}/api"
    process = clone.start(*LONGER)
    jobs, end = clone.folder / ".unmask" / "jobs", time.monotonic() + 300
    while not list(jobs.glob("pretrain-simmim_vit-*/seed_0/checkpoints/step_*")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    line.cut()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "done; the next run tells Prefect's server, which does not answer" in output
    assert "Traceback" not in output
    published = clone.folder / "runs" / "pretrain" / "simmim_vit"
    assert (published / "encoder.safetensors").read_bytes() == (undisturbed / "encoder.safetensors").read_bytes()

    said = manifest(clone, "pretrain", "simmim_vit")
    assert mlflow_client(served).get_run(said["mlflow_run_id"]).info.status == "FINISHED"
    clone.environment["PREFECT_API_URL"] = there
    clone.run(sys.executable, "-m", "flows.prepare", "scenes")
    (run,) = prefect(served, "/flow_runs/filter", {"flow_runs": {"id": {"any_": [said["prefect_flow_run_id"]]}}})
    assert run["state"]["type"] == "COMPLETED"


def test_a_stage_runs_and_is_recorded_with_no_server_up(clone: Clone, served: Clone) -> None:
    borrow(clone, served)
    said = clone.dvc("repro", "--single-item", "fit_target@codes")
    assert "Traceback" not in said
    client = MlflowClient(f"sqlite:///{clone.folder / '.unmask' / 'mlflow' / 'mlflow.db'}")
    run = client.get_run(manifest(clone, "targets", "codes")["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"gallery.png", "manifest.json"}


def test_a_prefect_server_behind_a_password_says_where_to_give_it(clone: Clone, served: Clone) -> None:
    borrow(clone, served)

    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="unmask"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as locked:
        threading.Thread(target=locked.serve_forever, daemon=True).start()
        clone.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{locked.server_port}/api"
        said = clone.run(sys.executable, "-m", "flows.pretrain", "simmim_vit", fails=True)
        locked.shutdown()
    assert "lets nobody in without a password: Client error '401 Unauthorized'" in said
    assert "PREFECT_API_AUTH_STRING=NAME:PASSWORD" in said
    assert "Traceback" not in said
    assert not (clone.folder / "runs").exists()


def test_an_error_of_prefects_client_that_says_nothing_is_told_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, outliving_prefect("pretrain one"):
        raise ReadTimeout("")
    assert ended.value.code == 75
    assert "pretrain one: Prefect's server does not answer: ReadTimeout\n" in capsys.readouterr().err


def test_a_flow_begins_with_the_stage_that_its_command_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []

    def check(row: str) -> Any:
        checked.append(SimpleNamespace(row=row, alone=nullcontext))
        return checked[-1]

    monkeypatch.setattr(sys, "argv", ["flows.pretrain", "one"])
    taken: list[Any] = []
    command("pretrain", check, lambda row: taken.append(begun(check, row)))
    assert taken == checked
    assert len(checked) == 1
    # As where Prefect retries the flow, or runs one of its own.
    assert begun(check, "two") is checked[1]


def test_missing_weights_name_the_command_that_makes_them(clone: Clone, served: Clone) -> None:
    borrow(clone, served)
    for module, row, made_by in (
        ("flows.pretrain", "tokens", "dvc repro fit_target@codes"),
        ("flows.downstream", "simmim_vit_2000", "dvc repro pretrain@simmim_vit"),
    ):
        said = clone.run(sys.executable, "-m", module, row, fails=True)
        assert made_by in said
        assert "Traceback" not in said
    assert not (clone.folder / "runs").exists()


def test_work_is_gone_on_from_only_with_the_weights_it_began_from_and_the_images_it_saw(
    clone: Clone, served: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrow(clone, served)
    monkeypatch.chdir(clone.folder)
    monkeypatch.setenv("UNMASK_HOME", str(clone.folder / ".unmask"))
    workspace.root.cache_clear()
    keys = []
    try:
        for content in (b"some weights", b"others", b"some weights"):
            for folder, name in (("targets/codes", "tokenizer"), ("pretrain/simmim_vit", "encoder")):
                file = clone.folder / "runs" / folder / f"{name}.safetensors"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            tokens = Stage("pretrain", "tokens", ("pretrain", "pretrain_fitted"), tokenizer_of)
            tuned = Stage("downstream", "simmim_vit_2000", ("downstream",), encoder_of)
            assert (tokens.parents, tuned.parents) == (["targets/codes"], ["pretrain/simmim_vit"])
            keys.append((tokens.key, tuned.key))
        data = tuned.data
        # The same files of images under another row of params/data.yaml.
        meta = clone.folder / "packs" / "scenes" / "meta.json"
        meta.write_text(meta.read_text().replace('"seed": 0', '"seed": 1'))
        tuned = Stage("downstream", "simmim_vit_2000", ("downstream",), encoder_of)
        assert tuned.key not in keys[2]
        assert tuned.data != data, "points of ablations and searches go by it"
    finally:
        workspace.root.cache_clear()
    assert keys[0] == keys[2]
    assert not set(keys[0]) & set(keys[1])


def test_a_collapsed_codebook_stops_the_stage_with_advice(clone: Clone, served: Clone) -> None:
    borrow(clone, served)
    # No use of 16 codes has a perplexity of 16 but the perfectly even one.
    clone.edit("params/targets.yaml", ("least_perplexity: 1.0", "least_perplexity: 16.0"))
    said = clone.run(sys.executable, "-m", "flows.fit_target", "codes", fails=True)
    assert "the codebook has collapsed" in said
    assert "kl_weight" in said
    assert "Traceback" not in said
    assert not (clone.folder / "runs" / "targets").exists()


def test_a_pipeline_without_fitted_rows_is_one_too(clone: Clone, served: Clone) -> None:
    borrow(clone, served)
    (clone.folder / "params" / "targets.yaml").write_text("targets: {}\n")
    for file, first, after in (("pretrain", "  tokens:", "pretrain:\n"), ("ablations", "  targets:", "ablations:\n")):
        path = clone.folder / "params" / f"{file}.yaml"
        text = path.read_text()
        start, end = text.index(first), text.index(after)
        path.write_text(text[:start].replace(":\n", ": {}\n") + text[end:])
    assert "simmim_vit" in clone.unmask("check")
    stages = {line.split()[0] for line in clone.dvc("stage", "list", "--all").splitlines()}
    assert "pretrain@simmim_vit" in stages
    assert not any("fit" in stage for stage in stages)
