"""Faults of the user: each gets its one clear message before work starts, a failing exit code, and no traceback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from conftest import Clone
from PIL import Image

pytestmark = pytest.mark.orchestration


def refused(clone: Clone, *command: str, python: bool = True) -> str:
    """Run a command that has to fail without a traceback; gives what it said."""
    said = clone.run(*((sys.executable, "-m") if python else ()), *command, fails=True)
    assert "Traceback" not in said
    return said


def test_a_bad_row_is_refused_by_every_command(clone: Clone) -> None:
    """What is refused, and how, `test_params` holds; here that commands say it before they do anything."""
    path = clone.folder / "params" / "pretrain.yaml"
    head, mark, rows = path.read_text().partition("\npretrain:\n")
    path.write_text(head + mark + rows.replace("ratio: 0.6", "ratoi: 0.6", 1))
    for command in (("flows.cli", "check"), ("flows.pretrain", "simmim_vit"), ("flows.ablate", "mask_ratio")):
        said = refused(clone, *command)
        assert said.count("pretrain.simmim_vit.mask.ratoi: unknown key") == 1
        assert "did you mean 'ratio'?" in said
    assert not (clone.folder / "runs").exists()


def test_missing_data_and_missing_packs_say_which_command_brings_them(clone: Clone) -> None:
    assert "unmask data restore" in refused(clone, "flows.prepare", "scenes")
    clone.unmask("data", "restore")
    assert "dvc repro prepare@scenes" in refused(clone, "flows.pretrain", "simmim_vit")
    assert "did you mean 'simmim_vit'?" in refused(clone, "flows.pretrain", "simmim_vti")


def test_changed_bytes_are_refused_with_both_hashes_also_under_plain_dvc(clone: Clone) -> None:
    clone.unmask("data", "restore")
    pinned = (clone.folder / "data.dvc").read_text()
    md5 = pinned.split("md5: ")[1].split(".dir")[0]
    (clone.folder / "data" / "scenes" / "china.jpg").write_bytes(b"another picture")
    said = refused(clone, "flows.cli", "demo")
    assert md5 in said
    assert "scenes/china.jpg" in said
    assert (clone.folder / "data.dvc").read_text() == pinned
    said = clone.dvc("repro", fails=True)  # DVC itself would take the new bytes
    assert md5 in said
    assert not (clone.folder / "packs").exists()


def test_a_port_in_use_names_the_other_port_to_choose(clone: Clone) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(clone.environment["UNMASK_PREFECT_PORT"])))
        other.listen()
        said = refused(clone, "flows.cli", "up")
        assert f"port {clone.environment['UNMASK_PREFECT_PORT']}" in said
        assert "UNMASK_PREFECT_PORT=" in said
        assert "in use by another program" in clone.unmask("doctor", fails=True)


def test_another_program_that_answers_on_the_port_is_not_taken_for_ours(clone: Clone) -> None:
    class Yes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", int(clone.environment["UNMASK_MLFLOW_PORT"])), Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert "in use by another program" in refused(clone, "flows.cli", "up")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "empty"),
        ({"a.png": b"no picture at all"}, "a.png"),
        ({"a.jpg": b""}, "a.jpg"),
    ],
    ids=["empty folder", "text named png", "no bytes"],
)
def test_a_folder_without_a_readable_image_is_refused(files: dict[str, bytes], expected: str, clone: Clone) -> None:
    folder = clone.folder.parent / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    clone.unmask("data", "restore")
    before = (clone.folder / "params" / "data.yaml").read_text()
    assert expected in refused(clone, "flows.cli", "data", "add", str(folder), "--name", "mine")
    assert (clone.folder / "params" / "data.yaml").read_text() == before
    assert not (clone.folder / "data" / "mine").exists()


def test_a_truncated_jpeg_is_quarantined_and_the_rest_goes_on(clone: Clone) -> None:
    folder = clone.folder.parent / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{index}.jpg")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(whole[: len(whole) // 2])
    clone.unmask("data", "restore")
    said = clone.unmask("data", "add", str(folder), "--name", "mine")
    assert "0.jpg" in said
    assert "mine" in clone.unmask("check")
    clone.run(sys.executable, "-m", "flows.prepare", "mine")
    assert len(np.load(clone.folder / "packs" / "mine" / "train" / "images.npy")) == 15


def test_no_write_permission_is_said_before_work_starts(clone: Clone) -> None:
    for path in (clone.folder, *clone.folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # Root may write anywhere by a capability, so as root the command runs without it.
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if bound and not shutil.which("setpriv"):
        pytest.skip("as root without setpriv, nothing is forbidden")
    done = subprocess.run(
        [*bound, sys.executable, "-m", "flows.cli", "demo"],
        cwd=clone.folder,
        env={**clone.environment, "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
    )
    for path in (clone.folder, *clone.folder.rglob("*")):
        path.chmod(0o755)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "permission" in said
    assert "Traceback" not in said
