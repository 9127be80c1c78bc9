"""The servers' pages and the report as a person sees them, in headless Chromium on the demo's results."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Clone, prefect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.orchestration,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)"),
]


def look(address: str, folder: Path, wait_ms: int = 25000) -> str:
    """Open a page and give its text once its scripts have had `wait_ms` of virtual time; leaves a screenshot too."""
    assert BROWSER
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={folder / 'profile'}",
        "--window-size=1500,1800", f"--virtual-time-budget={wait_ms}",
    ]  # fmt: skip
    subprocess.run([*command, f"--screenshot={folder / 'page.png'}", address], capture_output=True, timeout=180)
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=180)
    return done.stdout


def run_id(clone: Clone, stage: str, row: str, kind: str) -> str:
    return str(json.loads((clone.folder / "runs" / stage / row / "manifest.json").read_text())[f"{kind}_run_id"])


def port(clone: Clone, name: str) -> str:
    return f"http://127.0.0.1:{clone.environment[f'UNMASK_{name.upper()}_PORT']}"


def test_the_compare_page_shows_both_arms_and_their_accuracy(served: Clone, tmp_path: Path) -> None:
    address = next(word for word in served.output.split() if "compare-runs?runs=" in word)
    page = look(address, tmp_path)
    for expected in ("downstream scratch", "downstream simmim_vit_100", "test_accuracy", "Parallel Coordinates"):
        assert expected in page


def test_the_run_page_lists_metrics_and_artifacts(served: Clone, tmp_path: Path) -> None:
    run = run_id(served, "pretrain", "simmim_vit", "mlflow")
    page = look(f"{port(served, 'mlflow')}/#/experiments/1/runs/{run}", tmp_path)
    for expected in ("pretrain simmim_vit", "hole_psnr", "mask.ratio", "scenes"):
        assert expected in page
    page = look(f"{port(served, 'mlflow')}/#/experiments/1/runs/{run}/artifacts", tmp_path)
    for expected in ("gallery.png", "manifest.json"):
        assert expected in page


def test_the_flow_run_page_shows_its_state_and_artifacts(served: Clone, tmp_path: Path) -> None:
    flow = run_id(served, "pretrain", "simmim_vit", "prefect_flow")
    page = look(f"{port(served, 'prefect')}/runs/flow-run/{flow}", tmp_path)
    for expected in ("pretrain simmim_vit", "Completed", "Task Runs", "Artifacts"):
        assert expected in page
    wanted = {"flow_runs": {"id": {"any_": [flow]}}, "artifacts": {"key": {"any_": ["gallery-simmim-vit"]}}}
    (artifact,) = prefect(served, "/artifacts/filter", wanted)
    page = look(f"{port(served, 'prefect')}/artifacts/artifact/{artifact['id']}", tmp_path)
    for expected in ("gallery-simmim-vit", "data:image/png;base64,"):
        assert expected in page


def test_the_report_opens_from_its_file(served: Clone, tmp_path: Path) -> None:
    page = look((served.folder / "report" / "index.html").as_uri(), tmp_path, wait_ms=2000)
    for expected in ("simmim_vit_100", "scratch", "data:image/png;base64,", "hole"):
        assert expected in page
