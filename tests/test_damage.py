"""Disks that lie or are full: a damaged checkpoint is passed over, one that does not fit leaves those before it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tried
from core_pieces import OPTIM, pretrain_row, python

from mim_core import checkpoint
from mim_core.data.pack import Pack
from mim_core.files import read_curve
from mim_core.jobs import pretrain
from mim_core.params import PretrainRow
from mim_core.train import StoppedError

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = (*checkpoint.FILES, checkpoint.SUMS)
STEPS = 20


def row() -> PretrainRow:
    """Twenty steps, and a checkpoint at each."""
    return pretrain_row(optim={**OPTIM, "epochs": 5}, checkpoint_minutes=1.0e-6)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, pack: Pack) -> tuple[Path, Path]:
    """A job's folder at its end, and that of the same job stopped with two checkpoints, of steps 8 and 9."""
    torch.set_num_threads(1)
    whole, part = (tmp_path_factory.mktemp(name) for name in ("whole", "part"))
    pretrain(row(), pack, whole, seed=5)

    class Nine:
        """Asks to stop after step 9: the curve tells how far the job is."""

        @property
        def asked(self) -> bool:
            return any(line["step"] >= 9 for line in read_curve(part / "curve.jsonl"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mim_core.jobs.run.STOP", Nine())
        with pytest.raises(StoppedError):
            pretrain(row(), pack, part, seed=5)
    assert sorted(one.name for one in (part / "checkpoints").iterdir()) == ["step_000000008", "step_000000009"]
    return whole, part


def flip(path: Path) -> str:
    """Flip one bit somewhere in a file."""
    data, bit = bytearray(path.read_bytes()), random.randrange(path.stat().st_size * 8)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.name}"


def cut(path: Path) -> str:
    size = random.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


def lose(path: Path) -> str:
    path.unlink()
    return f"{path.name} gone"


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "harm"), [
    *((name, flip) for name in FILES), ("weights.safetensors", cut), ("state.json", cut), ("optimisers.pt", lose),
    (checkpoint.SUMS, lose),
])  # fmt: skip
def test_a_damaged_file_is_found_and_the_checkpoint_before_gives_the_same_weights(
    tmp_path: Path, pack: Pack, jobs: tuple[Path, Path], name: str, harm: Callable[[Path], str], tried: Tried
) -> None:
    whole, part = jobs
    shutil.copytree(part, tmp_path, dirs_exist_ok=True)
    what = harm(tmp_path / "checkpoints" / "step_000000009" / name)
    with pytest.warns(UserWarning, match=rf"step_000000009 \(.*{name}.*\); the run goes on from step 8; check the"):
        pretrain(row(), pack, tmp_path, seed=5)
    assert weights(tmp_path) == weights(whole), what
    assert [line["step"] for line in read_curve(tmp_path / "curve.jsonl") if "loss" in line] == [*range(1, STEPS + 1)]
    # The damaged one neither stays nor takes the place of one of the two that are kept.
    left = sorted(one.name for one in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_000000019", "step_000000020"], what
    tried(
        "a damaged file in the newest checkpoint (a bit flipped, cut, gone)",
        1,
        "found; the steps since the one before, made again to the same weights",
    )


def test_any_byte_of_a_checkpoint_is_watched(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, {"w": torch.arange(6.0)}, {"model": {"rate": 0.5}}, {"seconds": 1.5})
    folder = tmp_path / "step_000000003"
    assert checkpoint.damage(folder) == ""
    sums = subprocess.run(["sha256sum", "--check", "--strict", checkpoint.SUMS], cwd=folder, capture_output=True)
    assert sums.returncode == 0, sums.stderr
    for name in FILES:
        data = (folder / name).read_bytes()
        for at in range(random.randrange(7), len(data), 7):
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert checkpoint.damage(folder), f"byte {at} of {name}"
        (folder / name).write_bytes(data + b"\0")
        assert checkpoint.damage(folder), f"a byte behind {name}"
        (folder / name).write_bytes(data)
    assert checkpoint.damage(folder) == ""


@pytest.mark.reliability
def test_with_no_whole_checkpoint_the_run_starts_afresh(
    tmp_path: Path, pack: Pack, jobs: tuple[Path, Path], tried: Tried
) -> None:
    whole, part = jobs
    shutil.copytree(part, tmp_path, dirs_exist_ok=True)
    for step in (8, 9):
        flip(tmp_path / "checkpoints" / f"step_{step:09d}" / random.choice(FILES))
    with pytest.warns(UserWarning, match=r"step_000000009 .*, step_000000008 .*; none is whole: the run starts afresh"):
        pretrain(row(), pack, tmp_path, seed=5)
    assert weights(tmp_path) == weights(whole)
    tried("every checkpoint damaged", 1, "found; the run starts afresh, to the same weights")


def test_a_whole_checkpoint_is_gone_on_from_without_a_warning(
    tmp_path: Path, pack: Pack, jobs: tuple[Path, Path]
) -> None:
    whole, part = jobs
    shutil.copytree(part, tmp_path, dirs_exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(row(), pack, tmp_path, seed=5)
    assert weights(tmp_path) == weights(whole)


# A file larger than the limit fails where it is written, as on a full disk, and needs no right to mount one.
LIMITED = """
import resource, sys
from pathlib import Path
from mim_core import checkpoint
import torch
small, large = ({"w": torch.full((many,), 7.0)} for many in (1000, 400_000))
folder = Path(sys.argv[1])
for step in (1, 2):
    checkpoint.save(folder, step, small, {"model": small}, {})
checkpoint.write_weights(folder / "one.safetensors", small, {"of": 1})
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
tries = (
    lambda: checkpoint.save(folder, 3, large, {}, {}),
    lambda: checkpoint.save(folder, 3, small, {"model": [large]}, {}),
    lambda: checkpoint.write_weights(folder / "one.safetensors", large, {"of": 2}),
)
for one in tries:
    try:
        one()
    except checkpoint.NotWrittenError as error:
        print(error)
about, weights, optimisers = checkpoint.newest(folder)
assert about["step"] == 2
assert torch.equal(weights["w"], small["w"]) and torch.equal(optimisers["model"]["w"], small["w"])
assert not checkpoint.damage(folder / "step_000000001")
assert checkpoint.read_weights(folder / "one.safetensors")[1] == {"of": 1}
print(sorted(one.name for one in folder.iterdir()))
"""


def without_room(folder: Path, how: str) -> list[str]:
    out, errors = python("-c", LIMITED, str(folder), how).communicate(timeout=60)
    assert not errors
    return out.splitlines()


def check_refusals(folder: Path, lines: list[str], why: str) -> None:
    targets = ("step_000000003", "step_000000003", "one.safetensors")
    assert lines[3:] == ["['one.safetensors', 'step_000000001', 'step_000000002']"], lines
    for line, target in zip(lines, targets, strict=False):
        assert line.startswith(f"{folder / target}: not written ({why}"), line
        assert "); it needs 1.5 MiB and " in line
        assert f"MiB are free in {folder}; make room and run again" in line


def test_a_file_that_does_not_fit_leaves_what_was_there_and_says_how_much_it_needs(tmp_path: Path) -> None:
    check_refusals(tmp_path, without_room(tmp_path, "limit"), "File too large")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where the system lets one be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_there_and_says_how_much_is_free(small_disk: Path) -> None:
    lines = without_room(small_disk, "disk")
    check_refusals(small_disk, lines, "No space left on device")
    assert f"and {shutil.disk_usage(small_disk).free / 2**20:.1f} MiB are free" in lines[2], lines[2]


@pytest.mark.reliability
def test_a_job_on_a_full_disk_ends_with_what_to_do_and_goes_on_when_there_is_room(
    small_disk: Path, pack: Pack, jobs: tuple[Path, Path], tried: Tried
) -> None:
    whole, _ = jobs
    with pytest.raises(checkpoint.NotWrittenError, match=r"checkpoints/step_.*No space left on device.*make room"):
        pretrain(row(), pack, small_disk / "job", seed=5)
    before: Any = checkpoint.newest(small_disk / "job" / "checkpoints")
    assert before is not None
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    pretrain(row(), pack, small_disk / "job", seed=5)
    assert weights(small_disk / "job") == weights(whole)
    tried(
        "a disk that fills up while checkpoints are written", 1, "says what to do; the same weights when there is room"
    )
