"""Folders of images as users have them, with all that lies about in such folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_core.data import folder as folders
from mim_core.data import pack
from mim_core.data.folder import folder
from mim_core.data.records import Found
from mim_core.data.splits import digest, published_splits, share_out


def noise(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def scan(root: Path) -> tuple[dict[Path, tuple[int, int, int]], list[dict[str, str]]]:
    """The readable images with their shapes, and what is refused."""
    found = Found(root, "rgb")
    return {record.path: record.shape for record in folders.scan(found)}, found.quarantined


def refused(root: Path) -> dict[str, str]:
    return {entry["file"]: entry["reason"] for entry in scan(root)[1]}


def test_classes_and_unlabelled_images(tmp_path: Path) -> None:
    for index, name in enumerate(["cat/1.png", "cat/deep/2.PNG", "dog/3.Jpg", "4.jpeg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(index).save(tmp_path / name)
    source = folder(tmp_path, size_px=(24, 40), validation=0.0, test=0.0)
    assert source.classes == ["cat", "dog"]
    samples = list(source.samples("train"))
    assert [sample.label for sample in samples] == [-1, 0, 0, 1]
    assert [sample.origin for sample in samples] == [(0,), (1,), (2,), (3,)]
    assert {sample.image.shape for sample in samples} == {(3, 24, 40)}
    pack.write(source, tmp_path / "packed", {})
    assert pack.open_pack(tmp_path / "packed").split("train").labels.tolist() == [-1, 0, 0, 1]


def test_copies_lie_in_one_split(tmp_path: Path) -> None:
    for index in range(30):
        noise(index, 8, 8).save(tmp_path / f"{index:02}.png")
        if index < 10:
            (tmp_path / "copies").mkdir(exist_ok=True)
            (tmp_path / "copies" / f"{index}.png").write_bytes((tmp_path / f"{index:02}.png").read_bytes())
    paths = list(scan(tmp_path)[0])
    marks, classes = [digest(path) for path in paths], [path.parent.name for path in paths]
    owned = share_out(marks, classes, 0.2, 0.2)
    contents = {split: {paths[index].read_bytes() for index in indices} for split, indices in owned.items()}
    assert {split: len(found) for split, found in contents.items()} == {"train": 18, "validation": 6, "test": 6}
    assert sum(map(len, owned.values())) == 40
    again = share_out(marks, classes, 0.2, 0.2)
    assert all(np.array_equal(owned[split], again[split]) for split in owned)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ({"train": 20}, (12, 4, 4)),
        ({"train": 20, "val": 5}, (16, 4, 5)),
        ({"train": 20, "test": 6}, (16, 4, 6)),
        ({"train": 20, "val": 5, "test": 6}, (20, 5, 6)),
        ({"train": 20, "val": 5, "test": 0}, (16, 4, 5)),
    ],
)
def test_published_splits_are_kept_and_missing_ones_are_shares(
    published: dict[str, int], expected: tuple[int, ...]
) -> None:
    indices, start = {}, 0
    for name, count in published.items():
        indices[name] = range(start, start + count)
        start += count
    owned = published_splits(indices, lambda index: digest(bytes([index])), [0] * start, 0.2, 0.2)
    assert tuple(map(len, owned.values())) == expected
    assert sorted(index for part in owned.values() for index in part) == list(range(start))
    kept = owned["test"] if len(published) == 2 or not published.get("test", 1) else []
    assert set(kept) <= {*indices.get("val", []), *indices.get("test", [])}


def test_small_classes_still_fill_every_split(tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for index in range(3):
            noise(10 * label + index, 8, 8).save(tmp_path / str(label) / f"{index}.png")
    source = folder(tmp_path, size_px=(8, 8), validation=0.1, test=0.1)
    assert source.counts == {"train": 24, "validation": 3, "test": 3}
    assert {sample.label for sample in source.samples("train")} == set(range(10))


def test_refused_files_are_listed_with_a_reason(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / ".DS_Store").write_text("left behind")
    (tmp_path / ".thumbnails").mkdir()
    noise(1).save(tmp_path / ".thumbnails" / "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    readable, quarantined = scan(tmp_path)
    assert [path.name for path in readable] == ["good.jpg"]
    reasons = {entry["file"]: entry["reason"] for entry in quarantined}
    expected = {
        "cut.jpg": "cannot be decoded",
        "empty.png": "is empty",
        "text.png": "no image of a known format",
        "notes.txt": "'.txt' is not one of the image extensions",
        "gone.png": "cannot be reached",
        "pipe.png": "a pipe, socket, device or folder",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
    (tmp_path / "good.jpg").unlink()
    with pytest.raises(ValueError, match=r"found no readable image \(6 refused\)"):
        folder(tmp_path, size_px=(8, 8))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        noise(0).save(os.fsencode(tmp_path) + b"/caf\xe9.png", format="PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    noise(1).save(tmp_path / "caf\u00e9.png")
    assert [path.name for path in scan(tmp_path)[0]] == ["caf\u00e9.png"]
    assert refused(tmp_path) == {"caf\\xe9.png": "the file's name is not UTF-8; rename it"}


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "cat").mkdir(parents=True)
    elsewhere.mkdir()
    noise(0).save(root / "cat" / "0.png")
    noise(1).save(elsewhere / "1.png")
    (root / "dog").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "file.png").symlink_to(elsewhere / "1.png")
    names = [path.relative_to(root).as_posix() for path in scan(root)[0]]
    assert names == ["cat/0.png", "cat/file.png", "dog/1.png"]
    assert set(refused(root)) == {"again", "cat/up"}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs a second user")
def test_unreadable_files_and_folders(tmp_path: Path) -> None:
    """The superuser may read anything, so where the test runs as that it becomes another one."""
    (tmp_path / "closed").mkdir()
    noise(0).save(tmp_path / "closed" / "0.png")
    noise(1).save(tmp_path / "secret.png")
    noise(2).save(tmp_path / "good.png")
    superuser = os.geteuid() == 0
    barred = [path for path in (tmp_path, *tmp_path.parents) if path.stat().st_mode & 5 != 5] if superuser else []
    modes = {path: path.stat().st_mode for path in (*barred, tmp_path / "closed")}
    for path in barred:
        path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "secret.png").chmod(0)
    if superuser:
        os.seteuid(65534)
    try:
        readable, reasons = scan(tmp_path)[0], refused(tmp_path)
    finally:
        if superuser:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
    assert [path.name for path in readable] == ["good.png"]
    assert reasons == {
        "closed": "the folder cannot be listed (Permission denied)",
        "secret.png": "the file cannot be read (Permission denied)",
    }


def test_cropping_keeps_the_centre_and_the_shape(tmp_path: Path) -> None:
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")

    def image(size: tuple[int, int]) -> np.ndarray:
        return next(folder(tmp_path, size_px=size, validation=0.0, test=0.0).samples("train")).image

    assert (image((30, 30)) == 255).all()
    assert image((10, 30))[:, 5].max() == 255


def test_all_images_of_a_pack_have_equally_many_channels(tmp_path: Path) -> None:
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.full((5, 8, 9), index, np.uint8))
    noise(0).save(tmp_path / "colours.png")
    source = folder(tmp_path, size_px=(8, 8), channels="all", validation=0.0, test=0.0)
    assert source.counts["train"] == 3
    assert [entry["file"] for entry in source.quarantined] == ["colours.png"]
    assert "has 3 channels, and most images here have 5" in source.quarantined[0]["reason"]
    pack.write(source, tmp_path / "packed", {})
    assert pack.open_pack(tmp_path / "packed").channels == 5
    assert len(pack.open_pack(tmp_path / "packed").mean) == 5
    grey = folder(tmp_path, size_px=(8, 8), channels="grey", validation=0.0, test=0.0)
    assert grey.counts["train"] == 1
    assert next(grey.samples("train")).image.shape == (1, 8, 8)
