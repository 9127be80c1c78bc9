"""Packs written by several processes, killed and gone on with: always the same bytes, and in flat memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Tried
from PIL import Image

from mim_core.data import pack, records
from mim_core.data.coco import coco
from mim_core.data.folder import folder
from mim_core.data.moments import channel_moments
from mim_core.data.work import Arrays, Work

SIZE = (12, 16)
# A process of its own, so that it can be killed and its memory is its alone.
PREPARE = """
import sys
from pathlib import Path
from mim_core.data import pack, records
from mim_core.data.folder import folder
from mim_core.data.work import Work

def main(images, target, key, processes, piece, *size):
    records.LOOK_IMAGES = pack.PIECE_IMAGES = piece
    with Work(target.with_name(".part"), key, processes, print, worth_s=0) as work:
        pack.write(folder(images, size_px=size), target, {"name": "some"}, work)
    # Not the system's own maximum, which begins with that of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        print("peak", int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024)

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
"""


def images(root: Path, count: int) -> Path:
    """Images of several sizes in two classes, and two files that are none."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (10 + index % 3, 14, 3), np.uint8)
        Image.fromarray(pixels).save(root / ("cat", "dog")[index % 2] / f"{index:05}.png", compress_level=1)
    (root / "cat" / "00000x.png").write_text("no image")
    (root / "dog" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(script: Path, *arguments: object) -> subprocess.Popen[str]:
    script.write_text(PREPARE)
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("scale") / "images", 300)


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, bytes]:
    """The pack that one process writes in one go, without notes."""
    pack.write(folder(root, size_px=SIZE), root.parent / "expected", {"name": "some"})
    found = content(root.parent / "expected")
    meta = json.loads(found["meta.json"])
    assert [entry["file"] for entry in meta["quarantined"]] == ["cat/00000x.png", "dog/cut.jpg"]
    assert sum(meta["counts"].values()) == 300
    return found


@pytest.mark.reliability
def test_any_number_of_processes_and_any_kill_give_the_same_pack(
    root: Path, expected: dict[str, bytes], tmp_path: Path, tried: Tried
) -> None:
    """Killed at random moments until it ends by itself; what was noted is not done again."""
    target, kills, began = tmp_path / "pack", 0, 0
    rng = random.Random(5)
    while not target.exists():
        process = start(tmp_path / "prepare.py", root, target, "key", 2, 16, *SIZE)
        # From the first piece on, which a busy machine may come to late.
        while kills < 3 and process.poll() is None and len(list((tmp_path / ".part").glob("done/*"))) <= began:
            time.sleep(0.005)
        if kills < 3 and process.poll() is None:
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            kills += 1
            began = len(list((tmp_path / ".part").glob("done/*.npz")))
            continue
        said = ended(process)
        # The first line tells of images done that were not done here: the kills' work.
        assert began == 0 or int(said.split()[0]) > int(said.split()[2])
    assert kills >= 1
    assert content(target) == expected
    assert not (tmp_path / ".part").exists()
    tried("SIGKILL at a random moment while a pack is written", kills, "goes on; the same pack, byte for byte")


def test_progress_says_images_a_second_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = pytest.importorskip("flows.progress")
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    with progress.Bar("prepare some", 1) as bar, Work(progress=bar.count) as work:
        for name in ("read", "write train"):
            list(work.map(name, added, [(1, 2), (3, 4)], [100, 50]))
    said = capsys.readouterr().out.splitlines()
    numbers = [("read", 100), ("read", 150), ("write train", 100), ("write train", 150)]
    assert len(said) == len(numbers)
    for line, (name, done) in zip(said, numbers, strict=True):
        assert re.fullmatch(rf"  prepare some  {name} {done}/150  \d+ images/s  \d+ s left", line), line


def test_another_key_begins_afresh(root: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    first = list(Work(part, "one").map("add", added, [(1, 2), (3, 4)], [1, 1]))
    again = list(Work(part, "one").map("add", added, [(0, 0), (0, 0)], [1, 1]))
    assert [int(one["sum"]) for one in again] == [int(one["sum"]) for one in first] == [3, 7]
    (part / "done" / "add-0000001.npz").write_bytes(b"PK damaged")
    assert [int(one["sum"]) for one in Work(part, "one").map("add", added, [(0, 0), (0, 5)], [1, 1])] == [3, 5]
    for key in ("two", ""):
        assert int(next(Work(part, key).map("add", added, [(0, 0)], [1]))["sum"]) == 0
    assert int(next(Work(part).map("add", added, [(0, 1)], [1]))["sum"]) == 1


def added(one: int, other: int) -> Arrays:
    return {"sum": np.array(one + other)}


def fails(number: int) -> Arrays:
    if number == 3:
        raise OSError("the third is broken")
    if number == 5:
        raise KeyError("the fifth is a fault of ours")
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": np.array(number)}


@pytest.mark.parametrize(
    ("numbers", "error"),
    [([1, 2, 3, 5], "the third is broken"), ([1, 5, 3], "the fifth"), ([1, 2, 7, 1, 1, 1, 1], "exit code -9")],
)
def test_the_first_failure_by_order_is_told(numbers: list[int], error: str) -> None:
    with pytest.raises((OSError, KeyError), match=error), Work(processes=2, worth_s=0) as work:
        list(work.map("fail", fails, [(number,) for number in numbers], [1] * len(numbers)))


def test_maps_and_boxes_are_the_same_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances are wide in one piece alone; all rows are then."""
    root = tmp_path / "coco"
    (root / "train").mkdir(parents=True)
    listed, objects = [], []
    for index in range(12):
        Image.fromarray(np.full((20, 20, 3), index * 20, np.uint8)).save(root / "train" / f"{index}.png")
        listed.append({"id": index, "file_name": f"{index}.png", "width": 20, "height": 20})
        for number in range(300 if index == 7 else index % 3):
            left, top = number % 18, number // 18
            box = {"bbox": [left, top, 2, 2], "segmentation": [[left, top, left + 2, top, left + 2, top + 2]]}
            more = {"id": len(objects), "image_id": index, "category_id": 1, "iscrowd": 0, "area": 2.0}
            objects.append({**box, **more})
    file = {"images": listed, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(file))
    monkeypatch.setattr(records, "LOOK_IMAGES", 4)
    monkeypatch.setattr(pack, "PIECE_IMAGES", 3)
    for processes in (1, 2):
        with Work(tmp_path / "part", "", processes, worth_s=0) as work:
            source = coco(root, size_px=(20, 20), validation=0.2, test=0.0)
            pack.write(source, tmp_path / str(processes), {}, work)
    found = content(tmp_path / "1")
    assert found == content(tmp_path / "2")
    assert {"train/instances.npy", "train/boxes.npy", "train/box_starts.npy", "validation/boxes.npy"} <= found.keys()
    kinds = {pack.open_pack(tmp_path / "1").split(name).array("instances").dtype for name in ("train", "validation")}
    assert kinds == {np.dtype(np.uint8), np.dtype(np.uint16)}


@pytest.mark.parametrize("shape", [(1500, 3, 8, 8), (1100, 1, 5, 7), (7, 4, 33, 31), (3, 2, 1, 1)])
def test_moments_are_those_of_all_values_at_once(shape: tuple[int, ...]) -> None:
    """To the last bit: training normalises by them."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sums = np.zeros((2, shape[1]))
    for first in range(0, len(pixels), 1024):
        part = pixels[first : first + 1024].astype(np.float64) / 255
        sums += part.sum((0, 2, 3)), (part**2).sum((0, 2, 3))
    mean, square = sums / (pixels.size / shape[1])
    assert channel_moments(pixels).tolist() == [mean.tolist(), np.sqrt(square - mean**2).tolist()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's own peak")
def test_memory_does_not_grow_with_the_pack(tmp_path: Path) -> None:
    """Of 3,000 images more, whose pixels are 35 MiB, a process keeps the names and labels alone."""
    pictures = [path.read_bytes() for path in sorted((images(tmp_path / "pictures", 60) / "dog").glob("0*.png"))]
    peaks = []
    for count in (1300, 4300):
        (tmp_path / str(count)).mkdir()
        for index in range(count):  # bytes behind a picture's end make it another file
            content = pictures[index % len(pictures)] + index.to_bytes(4, "little")
            (tmp_path / str(count) / f"{index:05}.png").write_bytes(content)
        arguments = (tmp_path / str(count), tmp_path / f"{count}-pack", "", 1, 128, 64, 64)
        peaks.append(int(ended(start(tmp_path / "prepare.py", *arguments)).split()[-1]))
    assert peaks[1] - peaks[0] < 16, peaks
    assert peaks[1] < 200, "no process that writes packs needs PyTorch"
