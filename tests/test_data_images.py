"""Image files of every kind, decoded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_core.data.images import RefusedError, decode, read_values, short_side


def bomb(side: int) -> bytes:
    """A small PNG that claims to be `side` x `side` px."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 15_000, 40_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    """Pillow warns of the smaller ones and fails on the largest; 15,000 a side are 225 megapixels."""
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with pytest.raises(RefusedError, match="over Pillow's limit"):
        decode(tmp_path / "bomb.png")
    with pytest.raises(RefusedError, match=r"mask .*bomb.png: it cannot be decoded"):
        read_values(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.npy"])
def test_16_bits_are_scaled_by_their_whole_range(tmp_path: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    np.save(tmp_path / name, ramp) if name.endswith(".npy") else Image.fromarray(ramp).save(tmp_path / name)
    for channels, count in {"rgb": 3, "grey": 1, "all": 1}.items():
        image = decode(tmp_path / name, channels)  # type: ignore[arg-type]
        assert image.shape == (count, 32, 32)
        assert (np.abs(image - (ramp / 257).round()) <= 1).all()


def test_floats_must_have_a_known_range(tmp_path: Path) -> None:
    for name, value in {"half": 0.5, "unknown": 7.5, "nan": np.nan}.items():
        array = np.full((8, 8), value, np.float32)
        Image.fromarray(array).save(tmp_path / f"{name}.tif")
        np.save(tmp_path / f"{name}.npy", array)
    for ending in ("tif", "npy"):
        assert (decode(tmp_path / f"half.{ending}") == 128).all()
        for name in ("unknown", "nan"):
            with pytest.raises(RefusedError, match="not within 0 and 1"):
                decode(tmp_path / f"{name}.{ending}")


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.fromarray((pixels[..., 3] > 0).astype(np.uint8), "L").convert("P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    for name in ("rgba.png", "palette.png"):
        image = decode(tmp_path / name)
        assert (image[:, :, :4] == 255).all()
        assert image[:, 0, 7].tolist() == [10, 20, 30]
        assert decode(tmp_path / name, "all")[:, 0, 7].tolist() == [10, 20, 30, 255]
        assert decode(tmp_path / name, "all")[3, 0, 0] == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_every_mode_becomes_each_kind_of_channels(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (9, 7)).save(tmp_path / "image.tif")
    assert decode(tmp_path / "image.tif").shape == (3, 7, 9)
    assert decode(tmp_path / "image.tif", "grey").shape == (1, 7, 9)
    own = {"LA": 2, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3}.get(mode, 1)
    assert decode(tmp_path / "image.tif", "all").shape == (own, 7, 9)


def test_grey_is_luma(tmp_path: Path) -> None:
    """0.299 R + 0.587 G + 0.114 B (ITU-R 601)."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[:, 0, 0] = pixels[:, 1, 1] = pixels[:, 2, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "colours.png")
    np.save(tmp_path / "colours.npy", pixels.transpose(2, 0, 1)[:, :, :])
    assert decode(tmp_path / "colours.png", "grey")[0, 0].tolist() == [60, 117, 23]


def test_an_arrays_shorter_end_counts_its_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 7), np.uint8)
    for name, array in {"first": pixels, "last": pixels.transpose(1, 2, 0)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert (decode(tmp_path / f"{name}.npy", "all") == pixels).all()
        assert short_side(tmp_path / f"{name}.npy") == 6
        with pytest.raises(RefusedError, match=r"5 channels; 'rgb' takes one or three; set `channels: all`"):
            decode(tmp_path / f"{name}.npy")
    np.save(tmp_path / "equal.npy", pixels[:, :5, :5])
    assert (decode(tmp_path / "equal.npy", "all") == pixels[:, :5, :5].transpose(2, 0, 1)).all()
    np.save(tmp_path / "three.npy", pixels[:3])
    assert (decode(tmp_path / "three.npy") == pixels[:3]).all()
    np.save(tmp_path / "flat.npy", pixels[0])
    assert (decode(tmp_path / "flat.npy") == pixels[[0, 0, 0]]).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4), np.int64), "the array's type is int64"),
        (np.zeros((4, 4), bool), "the array's type is bool"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"shape is \[2, 3, 4, 4\]"),
        (np.zeros((0, 4), np.uint8), r"shape is \[0, 4\]"),
        (np.array([[{}]]), "cannot be decoded .*Python objects"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(RefusedError, match=said):
        decode(tmp_path / "array.npy", "all")


def test_a_truncated_array_and_one_that_claims_too_much(tmp_path: Path) -> None:
    np.save(tmp_path / "cut.npy", np.zeros((64, 64), np.uint8))
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:1000])
    with pytest.raises(RefusedError, match="cannot be decoded"):
        decode(tmp_path / "cut.npy")
    huge = np.lib.format.open_memmap(tmp_path / "huge.npy", "w+", np.uint8, (15_000, 15_000))  # a file of holes
    del huge
    with pytest.raises(RefusedError, match="over Pillow's limit"):
        decode(tmp_path / "huge.npy")


def test_pages_are_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 7), np.uint8)
    pages = [Image.fromarray(page) for page in pixels]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert (decode(tmp_path / "pages.tif", "all") == pixels).all()
    with pytest.raises(RefusedError, match="5 channels"):
        decode(tmp_path / "pages.tif")
    pages[0].save(tmp_path / "three.tif", save_all=True, append_images=pages[1:3])
    assert (decode(tmp_path / "three.tif") == pixels[:3]).all()
    pages[0].save(tmp_path / "unequal.tif", save_all=True, append_images=[pages[1].resize((9, 9))])
    with pytest.raises(RefusedError, match="unequal sizes"):
        decode(tmp_path / "unequal.tif", "all")
    pages[0].save(tmp_path / "moving.gif", save_all=True, append_images=pages[1:])
    assert decode(tmp_path / "moving.gif").shape == (3, 6, 7)


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """20 x 40 px, the left half white, to be shown turned by 90 degrees clockwise."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_exif_turns_an_image_without_a_frame(turned: Path) -> None:
    image = decode(turned)
    assert image.shape == (3, 40, 20)
    assert (image[:, :20] == 255).all()
    assert (image[:, 20:] == 0).all()
    assert short_side(turned) == 20


def test_a_frame_decides_whether_exif_turns(turned: Path) -> None:
    stored = decode(turned, frame=(20, 40))
    assert (stored[:, :, :20] == 255).all()
    assert (stored[:, :, 20:] == 0).all()
    assert (decode(turned, frame=(40, 20)) == decode(turned)).all()
    with pytest.raises(RefusedError, match="the image is 20 x 40 px, and its annotations are for 20 x 41"):
        decode(turned, frame=(20, 41))


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    image.save(tmp_path / "image.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00\x03")
    assert decode(tmp_path / "image.jpg").shape == (3, 8, 8)


def test_masks_keep_their_values(tmp_path: Path) -> None:
    values = np.array([[0, 1, 20], [255, 7, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    palette = Image.fromarray(values, "L").convert("P")
    palette.frombytes(values.tobytes())
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        assert (read_values(tmp_path / name) == values).all()
    Image.new("RGB", (3, 2)).save(tmp_path / "colours.png")
    with pytest.raises(RefusedError, match=r"colours.png: its mode is RGB"):
        read_values(tmp_path / "colours.png")
    with pytest.raises(RefusedError, match=r"missing.png: the file cannot be reached"):
        read_values(tmp_path / "missing.png")
