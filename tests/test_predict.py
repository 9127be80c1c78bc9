"""Answers and features of many files: what is written, what is left out and said, and that memory stays."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from conftest import Clone
from core_pieces import classify_row
from PIL import Image
from shapes import COUNTS, DETECTOR, FCN, NAMES, shaped_pack

from flows import predict as predicting
from flows import workspace
from flows.overlays import LONGEST, overlay
from flows.predict import embed, list_images, predict
from flows.workspace import UserError
from mim_core import inference
from mim_core.data.pack import Pack
from mim_core.jobs import downstream

ROW = "simmim_vit_2000"
KINDS: dict[str, dict[str, Any]] = {"classify": {"name": "classify"}, "segment": FCN, "detect": DETECTOR}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return shaped_pack(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def trained(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of weights of three tasks."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, task in KINDS.items():
        row = classify_row(task=task, augment=None, optim={"batch": 8, "epochs": 2})
        downstream(row, pack, folder / kind, 0, 3e-3, None, test=True)
    return {kind: folder / kind / "model.safetensors" for kind in KINDS}


@pytest.fixture(scope="module")
def images(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images at twice their size, in two folders with equal names; and files that are no images."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(pack.split("test").images):
        file = folder / ("one" if index % 2 else "two") / f"{index // 2}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).resize((96, 64)).save(file)
    (folder / "one" / "broken.png").write_bytes((folder / "one" / "0.png").read_bytes()[:200])
    (folder / "two" / ".hidden").write_text("what systems leave behind")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def home(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone that commands in this process work in."""
    monkeypatch.chdir(clone.folder)
    workspace.root.cache_clear()
    yield clone.folder
    workspace.root.cache_clear()


def publish(home: Path, weights: Path) -> None:
    """Put weights where the row's stage does. The row's own task does not matter: the file says what it is."""
    target = home / "runs" / "downstream" / ROW / "model.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, target)


def answers(weights: Path, images: Path) -> dict[str, dict[str, Any]]:
    """What the model answers, by file."""
    model = inference.load_model(weights)
    files = sorted(images.rglob("[0-9].png"))
    assert len(files) == COUNTS["test"]
    found = model.answer([model.reader(file) for file in files])
    return {str(file): answer for file, answer in zip(files, found, strict=True)}


def close(found: Any, wanted: Any) -> bool:
    """Equal to a rounding of float32, wherever there are numbers."""
    if isinstance(wanted, dict):
        return set(found) >= set(wanted) and all(close(found[key], one) for key, one in wanted.items())
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return bool(found == pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else found == wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_hold_the_models_answers(
    kind: str, home: Path, trained: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    publish(home, trained[kind])
    wanted = answers(trained[kind], images)
    for ending in ("parquet", "jsonl"):
        said = list(predict(ROW, [str(images)], tmp_path / f"a.{ending}", None, replace=False))
        assert any(f"{len(wanted)} images" in line for line in said)
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [line["file"] for line in lines] == sorted(wanted)
    for row, line in zip(rows, lines, strict=True):
        answer = dict(wanted[row["file"]])
        for found in (row, line):
            content = found.pop("map", None)
            if content:
                png = content if isinstance(content, bytes) else base64.b64decode(content)
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), answer["map"])
        answer.pop("map", None)
        assert close(row, answer)
        assert close(line, answer)
    assert json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"unmask"])["row"] == ROW


def test_csv_has_a_row_for_each_object_segment_and_image(
    home: Path, trained: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    for kind, weights in trained.items():
        publish(home, weights)
        wanted = answers(weights, images)
        list(predict(ROW, [str(images)], tmp_path / f"{kind}.csv", None, replace=False))
        with (tmp_path / f"{kind}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["file"] for row in rows} == set(wanted)
        for name, answer in wanted.items():
            own = [row for row in rows if row["file"] == name]
            if kind == "classify":
                (one,) = own
                assert one["class"] == answer["class"]
                assert [one[f"class_{rank}"] for rank in (2, 3)] == [top["class"] for top in answer["top"][1:]]
                assert float(one["probability_3"]) == pytest.approx(answer["top"][2]["probability"], abs=1e-4)
            else:
                part, label = ("shares", "segment") if kind == "segment" else ("objects", "class")
                assert [row[label] for row in own] == ([one[label] for one in answer[part]] or [""])


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_pictures_are_drawn_of_each_image_under_its_own_name(
    kind: str, home: Path, trained: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    publish(home, trained[kind])
    list(predict(ROW, [str(images)], None, tmp_path / "drawn", replace=False))
    drawn = sorted(path.relative_to(tmp_path / "drawn").as_posix() for path in (tmp_path / "drawn").rglob("*.png"))
    assert drawn == sorted(f"{folder}/{index}.png.png" for folder in ("one", "two") for index in range(6))


def test_an_overlay_shows_classes_where_they_are() -> None:
    planes = np.full((3, 40, 60), 128, np.uint8)
    values = np.zeros((40, 60), np.uint8)
    values[10:20, 20:40], values[:5] = 1, 255
    shares = [{"segment": "background", "share": 0.8}, {"segment": "red", "share": 0.2}]
    picture = overlay(planes, {"map": values, "shares": shares}, ["background", "red"])
    assert picture is not None
    scale = 512 // 60
    pixels = np.asarray(picture)
    assert (pixels[2 * scale, 30 * scale] > 190).all()  # what was not judged is lightened
    assert (pixels[30 * scale, 30 * scale] == 128).all()  # the background is as it was
    assert (pixels[15 * scale, 30 * scale] != 128).any()
    box = {"class": "red", "score": 0.9, "left": 10.0, "top": 18.0, "right": 30.0, "bottom": 36.0}
    unsure = {**box, "score": 0.1, "left": 40.0, "right": 55.0}
    picture = overlay(planes, {"objects": [box, unsure]}, ["blue", "red"])
    assert picture is not None
    pixels = np.asarray(picture).reshape(picture.height, picture.width, 3)
    changed = (pixels != 128).any(-1)
    assert changed[27 * scale, 10 * scale]
    assert not changed[27 * scale, 20 * scale]
    assert not changed[:, 39 * scale :].any()  # too unsure to be drawn
    large = overlay(np.zeros((1, 3000, 40), np.uint8), {"objects": []}, ["a"])
    assert large is not None
    assert max(large.size) == LONGEST
    assert overlay(planes, {"class": "red"}, ["red"]) is None


def test_files_that_are_no_images_are_listed_with_the_reason(
    home: Path, trained: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    publish(home, trained["classify"])
    out = tmp_path / "features.parquet"
    said = list(embed(ROW, [str(images)], out, replace=False))
    assert any("2 files were left out" in line for line in said)
    with (tmp_path / "features.quarantined.csv").open() as file:
        left = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(left) == {"broken.png", "notes.txt"}
    assert "cannot be decoded" in left["broken.png"]
    table = pq.read_table(out)
    assert table.num_rows == COUNTS["test"]
    encoder = inference.load_encoder(trained["classify"])
    files = [Path(file) for file in table["file"].to_pylist()]
    expected = encoder.embed([encoder.reader(file) for file in files])
    np.testing.assert_allclose(np.stack(table["vector"].to_numpy()), expected, atol=1e-5)
    # A table that is replaced takes along what it said of others.
    list(embed(ROW, [str(images / "two" / "*.png")], out, replace=True))
    assert pq.read_table(out).num_rows == COUNTS["test"] // 2
    assert not (tmp_path / "features.quarantined.csv").exists()


def test_batches_are_read_one_ahead_and_no_further() -> None:
    read: list[Path] = []

    def reader(path: Path) -> Any:
        read.append(path)
        return path

    files, told, quarantined = [Path(f"{index}.png") for index in range(30)], [], list[dict[str, str]]()
    for at, batch in enumerate(predicting._read(reader, files, 4, quarantined, told.append)):
        assert [path for path, _ in batch] == files[4 * at : 4 * at + 4]
        assert len(read) <= 4 * (at + 2)
    assert told == [4, 8, 12, 16, 20, 24, 28, 30]
    assert sorted(read) == sorted(files)


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.png", "b/1.png", "a.png", "b/.hidden/3.png", "b/.thumbs", "[odd].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert list_images(["b", "*.png", "b/1.png"]) == [Path(one) for one in ("b/1.png", "b/2.png", "[odd].png", "a.png")]
    assert list_images(["[odd].png"]) == [Path("[odd].png")]  # a file's own name before a glob
    assert list_images(["**/*.png"]) == [Path(one) for one in ("[odd].png", "a.png", "b/1.png", "b/2.png")]


def test_faults_are_told_before_work_starts(home: Path, trained: dict[str, Path], images: Path, tmp_path: Path) -> None:
    there, image = tmp_path / "there.parquet", str(images / "one" / "0.png")
    there.write_text("somebody's")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"run `dvc repro downstream@{ROW}`"):
        list(predict(ROW, [image], None, None, replace=False))
    with pytest.raises(UserError, match="run `dvc repro pretrain_fitted@tokens`"):
        list(embed("tokens", [image], tmp_path / "new.parquet", replace=False))
    publish(home, trained["classify"])
    for row, given, out, draw, words in (
        ("simmim_vit_200", image, None, None, "did you mean 'simmim_vit_2000'"),
        ("simmim_vit", image, None, None, "use `unmask embed`"),
        (ROW, str(tmp_path / "nowhere*"), None, None, "no such file, folder or match"),
        (ROW, str(tmp_path / "empty"), None, None, "found no file"),
        (ROW, str(images / "notes.txt"), "new.csv", None, "none of 1 files is an image .* extensions"),
        (ROW, image, "there.parquet", None, "--replace"),
        (ROW, image, "new.xlsx", None, "it must be one of"),
        (ROW, image, "empty", None, "found the ending ''"),
        (ROW, image, None, "drawn", "only maps and boxes are drawn"),
        (ROW, image, None, "there.parquet", "this is a file"),
    ):
        with pytest.raises(UserError, match=words):
            list(predict(row, [given], out and tmp_path / out, draw and tmp_path / draw, replace=False))
    with pytest.raises(UserError, match=r"must be one of \['.parquet'\]"):
        list(embed(ROW, [image], tmp_path / "new.csv", replace=False))
    assert there.read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "clone") == ["empty", "there.parquet"]
    shutil.copyfile(image, home / "runs" / "downstream" / ROW / "model.safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        list(predict(ROW, [image], None, None, replace=False))


def test_words_for_the_terminal() -> None:
    box = {"left": 1.0, "top": 2.0, "right": 3.0, "bottom": 4.0}
    objects = [{"class": NAMES[0], "score": 0.2, **box}, {"class": NAMES[1], "score": 0.9, **box}]
    assert predicting._words({"objects": objects}) == ["blue 0.90 at [1, 2, 3, 4]", "1 below 0.3"]
    assert predicting._words({"objects": []}) == ["nothing found"]
    assert predicting._words({"top": [{"class": "a", "probability": 0.75}]}) == ["a 75.0%"]
    assert predicting._words({"shares": [{"segment": "a", "share": 0.75}]}) == ["a 75.0%"]
