"""The bytes under data/: fetch the pinned ones, refuse others, and bring in images of one's own."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import inspect
import io
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import workspace
from flows.archives import ENDINGS, is_archive, unpack
from flows.pins import Listing, cached_at, dvc, folder_md5, listing, pin, pinned_listing, verified
from flows.workspace import UserError
from mim_core.files import write_atomically

if TYPE_CHECKING:
    from mim_core.data.pack import Source

EMBEDDED = {"digits.csv.gz": "data", "china.jpg": "images", "flower.jpg": "images"}
"""Files of data/scenes/, and the folder below scikit-learn's `datasets` that each comes from."""
STAGED = ("data.dvc", "params/data.yaml")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
EFFECTIVE = os.access in os.supports_effective_ids
Say = Callable[[str], object]


def guard() -> dict[str, str]:
    """Refuse to work on bytes that are not those pinned; gives the md5 of each dataset's folder as DVC counts it."""
    parts: dict[str, Listing] = {}
    for path, md5 in verified().items():
        name, slash, rest = path.partition("/")
        if slash:
            parts.setdefault(name, {})[rest] = md5
    return {name: folder_md5(part) for name, part in parts.items()}


def restore(say: Say = print) -> None:
    """Fill data/ with the pinned bytes: from DVC's cache, its remote, or scikit-learn. Changed files are left alone."""
    workspace.data_folder().mkdir(exist_ok=True)
    file, (pinned, text) = workspace.root() / "data.dvc", pin()
    if not file.is_file() or file.read_text() != text:
        say("data.dvc: put back as git has it")
        write_atomically(file, text)
    trouble, whole, cached = "", folder_md5(listing()) == pinned, cached_at(pinned).is_file()
    if not whole and cached:
        say("data: taking the files from DVC's cache")
        trouble = dvc("checkout", "data.dvc")[1]
        whole = folder_md5(listing()) == pinned
    if not whole and (not cached or (pinned_listing() or {}).keys() - listing().keys()):
        trouble = "; ".join(filter(None, (trouble, _fetch(say))))
    verified(trouble)
    if not cached_at(pinned).is_file():
        # Without this DVC calls the folder "not in cache", though its bytes are right.
        trouble = dvc("commit", "--force", "data.dvc")[1]
        if trouble or file.read_text() != text:
            write_atomically(file, text)
            raise UserError(f"data.dvc: the files are right, but DVC could not take them into its cache; {trouble}")
    say("data: complete, and as data.dvc has it")


def _fetch(say: Say) -> str:
    """Fill in missing files from DVC's remote, else from scikit-learn; says what went wrong or was out of reach."""
    if dvc("remote", "list")[0].strip():
        say("data: pulling the files from DVC's remote")
        return dvc("pull", "data.dvc")[1]
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "data/scenes: its files come with scikit-learn, which is not installed; `pip install scikit-learn`, "
            "or set a remote that holds them with `dvc remote add --default NAME URL`"
        )
    say("data/scenes: copying its files from scikit-learn")
    for name, folder in EMBEDDED.items():
        copy = workspace.data_folder("scenes") / name
        if not copy.exists():
            write_atomically(copy, Path(found.submodule_search_locations[0], "datasets", folder, name).read_bytes())
    return "no DVC remote is set, so only data/scenes could be fetched"


def add(
    source: Path,
    name: str,
    size: tuple[int, int] | None,
    say: Say = print,
    *,
    form: str | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Bring in a folder or an archive of images as the dataset `name`, and pin it.

    `form` is the name of a source; None takes the one that the files show, else that of plain folders. `size` is
    (height, width) in px; None takes one that fits. `replace` allows a name that exists and keeps what else its row
    says. All is checked first, and everything is put back where a step fails. Raises UserError.
    """
    rows, new_row, write_rows = _open_rows()
    if size is not None and min(size) < 1:
        raise UserError(f"--size: found {size[0]} x {size[1]}; height and width are 1 px at least; choose another")
    _check_arguments(source, name, rows.get(name), form, replace)
    verified(apart_from=name if replace else None)
    with _unpacked(source, say) as (folder, spoiled):
        at, form = _recognised(source, folder, form, say)
        row = rows.get(name) or new_row(form)
        if row["source"]["name"] != form:
            other = row["source"]["name"]
            raise UserError(f"--name: '{name}' is a dataset of the source '{other}', not '{form}'; choose another name")
        say(f"{source}: reading every file once")
        read, listed = _read(source, at, name, row, spoiled, say)
        if size is None and name not in rows:
            size = _fitting(read, at, form)
        height, width = _sized(row, size)
        rows[name] = row
        md5 = _take_in(source, read, at, name, write_rows)
    if form == "folder" and len(read.classes) > 1 and {label.lower() for label in read.classes} <= SPLIT_NAMES:
        found = f"{read.classes} look like splits"
        say(f"data/{name}: careful: each sub-folder is a class, and {found}; if so, add one of them")
    images, unlabelled = sum(read.counts.values()), sum(path.parent == at for path in read.files)
    labels = (
        f"{unlabelled} without a label" if form == "folder" else f"with {', '.join(read.annotations) or 'no labels'}"
    )
    refused = [*spoiled, *read.quarantined]
    say(
        f"data/{name}: {images} images, {len(read.classes)} classes, {labels}, "
        f"{len(refused)} files refused{listed}; read as {height} x {width} px\n"
        f"next: add a row with `data: {name}` to params/pretrain.yaml, then `dvc repro pretrain@ROW`"
    )
    return {
        "name": name,
        "form": form,
        "images": images,
        "classes": read.classes,
        "unlabelled": unlabelled if form == "folder" else 0,
        "quarantined": refused,
        "size": (height, width),
        "md5": md5,
    }


def _take_in(source: Path, read: Source, at: Path, name: str, write_rows: Callable[[], None]) -> str:
    """Put the dataset's files under data/, pin them and write the rows; gives the folder's md5 as DVC counts it."""
    own = not source.is_dir()  # an archive, unpacked here: its files may be moved
    needed = (1 if own else 2) * sum(path.stat().st_size for path in read.files)
    free = shutil.disk_usage(workspace.root()).free
    if needed > free:
        raise UserError(f"{source}: a copy and DVC's cache need {needed >> 20} MiB, {free >> 20} are free; make room")
    with _undone_on_failure(name) as work:
        for path in read.files:
            copy = work / "new" / path.relative_to(at)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, copy) if own else shutil.copyfile(path, copy)
        if workspace.data_folder(name).exists():
            shutil.move(workspace.data_folder(name), work / "old")
        shutil.move(work / "new", workspace.data_folder(name))
        if trouble := dvc("add", "data")[1]:
            raise UserError(f"data/{name}: DVC could not take it in, so all is put back; {trouble}")
        write_rows()
        if workspace.git("rev-parse") is not None and workspace.git("add", "--", *STAGED) is None:
            raise UserError("data.dvc: git could not stage it, so all is put back; end other git commands, try again")
        return guard()[name]


def _sized(row: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Write a size into a row, where there is one; gives the (height, width) that the row then has."""
    from mim_core.data.sources import SOURCES
    from mim_core.spec import pair

    source = row["source"]
    if size is not None and isinstance(source.get("size_px"), list):
        source["size_px"][:] = size  # keeps the way in which it is written
    elif size is not None:
        source["size_px"] = list(size)
    usual = inspect.signature(SOURCES[source["name"]]).parameters["size_px"].default
    height, width = pair(source.get("size_px", usual))
    return height, width


def _check_arguments(source: Path, name: str, row: Any, form: str | None, replace: bool) -> None:
    """Check what needs no image to be read; raises UserError."""
    from mim_core.data.sources import SOURCES
    from mim_core.params import ROW_NAME
    from mim_core.spec import nearest

    rule = "a name may hold lower-case letters, digits, '_' and '-' only"
    if not name or set(name) - set(ROW_NAME) or len(name) > 100:
        raise UserError(f"--name: found {name!r}; {rule}, 100 at most; choose another")
    forms = [key for key in SOURCES if key != "scenes"]
    if form is not None and form not in forms:
        raise UserError(f"--format: '{form}' is not one of {forms}{nearest(form, forms)}")
    if row is not None and row["source"]["name"] not in forms:
        raise UserError(f"--name: '{name}' is a dataset of the source '{row['source']['name']}'; choose another name")
    if not replace and (row is not None or workspace.data_folder(name).exists()):
        raise UserError(f"--name: there is a dataset '{name}' already; choose another name, or replace it by --replace")
    if not source.is_dir() and not is_archive(source):
        found = "is a file" if source.exists() else "does not exist"
        raise UserError(f"{source}: {found}; images come in as a folder, or as one of {list(ENDINGS)}; check the path")
    if workspace.data_folder().resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{source}: lies in data/ itself; images come in from outside; move the folder out and add it")
    wanted = os.R_OK | os.X_OK if source.is_dir() else os.R_OK
    if not os.access(source, wanted, effective_ids=EFFECTIVE):
        raise UserError(f"{source}: the folder cannot be read; adding copies its files; change its permissions")
    if source.is_dir() and not any(source.iterdir()):
        raise UserError(f"{source}: the folder is empty; give a folder of images")
    for folder in (workspace.root(), workspace.params_folder(), workspace.data_folder()):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=EFFECTIVE):
            raise UserError(f"{folder}: cannot be written to; adding a dataset writes here; change its permissions")


@contextlib.contextmanager
def _unpacked(source: Path, say: Say) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """Give the folder that is to be read, and what an archive held that is refused."""
    if source.is_dir():
        yield source, []
        return
    workspace.home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="add-", dir=workspace.home()) as folder:
        say(f"{source}: unpacking")
        yield Path(folder), unpack(source, Path(folder))


def _recognised(source: Path, folder: Path, form: str | None, say: Say) -> tuple[Path, str]:
    """Find the dataset's own folder, and its form where none is given."""
    from mim_core.data.formats import locate

    at, shown = locate(folder)
    if form is None and len(shown) > 1:
        found = "; ".join(f"{name} by {why}" for name, why in shown.items())
        raise UserError(f"{source}: could be {found}; say which one it is by --format")
    if form is None:
        form = next(iter(shown), "folder")
        why = shown.get(form, "it has no annotations of a known form")
        say(f"{source}: taken as --format {form}: {why}")
    # A folder that was given names its classes itself; what wraps an archive's only folder says nothing.
    return (at if form in shown or folder != source else folder), form


def _read(source: Path, at: Path, name: str, row: Any, spoiled: list[dict[str, str]], say: Say) -> tuple[Source, str]:
    """Read the dataset as its row says, and list what is refused; gives its source, and where the list is."""
    from mim_core.cores import cores
    from mim_core.data.records import NoImagesError
    from mim_core.data.sources import SOURCES
    from mim_core.data.work import Work
    from mim_core.params import DataRow
    from mim_core.spec import SpecError, build, check

    plain = json.loads(json.dumps(row))
    try:
        with Work(processes=cores()):
            read: Source = build(SOURCES, check(DataRow, plain, f"data.{name}").source, at)
    except SpecError as error:
        raise UserError(f"params/data.yaml: {error}") from None
    except NoImagesError as error:
        refused = [*spoiled, *error.quarantined]
        told = f"found no readable image, {len(refused)} refused{_list_refused(name, refused, say)}"
        raise UserError(f"{source}: {told}; give a folder of images") from None
    except (ValueError, OSError) as error:
        told = str(error).removeprefix(f"{at}: ")
        raise UserError(f"{source}: {told}") from None
    return read, _list_refused(name, [*spoiled, *read.quarantined], say)


def _fitting(read: Source, at: Path, form: str) -> tuple[int, int] | None:
    """A square that fits the images: the median of their shorter sides, by 16, from 32 to 224 px; None keeps the row's.

    Published datasets come with the size that is usual for them.
    """
    from mim_core.data.images import EXTENSIONS, short_side

    if form not in ("folder", "csv"):
        return None
    refused = {entry["file"] for entry in read.quarantined}
    good = [path for path in read.files if path.relative_to(at).as_posix() not in refused]
    sides = [short_side(path) for path in good if path.suffix.lower() in EXTENSIONS]
    return (min(max(int(statistics.median(sides) // 16 * 16), 32), 224),) * 2


def _list_refused(name: str, refused: list[dict[str, str]], say: Say) -> str:
    """Show the refused files and write them to a table; gives where, to put into a message."""
    if not refused:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(refused)
    table = workspace.report_folder() / "quarantine" / f"{name}.csv"
    write_atomically(table, text.getvalue())
    for entry in refused[:10]:
        say(f"refused {entry['file']}: {entry['reason']}")
    return f" (listed in {table.relative_to(workspace.root())})"


def _open_rows() -> tuple[Any, Callable[[str], Any], Callable[[], None]]:
    """Open params/data.yaml with its comments; gives its rows, what makes a row of a form, and what writes the file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path, editor = workspace.params_folder() / "data.yaml", YAML()
    editor.width, editor.preserve_quotes = 4096, True
    try:
        content = editor.load(path.read_text())
        rows = content["data"]
        rows.get("")
    except (OSError, YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"params/data.yaml: found no rows under `data:` ({error}); `git checkout` the file") from None

    def write() -> None:
        text = io.StringIO()
        editor.dump(content, text)
        write_atomically(path, text.getvalue())

    return rows, lambda form: editor.load(_new_row(form)), write


def _new_row(form: str) -> str:
    from mim_core.data.sources import SOURCES

    parameters = inspect.signature(SOURCES[form]).parameters
    said = {"name": form, "size_px": list(parameters["size_px"].default)}
    said |= {key: parameters[key].default for key in ("validation", "test") if key in parameters}
    return "source: {" + ", ".join(f"{key}: {value}" for key, value in said.items()) + "}"


@contextlib.contextmanager
def _undone_on_failure(name: str) -> Iterator[Path]:
    """Give a folder to work in, with the dataset's former folder as `old`; put everything back where the body fails."""
    files = [workspace.root() / file for file in (*STAGED, ".gitignore")]
    before = {path: path.read_bytes() for path in files if path.is_file()}
    staged = workspace.git("ls-files", "--stage", "--full-name", "--", *STAGED) or ""
    target = workspace.data_folder(name)
    existed = target.exists()
    workspace.home().mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="add-", dir=workspace.home()))
    try:
        yield work
    except BaseException as error:
        if (work / "old").exists() or not existed:
            shutil.rmtree(target, ignore_errors=True)
        if (work / "old").exists():
            shutil.move(work / "old", target)
        for path in files:
            if path not in before:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != before[path]:
                write_atomically(path, before[path])
        for line in staged.splitlines():
            mode, blob, _, path_in_git = line.split(maxsplit=3)
            workspace.git("update-index", "--cacheinfo", f"{mode},{blob},{path_in_git}")
        if isinstance(error, OSError):
            raise UserError(f"data/{name}: {error}; a file could not be written, so all is put back") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
