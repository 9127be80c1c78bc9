"""A downstream row's model from the registry, as its user meets it: behind a port, and on the command line."""

from __future__ import annotations

import ast
import base64
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from conftest import ROOT, Clone, free_port
from mlflow.tracking import MlflowClient
from PIL import Image

from mim_core import inference

pytestmark = [
    pytest.mark.orchestration,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
ROW = "simmim_vit_2000"
READY_SECONDS = 300
ADDRESS = "http://127.0.0.1:5001/invocations"


def documented() -> str:
    """The command that the served model's docstring gives."""
    text = ast.get_docstring(ast.parse((ROOT / "flows" / "served_task.py").read_text())) or ""
    (command,) = re.findall(r"\(printf .*?--data-binary @-", text, re.DOTALL)
    assert ADDRESS in command
    return str(command)


def tracking(served: Clone) -> str:
    return f"http://127.0.0.1:{served.environment['UNMASK_MLFLOW_PORT']}"


def weights(clone: Clone, kind: str = "downstream", row: str = ROW, name: str = "model") -> Path:
    return clone.folder / "runs" / kind / row / f"{name}.safetensors"


@pytest.fixture(scope="module")
def photographs(served: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as a user has them: JPEG files of another size, one turned by its EXIF; and files that are none."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for index, image in enumerate(np.load(served.folder / "packs/scenes/train/images.npy")[:70]):
        picture = Image.fromarray(image.transpose(1, 2, 0)).resize((80, 60), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 3 else 1
        picture.save(folder / ("more" if index % 2 else ".") / f"{index:02}.jpg", quality=95, exif=exif)
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder


def expected(served: Clone, files: list[Path]) -> list[dict[str, Any]]:
    model = inference.load_model(weights(served))
    return model.answer([model.reader(file) for file in files])


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Other processes have other numbers of images at once, and so other last bits: of bf16 where it is used."""
    assert found["class"] == wanted["class"] or found["probability"] == pytest.approx(wanted["probability"], abs=0.02)
    chances = {one["class"]: one["probability"] for one in found["top"]}
    for one in wanted["top"]:
        if one["class"] in chances:  # the fifth may be another, where two are as likely
            assert chances[one["class"]] == pytest.approx(one["probability"], abs=0.02)


# The registry.


def test_every_downstream_row_has_competed(served: Clone) -> None:
    client = MlflowClient(tracking(served))
    found = client.search_model_versions("name = 'scenes.classify'")
    assert {one.tags["row"] for one in found} >= {"scratch_2000", ROW}
    best = max(found, key=lambda one: (float(one.tags["test_score"]), -int(one.version)))
    assert client.get_model_version_by_alias("scenes.classify", "champion").version == best.version
    assert len({one.tags["test_digest"] for one in found}) == 1
    assert not {"pretrain", "tokens"} & {one.tags["row"] for one in found}
    for row in ("scratch_2000", ROW):
        manifest = json.loads((served.folder / "runs/downstream" / row / "manifest.json").read_text())
        # Each run of a row is a version: other tests may have run it with other params.
        versions = client.search_model_versions(f"name = '{row}'")
        (registered,) = [one for one in versions if one.run_id == manifest["mlflow_run_id"]]
        tags = registered.tags
        assert registered.run_id == manifest["mlflow_run_id"]
        assert (tags["data"], tags["data_md5"]) == (manifest["data"]["name"], manifest["data"]["md5"])
        assert (tags["code"], tags["git_commit"]) == (manifest["code"], manifest["git"]["commit"])
        results = json.loads((served.folder / "runs/downstream" / row / "results.json").read_text())
        scores = {(str(one["seed"]), str(one["test_score"])) for one in results["seeds"]}
        assert (tags["seed"], tags["test_score"]) in scores
        assert "scenes.classify version" in client.get_run(registered.run_id).data.tags["registered"]
    assert "Add type hints" not in served.output  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def address(served: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The champion behind a port, as the README says it."""
    port, log = free_port(), tmp_path_factory.mktemp("serving") / "log"
    environment = {**served.environment, "PYTHONPATH": "", "MLFLOW_DISABLE_TELEMETRY": "true"}  # it brings its code
    environment["MLFLOW_TRACKING_URI"] = tracking(served)
    model = ["-m", "models:/scenes.classify@champion", "--env-manager", "local"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *model, "-h", "127.0.0.1", "-p", str(port)],
            env=environment, cwd=log.parent, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server leads a session of its own
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


def champion(served: Clone, folder: Path) -> Path:
    """The weights that stand behind the alias."""
    mlflow.set_tracking_uri(tracking(served))
    try:
        there = mlflow.artifacts.download_artifacts("models:/scenes.classify@champion", dst_path=str(folder))
    finally:
        mlflow.set_tracking_uri(None)
    (file,) = Path(there).rglob("*.safetensors")
    return file


def post(address: str, content: bytes, kind: str = "application/json") -> tuple[int, str]:
    request = urllib.request.Request(address, content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def predictions(address: str, content: bytes, kind: str = "application/json") -> list[dict[str, Any]]:
    status, said = post(address, content, kind)
    assert status == 200, said
    return list(json.loads(said)["predictions"])


def test_a_server_answers_of_jpeg_files_as_the_evaluation_does(
    served: Clone, photographs: Path, address: str, tmp_path: Path
) -> None:
    model = inference.load_model(champion(served, tmp_path))
    files = [photographs / "00.jpg", photographs / "more" / "03.jpg"]
    for file in files:
        (wanted,) = model.answer([model.reader(file)])
        line = documented().replace("photo.jpg", shlex.quote(str(file))).replace(ADDRESS, address)
        said = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
        (found,) = json.loads(said)["predictions"]
        same(found, wanted)
        encoded = base64.b64encode(file.read_bytes()).decode()
        (again,) = predictions(
            address, json.dumps({"dataframe_split": {"columns": ["image"], "data": [[encoded]]}}).encode()
        )
        same(again, wanted)
    # Parquet needs no base64.
    table = tmp_path / "two.parquet"
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files]}), table)
    answers = predictions(address, table.read_bytes(), "application/vnd.apache.parquet")
    for found, wanted in zip(answers, model.answer([model.reader(file) for file in files]), strict=True):
        same(found, wanted)


def test_a_server_refuses_what_is_no_image_and_says_which(address: str, photographs: Path) -> None:
    contents = [(photographs / name).read_bytes() for name in ("00.jpg", "broken.jpg", "notes.txt")]
    records = [{"image": base64.b64encode(one).decode()} for one in contents]
    status, said = post(address, json.dumps({"dataframe_records": records}).encode())
    assert status == 400
    assert "image 1: the image cannot be decoded" in said
    assert "image 2: the content is no image of a known format" in said
    assert "image 0:" not in said


def test_raw_bytes_are_refused_by_mlflow_itself(address: str, photographs: Path) -> None:
    status, said = post(address, (photographs / "00.jpg").read_bytes(), "image/jpeg")
    assert (status, "only supports" in said) == (415, True)


# The command line.


def test_predict_answers_as_the_evaluation_does_and_lists_what_it_left_out(
    served: Clone, photographs: Path, tmp_path: Path
) -> None:
    files = sorted(photographs.rglob("*.jpg"), key=lambda path: str(path))
    good = [file for file in files if file.name != "broken.jpg"]
    wanted = dict(zip(map(str, good), expected(served, good), strict=True))
    out = tmp_path / "predictions.parquet"
    said = served.unmask("predict", ROW, str(photographs), "-o", str(out))
    assert f"70 images -> {out}" in said
    assert "2 files were left out" in said
    with (tmp_path / "predictions.quarantined.csv").open() as file:
        left = {Path(one["file"]).name: one["reason"] for one in csv.DictReader(file)}
    assert set(left) == {"broken.jpg", "notes.txt"}
    assert "extensions" in left["notes.txt"]
    found = pq.read_table(out).to_pylist()
    assert [one["file"] for one in found] == [str(file) for file in sorted(good)]
    for one in found:
        same(one, wanted[one["file"]])


def test_predict_says_at_the_terminal_what_it_sees(served: Clone, photographs: Path) -> None:
    said = served.unmask("predict", ROW, str(photographs / "0*.jpg"), str(photographs / "notes.txt"))
    assert "Traceback" not in said
    for name in ("00.jpg", "08.jpg"):
        assert name in said
    assert "%" in said
    assert "left out" in said


def test_embed_gives_what_the_encoder_gives(served: Clone, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.parquet"
    said = served.unmask("embed", "simmim_vit", str(photographs), "-o", str(out))
    assert "70 images" in said
    table = pq.read_table(out)
    vectors = np.stack(table["vector"].to_numpy())
    encoder = inference.load_encoder(weights(served, "pretrain", "simmim_vit", "encoder"))
    files = [Path(file) for file in table["file"].to_pylist()]
    assert len(files) == 70
    np.testing.assert_allclose(vectors, encoder.embed([encoder.reader(file) for file in files]), atol=1e-5)
    assert (vectors.dtype, table.schema.field("vector").type.list_size) == (np.float32, encoder.width)
    assert (tmp_path / "features.quarantined.csv").read_text().count("\n") == 3


def test_faults_show_no_traceback(served: Clone, photographs: Path, tmp_path: Path) -> None:
    image = str(photographs / "00.jpg")
    for arguments, words in (
        (("predict", "simmim_vit_200", image), "did you mean 'simmim_vit_2000'"),
        (("embed", ROW, image, "-o", str(tmp_path / "new.csv")), "it must be one of"),
    ):
        said = served.unmask(*arguments, fails=True)
        assert words in said, said
        assert "Traceback" not in said
