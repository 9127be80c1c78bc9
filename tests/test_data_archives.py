"""Archives that hold more than files, and archives that are none."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import archives
from flows.workspace import UserError

CONTENT = b"content" * 50


def into_zip(path: Path, names: dict[str, bytes], **links: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in names.items():
            opened.writestr(name, content)
        for name, target in links.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            opened.writestr(entry, target)
    return path


def into_tar(path: Path, names: dict[str, bytes], **links: str) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as opened:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
        for name, target in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            opened.addfile(entry)
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    "a.zip": into_zip,
    "a.tar": into_tar,
    "a.tar.gz": into_tar,
    "a.TGZ": into_tar,
}


def unpacked(archive: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """What came out, and what was refused, by name."""
    folder = archive.parent / "out"
    folder.mkdir()
    refused = archives.unpack(archive, folder)
    assert all(entry["file"].startswith(f"{archive.name}: ") for entry in refused)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files, {entry["file"].removeprefix(f"{archive.name}: "): entry["reason"] for entry in refused}


@pytest.mark.parametrize("name", WRITERS)
def test_only_files_inside_come_out(tmp_path: Path, name: str) -> None:
    names = {
        "cat/1.png": CONTENT,
        "dog/deep/2.png": b"",
        "./3.png": b"3",
        "../climbs.png": CONTENT,
        "cat/../../climbs.png": CONTENT,
        "/absolute.png": CONTENT,
        "cat\\4.png": CONTENT,
        "c:5.png": CONTENT,
        "cat/1.png/under": CONTENT,
        "x" * 300: CONTENT,
        ".hidden": CONTENT,
        "__MACOSX/cat/._1.png": CONTENT,
    }
    archive = WRITERS[name](tmp_path / name, names, out="/etc", up="../..", passwd="/etc/passwd")
    assert archives.is_archive(archive)
    files, refused = unpacked(archive)
    assert files == {"cat/1.png": CONTENT, "dog/deep/2.png": b"", "3.png": b"3"}
    expected = {
        **dict.fromkeys(["../climbs.png", "cat/../../climbs.png", "/absolute.png"], "leads out of"),
        **dict.fromkeys(["cat\\4.png", "c:5.png"], "write the path with '/'"),
        **dict.fromkeys(["out", "up", "passwd"], "it is a link; of archives only files are taken"),
        "cat/1.png/under": "cannot be written",
        "x" * 300: "cannot be written (File name too long)",
    }
    if name == "a.zip":  # a zip may say so itself, and its reader takes the letter away or not
        refused = {entry: reason for entry, reason in refused.items() if entry in expected}
    assert refused.keys() == expected.keys()
    for entry, reason in expected.items():
        assert reason in refused[entry] or "another entry" in refused[entry]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        for content in (b"first", b"second"):
            entry = tarfile.TarInfo("1.png")
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    assert unpacked(tmp_path / "a.tar") == ({"1.png": b"first"}, {"1.png": "another entry has this name"})


def test_odd_members_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as opened:
        for name, kind in {"pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE, "hard": tarfile.LNKTYPE}.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "caf\u00e9.png"
            opened.addfile(entry)
        entry = tarfile.TarInfo("caf\u00e9.png")
        entry.size = 3
        opened.addfile(entry, io.BytesIO(b"abc"))
    files, refused = unpacked(tmp_path / "a.tar")
    assert files == {}
    assert refused.keys() == {"pipe", "device", "hard", "caf\\udce9.png"}
    assert "that can be shown" in refused["caf\\udce9.png"]


def test_damaged_members_of_a_zip(tmp_path: Path) -> None:
    archive = into_zip(tmp_path / "a.zip", {"good.png": CONTENT, "bad.png": bytes(range(256)) * 8, "locked.png": b"1"})
    content = bytearray(archive.read_bytes())
    at = content.index(b"bad.png") + len(b"bad.png") + 20
    content[at : at + 8] = b"\xff" * 8
    # The flag of an encrypted entry, in its own header and in the list at the end.
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.rindex(mark) + offset] |= 1
    archive.write_bytes(content)
    files, refused = unpacked(archive)
    assert files == {"good.png": CONTENT}
    assert refused.keys() == {"bad.png", "locked.png"}
    assert "cannot be unpacked" in refused["bad.png"]
    assert "encrypted" in refused["locked.png"]


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_archives(tmp_path: Path, name: str) -> None:
    archive = WRITERS[name](tmp_path / name, {f"{number}.png": bytes([number]) * 9000 for number in range(9)})
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2 + 100])
    with pytest.raises(UserError, match=r"the archive is damaged or of another kind .*; fetch it again"):
        unpacked(archive)
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="damaged or of another kind"):
        archives.unpack(tmp_path / "text.zip", tmp_path)


def test_a_zip_whose_list_is_damaged(tmp_path: Path) -> None:
    whole = into_zip(tmp_path / "whole.zip", {"a.png": CONTENT}).read_bytes()
    listed = whole.index(b"PK\x01\x02")
    newer, nameless = bytearray(whole), bytearray(whole)
    newer[listed + 6] = 255  # the version of the format that is needed
    (tmp_path / "newer.zip").write_bytes(newer)
    with pytest.raises(UserError, match=r"damaged or of another kind \(zip file version 25.5\)"):
        archives.unpack(tmp_path / "newer.zip", tmp_path)
    # A name of no letter, which leaves its letters to the comment behind it.
    nameless[listed + 28], nameless[listed + 32] = 0, nameless[listed + 28]
    (tmp_path / "nameless.zip").write_bytes(nameless)
    files, refused = unpacked(tmp_path / "nameless.zip")
    assert not files
    assert list(refused) == [""]


def test_archives_of_more_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb of zeros says how large it becomes."""
    archive = into_zip(tmp_path / "bomb.zip", {"zeros": bytes(3 << 20)})
    assert archive.stat().st_size < 9000
    space = type("Space", (), {"free": 2 << 20})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: space)
    with pytest.raises(UserError, match=r"need more than the 2 MiB that are free; make room"):
        unpacked(archive)
    assert not list((tmp_path / "out").iterdir())


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    for name in ("a.png", "a.gz", "a.rar"):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        assert not archives.is_archive(tmp_path / name)
    (tmp_path / "folder.zip").mkdir()
    assert not archives.is_archive(tmp_path / "folder.zip")
