"""Archives that users bring: unpacked file by file, whatever they hold."""

from __future__ import annotations

import errno
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from flows.workspace import UserError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
FULL = (errno.ENOSPC, errno.EDQUOT)
Refuse = Callable[[str, object], None]
Member = tuple[str, int, str, Callable[[], IO[bytes] | None]]
"""Name, size in bytes, why it is refused (empty where it is not), and what opens it."""


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ENDINGS)


def unpack(archive: Path, folder: Path) -> list[dict[str, str]]:
    """Unpack a .zip, .tar or .tar.gz into an empty `folder`; gives the refused entries, each with `file` and `reason`.

    Only plain files are taken, under paths that stay inside; links, devices, encrypted or damaged files, names used
    twice and names that lead out are refused, and the rest goes on. Names that begin with a point are left out.
    Raises UserError where the archive itself is damaged or does not fit on the disk.
    """
    from mim_core.data.images import RefusedError
    from mim_core.data.records import named

    refused: list[dict[str, str]] = []
    free, taken = shutil.disk_usage(folder).free, 0
    try:
        for name, size, reason, content in _members(archive):
            if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
                continue
            taken += size
            if taken > free:
                raise UserError(f"{archive}: its files need more than the {free >> 20} MiB that are free; make room")
            try:
                if reason:
                    raise RefusedError(reason)
                _write(content, named(folder, name))
            except RefusedError as error:
                printable = name.encode(errors="backslashreplace").decode()
                refused.append({"file": f"{archive.name}: {printable}", "reason": str(error)})
    except (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: the archive is damaged or of another kind ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{archive}: {error.strerror or error}; the archive could not be unpacked") from None
    return refused


def _members(archive: Path) -> Iterator[Member]:
    return _zipped(archive) if archive.name.lower().endswith(".zip") else _taped(archive)


def _zipped(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            reason = "it is encrypted; unpack it yourself and add the folder" if entry.flag_bits & 1 else ""
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                reason = _odd("a link" if kind == stat.S_IFLNK else "a pipe, socket or device")
            if not entry.filename.endswith("/"):  # `is_dir` fails where there is no name
                yield entry.filename, entry.file_size, reason, lambda entry=entry: opened.open(entry)  # type: ignore[misc]


def _taped(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, encoding="utf-8", errors="surrogateescape") as opened:
        for entry in opened:
            odd = "a link" if entry.issym() or entry.islnk() else "a pipe, socket or device"
            reason = "" if entry.isreg() else _odd(odd)
            if not entry.isdir():
                yield entry.name, entry.size, reason, lambda entry=entry: opened.extractfile(entry)  # type: ignore[misc]


def _odd(found: str) -> str:
    return f"it is {found}; of archives only files are taken"


def _write(content: Callable[[], IO[bytes] | None], path: Path) -> None:
    """Write a member; raises RefusedError where the fault is its own."""
    from mim_core.data.images import RefusedError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            opened = content()
            assert opened is not None
            with opened:
                shutil.copyfileobj(opened, file)
    except FileExistsError:
        raise RefusedError("another entry has this name") from None
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError) as error:
        path.unlink(missing_ok=True)
        raise RefusedError(f"it cannot be unpacked ({error})") from None
    except OSError as error:
        if error.errno in FULL or isinstance(error, tarfile.TarError) or error.errno is None:
            raise
        raise RefusedError(f"it cannot be written ({error.strerror})") from None
