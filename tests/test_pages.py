"""The servers' pages and the report as a person sees them, in headless Chromium on the demo's results."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Clone, free_port, prefect
from mlflow.tracking import MlflowClient
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from flows.servers import port_taken
from flows.workers import wait_until

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.orchestration,
    # MLflow's own code warns when its client is loaded.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)"),
]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[ClientConnection]:
    """A page of headless Chromium, spoken to by its DevTools protocol."""
    assert BROWSER
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    # Prefect draws its graphs by WebGL.
    drawing = "--use-angle=swiftshader --enable-unsafe-swiftshader"
    profile = folder / "profile"
    profile.mkdir(parents=True)
    process = subprocess.Popen(
        [
            BROWSER, "--headless", "--no-sandbox", *drawing.split(), *quiet.split(), f"--user-data-dir={profile}",
            "--window-size=1500,2400", "--remote-debugging-port=0", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        active, end = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (active.exists() and active.read_text().count("\n")):
            assert time.monotonic() < end, "Chromium did not start"
            time.sleep(0.1)
        port = active.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            (page,) = [one for one in json.load(answer) if one["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            yield socket
    finally:
        process.terminate()
        process.wait(30)


def look(
    address: str, folder: Path, *expected: str, seconds: float = 120, drawn: Callable[[bytes], bool] | None = None
) -> None:
    """Open a page and wait until its document holds all that is expected and its picture what is drawn; leaves a
    screenshot."""
    with browser(folder) as socket:
        counter = itertools.count(1)

        def ask(method: str, **params: Any) -> Any:
            number = next(counter)
            socket.send(json.dumps({"id": number, "method": method, "params": params}))
            while (said := json.loads(socket.recv(60))).get("id") != number:
                continue
            return said["result"]

        ask("Page.navigate", url=address)
        end = time.monotonic() + seconds
        missing, seen, picture = list(expected), False, b""
        while not seen and time.monotonic() < end:
            time.sleep(0.5)
            page = ask("Runtime.evaluate", expression="document.documentElement.outerHTML")["result"]["value"]
            missing = [text for text in expected if text not in page]
            if not missing:
                picture = base64.b64decode(ask("Page.captureScreenshot")["data"])
                seen = drawn is None or drawn(picture)
        (folder / "page.png").write_bytes(picture or base64.b64decode(ask("Page.captureScreenshot")["data"]))
        assert not missing, f"{address} does not show {missing} (what it shows: {folder / 'page.png'})"
        assert seen, f"{address} does not draw what it should (what it shows: {folder / 'page.png'})"


def run_id(clone: Clone, stage: str, row: str, kind: str) -> str:
    return str(json.loads((clone.folder / "runs" / stage / row / "manifest.json").read_text())[f"{kind}_run_id"])


def port(clone: Clone, name: str) -> str:
    return f"http://127.0.0.1:{clone.environment[f'UNMASK_{name.upper()}_PORT']}"


def test_the_compare_page_shows_both_arms_and_their_accuracy(served: Clone, tmp_path: Path) -> None:
    address = next(word for word in served.output.split() if "compare-runs?runs=" in word)
    look(
        address,
        tmp_path,
        "downstream scratch_2000",
        "downstream simmim_vit_2000",
        "test_score",
        "Parallel Coordinates",
    )


def test_the_run_page_shows_metrics_curves_and_artifacts(served: Clone, tmp_path: Path) -> None:
    mlflow = port(served, "mlflow")
    page = f"{mlflow}/#/experiments/1/runs/{run_id(served, 'pretrain', 'simmim_vit', 'mlflow')}"
    look(page, tmp_path / "overview", "pretrain simmim_vit", "hole_psnr", "mask.ratio", "scenes")
    look(f"{page}/artifacts", tmp_path / "artifacts", "gallery.png", "manifest.json")
    job = MlflowClient(mlflow).search_runs(["1"], "tags.row = 'simmim_vit' and run_name = 'simmim_vit seed 0'")[0]
    # "scatterlayer" is what the plotting library calls the drawn lines of a chart.
    charts = f"{mlflow}/#/experiments/1/runs/{job.info.run_id}/model-metrics"
    look(charts, tmp_path / "charts", "validation_loss", "scatterlayer")


def test_the_flow_run_page_and_the_artifact_show_the_gallery(served: Clone, tmp_path: Path) -> None:
    flow = run_id(served, "pretrain", "simmim_vit", "prefect_flow")
    page = f"{port(served, 'prefect')}/runs/flow-run/{flow}"
    look(page, tmp_path / "run", "pretrain simmim_vit", "Completed", "Task Runs", "Artifacts")
    wanted = {"flow_runs": {"id": {"any_": [flow]}}, "artifacts": {"key": {"any_": ["gallery-simmim-vit"]}}}
    (artifact,) = prefect(served, "/artifacts/filter", wanted)
    page = f"{port(served, 'prefect')}/artifacts/artifact/{artifact['id']}"
    look(page, tmp_path / "artifact", "gallery-simmim-vit", "data:image/png;base64,")


def test_the_report_opens_from_its_file(served: Clone, tmp_path: Path) -> None:
    report = (served.folder / "report" / "index.html").as_uri()
    look(report, tmp_path, "simmim_vit_2000", "scratch", "data:image/png;base64,", "hole")


def test_the_points_of_an_ablation_compare_and_its_axis_is_a_curve(served: Clone, tmp_path: Path) -> None:
    mlflow = port(served, "mlflow")
    runs = MlflowClient(mlflow).search_runs(["1"], "tags.ablation = 'mask_ratio'")
    ids = urllib.parse.quote(json.dumps([run.info.run_id for run in runs]))
    page = f"{mlflow}/#/compare-runs?runs={ids}&experiments=[%221%22]"
    look(page, tmp_path / "compare", "Parallel Coordinates", "mask.ratio", "validation_score", "0.9, seed 1")
    parent = run_id(served, "ablate", "mask_ratio", "mlflow")
    charts = f"{mlflow}/#/experiments/1/runs/{parent}/model-metrics"
    look(charts, tmp_path / "charts", "accuracy_by_mask.ratio_percent", "scatterlayer")


def test_the_flow_run_of_an_ablation_shows_its_points(served: Clone, tmp_path: Path) -> None:
    flow = run_id(served, "ablate", "mask_ratio", "prefect_flow")
    page = f"{port(served, 'prefect')}/runs/flow-run/{flow}"
    look(f"{page}?tab=TaskRuns", tmp_path / "tasks", "ablate mask_ratio", "Completed", "0.9, seed 1")
    look(page, tmp_path / "graph", "ablate mask_ratio", "Completed", drawn=_has_green_bars)


def _has_green_bars(picture: bytes) -> bool:
    """Tell whether the graph, in the upper part of the page below its title, has bars in the green of the completed."""
    red, green, blue = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=int)[110:490].transpose(2, 0, 1)
    return bool(np.sum((green > 100) & (green > 1.5 * red) & (green > 1.5 * blue)) > 2000)


def test_optunas_dashboard_opens_the_study(served: Clone, tmp_path: Path) -> None:
    (database,) = (served.folder / ".unmask" / "optuna").glob("recipe-*.db")
    at = str(free_port())
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), "--host", "127.0.0.1", "--port", at]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"sqlite:///{database}"], stdout=log, stderr=log)
        try:
            assert wait_until(lambda: port_taken(int(at)), 120)
            look(f"http://127.0.0.1:{at}/dashboard", tmp_path / "studies", database.stem)
            look(f"http://127.0.0.1:{at}/dashboard/studies/1", tmp_path / "study", "mask.ratio", "scatterlayer")
        finally:
            process.terminate()
            process.wait(30)
