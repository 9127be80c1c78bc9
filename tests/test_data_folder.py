"""Folders of images as users have them, with all that lies about in such folders."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_core.data import pack
from mim_core.data.folder import decode, folder, scan, short_side, split_files


def noise(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


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
    paths = scan(tmp_path)[0]
    owned = split_files(tmp_path, paths, 0.2, 0.2)
    contents = {split: {paths[index].read_bytes() for index in indices} for split, indices in owned.items()}
    assert {split: len(found) for split, found in contents.items()} == {"train": 18, "validation": 6, "test": 6}
    assert sum(map(len, owned.values())) == 40
    assert owned == split_files(tmp_path, paths, 0.2, 0.2)


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
        "pipe.png": "a pipe, socket or device",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
    (tmp_path / "good.jpg").unlink()
    with pytest.raises(ValueError, match=r"found no readable image \(6 files refused\)"):
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


def bomb(side: int) -> bytes:
    """A small PNG that claims to be `side` x `side` px."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 40_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    """Pillow warns of the smaller one and fails on the larger one."""
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    assert "over Pillow's limit" in refused(tmp_path)["bomb.png"]


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_16_bits_are_scaled_by_their_whole_range(tmp_path: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / name)
    expected = (ramp / 257).round()
    assert (np.abs(decode(tmp_path / name, (32, 32)) - expected) <= 1).all()


def test_floats_must_have_a_known_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "half.tif")
    Image.fromarray(np.full((8, 8), 7.5, np.float32)).save(tmp_path / "unknown.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    assert (decode(tmp_path / "half.tif", (8, 8)) == 128).all()
    reasons = refused(tmp_path)
    assert reasons.keys() == {"unknown.tif", "nan.tif"}
    assert "not within 0 and 1" in reasons["unknown.tif"]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.fromarray((pixels[..., 3] > 0).astype(np.uint8), "L").convert("P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    for name in ("rgba.png", "palette.png"):
        image = decode(tmp_path / name, (8, 8))
        assert (image[:, :, 0] == 255).all()
        assert image[:, 0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (9, 7))
    image.save(tmp_path / "image.tif")
    assert not refused(tmp_path)
    assert decode(tmp_path / "image.tif", (16, 24)).shape == (3, 16, 24)


def test_exif_turns_the_image(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = decode(tmp_path / "turned.png", (40, 20))
    assert image[:, :18].min() > 250
    assert image[:, 22:].max() < 5
    assert short_side(tmp_path / "turned.png") == 20


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "image.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00\x03")
    assert decode(tmp_path / "image.jpg", (8, 8)).shape == (3, 8, 8)
    assert not refused(tmp_path)


def test_cropping_keeps_the_centre_and_the_shape(tmp_path: Path) -> None:
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (decode(tmp_path / "wide.png", (30, 30)) == 255).all()
    assert decode(tmp_path / "wide.png", (10, 30))[:, 5].max() == 255
