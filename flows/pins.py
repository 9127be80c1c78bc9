"""The pin of data/: the hash that its bytes must have, and how to tell what differs from it.

DVC pins data/ by one hash in data.dvc. `dvc repro` takes changed bytes and rewrites data.dvc without a word, so the pin
that counts here is data.dvc as git's index has it: whoever stages another one means it. An experiment (`dvc exp run`)
stages by itself, so there the pin is that of the commit it starts from.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from flows import workspace
from flows.workspace import UserError
from mim_core.files import write_atomically

IGNORED = (".git", ".hg", ".dvc/")
"""What DVC leaves out everywhere, in the syntax of .dvcignore."""
SETTLED_NS = 2_000_000_000
"""A file changed this short a time ago may change again within one tick of the file system's clock."""
SHOWN = 5

Listing = dict[str, str]
"""md5 by path below a folder."""


def dvc(*arguments: str) -> tuple[str, str]:
    """Run DVC; gives its output, and what went wrong where it failed. A question it asks is answered by no."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace.root(),
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return done.stdout, f"`dvc {arguments[0]}` says: {' '.join(errors[-3:])}" if done.returncode else ""


def pin() -> tuple[str, str]:
    """The pinned md5 and the text of the data.dvc that has it: git's, or the file itself where git knows none."""
    commit = os.environ.get("DVC_EXP_BASELINE_REV", "")
    text = workspace.git("show", f"{commit}:./data.dvc")
    try:
        text = (workspace.root() / "data.dvc").read_text() if text is None else text
        return str(yaml.safe_load(text)["outs"][0]["md5"]), text
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(
            f"data.dvc: cannot be read ({error}); put it back with `git checkout HEAD -- data.dvc`"
        ) from None


def pinned_listing() -> Listing | None:
    """The pinned files, where DVC's cache knows them."""
    try:
        return {entry["relpath"]: entry["md5"] for entry in json.loads(cached_at(pin()[0]).read_text())}
    except (OSError, json.JSONDecodeError):
        return None


def cached_at(md5: str) -> Path:
    """Where DVC caches an object, by its configuration; asking DVC itself takes two seconds."""
    folder = "cache"
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.read(workspace.root() / ".dvc" / name)
        folder = parser.get("cache", "dir", fallback=folder).strip("\"'")
    return workspace.root() / ".dvc" / folder / "files" / "md5" / md5[:2] / md5[2:]


def folder_md5(files: Listing) -> str:
    """DVC's md5 of a folder: that of the JSON of its files, sorted by path."""
    entries = [{"md5": md5, "relpath": path} for path, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"


def listing() -> Listing:
    """Hash the files that DVC tracks under data/; a file whose size, times and inode are known is not read again.

    Raises UserError where a file cannot be read, or is out of DVC's sight though a source would read it.
    """
    folder, memory, now = workspace.data_folder(), workspace.home() / "md5.json", time.time_ns()
    if not folder.is_dir():
        raise UserError("data: the folder is missing; `unmask data restore` fills it")
    try:
        kept = json.loads(memory.read_text())
        known = kept.get(str(folder), {})
    except (OSError, ValueError, AttributeError):
        kept, known = {}, {}
    try:
        marks = {}
        for path in _tracked(folder):
            status = os.stat(path)
            marks[path] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        names = {path: os.path.relpath(path, folder).replace(os.sep, "/") for path in marks}
        stale = [path for path, mark in marks.items() if known.get(names[path], [])[:-1] != mark]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            fresh = dict(zip(stale, pool.map(_file_md5, stale), strict=True))
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; all of data/ must be readable; mend or remove it"
        ) from None
    found = {names[path]: fresh[path] if path in fresh else known[names[path]][-1] for path in sorted(marks)}
    if stale or len(known) != len(found):
        settled = [path for path, mark in marks.items() if max(mark[1:3]) < now - SETTLED_NS]
        sure = {names[path]: [*marks[path], found[names[path]]] for path in settled}
        if sure != known:
            kept = {key: value for key, value in kept.items() if os.path.isdir(key)}
            write_atomically(memory, json.dumps({**kept, str(folder): sure}))
    return found


def _tracked(folder: Path) -> Iterator[str]:
    """Walk the files as DVC does: links to files are followed, and .dvcignore counts."""
    import pathspec

    rules = workspace.root() / ".dvcignore"
    ignored = pathspec.GitIgnoreSpec.from_lines(
        [*IGNORED, *(rules.read_text().splitlines() if rules.is_file() else [])]
    )

    def refuse(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=refuse):
        base = os.path.relpath(at, workspace.root())
        folders[:] = [name for name in folders if not ignored.match_file(f"{base}/{name}/")]
        for name in folders:
            if os.path.islink(os.path.join(at, name)):
                raise UserError(f"{base}/{name}: is a link to a folder, which DVC does not follow; put the files there")
        yield from (os.path.join(at, name) for name in files if not ignored.match_file(f"{base}/{name}"))


def _file_md5(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def verified(trouble: str = "", *, apart_from: str | None = None) -> Listing:
    """Give the files of data/ where they are as pinned, but for a dataset that may differ; raises UserError.

    `trouble` is what an attempt to mend them ran into, for the message.
    """
    found, known = listing(), pinned_listing() if apart_from else None
    if folder_md5(found) != pin()[0]:
        differing = {path for path, _ in found.items() ^ known.items()} if known else {""}
        if any(not path.startswith(f"{apart_from}/") for path in differing):
            raise _mismatch(found, trouble)
    return found


def _mismatch(found: Listing, trouble: str) -> UserError:
    """Say how data/ differs from its pin, and what can be done."""
    pinned, text = pin()
    known = pinned_listing()
    if known is None:
        count = yaml.safe_load(text)["outs"][0].get("nfiles")
        differences = [f"{len(found)} files instead of {count}"]
    else:
        changed = [path for path in found if known.get(path, found[path]) != found[path]]
        groups = {"changed": changed, "added": sorted(found.keys() - known), "missing": sorted(known.keys() - found)}
        differences = [f"{kind}: {_some(paths)}" for kind, paths in groups.items() if paths]
    experiment = "DVC_EXP_BASELINE_REV" in os.environ
    where = "in the commit that this experiment starts from" if experiment else "in git's index"
    return UserError(
        f"data: its files have the md5 {folder_md5(found)} ({'; '.join(differences)}); data.dvc {where} pins {pinned}, "
        f"and nothing runs on other bytes{'; ' + trouble if trouble else ''}\n"
        "  to put missing files back: `unmask data restore`\n"
        "  to drop all changes: `git checkout data.dvc && dvc checkout --force data.dvc`\n"
        "  to bring in images on purpose: `unmask data add FOLDER --name NAME`; to pin what is there now: "
        "`dvc add data && git add data.dvc`" + (", and commit it" if experiment else "")
    )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(os.fsencode(path).decode(errors="backslashreplace") for path in paths[:SHOWN]) + more
