"""Answers and features of files of images, for the command line: `unmask predict` and `unmask embed`.

Files are decoded in threads ahead of the model and written batch by batch, so that memory does not grow with their
number. A file that cannot be used is listed in `<table>.quarantined.csv`, with the reason.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import rows, tables, workspace
from flows.progress import Bar
from mim_core.cores import cores
from mim_core.files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table as Shown

    from mim_core.inference import Model, Read

AT_ONCE, MAPS_AT_ONCE = 64, 8
"""Images that a model gets at once; fewer where each gives a map of its file's size."""
LISTED = 40
"""Images that are listed on the terminal at most."""
PRETRAINED = {"pretrain_fitted": "pretrain_fitted", "pretrain": "pretrain"}
"""Sections of pretrain rows, with DVC's stage for each."""
Batch = list[tuple[Path, "Read"]]


def predict(row: str, images: Sequence[str], out: Path | None, draw: Path | None, replace: bool) -> Iterator[Any]:
    """Let a downstream row's model answer of files, folders and globs; gives what to print. Raises UserError."""
    weights = _weights(row, rows.JUDGED)
    if out:
        tables.check_target(out, list(tables.TABLES), replace)
    if draw and draw.exists() and not draw.is_dir():
        raise workspace.UserError(f"{draw}: this is a file; give a folder to draw into")
    files = list_images(images)
    model = _loaded(weights, "load_model")
    if draw and model.name not in ("segment", "detect"):
        raise workspace.UserError(f"--draw: found a row of the task '{model.name}'; only maps and boxes are drawn")
    names, quarantined, few = _names(files), list[dict[str, str]](), list[dict[str, Any]]()
    with _table(out, {"row": row}) as table, Bar(f"predict {row}", 1) as bar:
        done = 0
        size = MAPS_AT_ONCE if model.name == "segment" else AT_ONCE
        for batch in _read(model.reader, files, size, quarantined, lambda count: bar.count(count, len(files))):
            answers = model.answer([read for _, read in batch])
            found = [{"file": str(path), **answer} for (path, _), answer in zip(batch, answers, strict=True)]
            table.add(found)
            few += found[: max(0, LISTED - len(few))]
            done += len(found)
            if draw:
                _draw(model, found, draw, names)
        _any(done, files, quarantined)
    if not out:
        yield _shown(few)
        if done > len(few):
            yield f"... and {done - len(few)} images more; -o FILE writes them all"
    yield from _told(done, out, draw, quarantined)


def embed(row: str, images: Sequence[str], out: Path, replace: bool) -> Iterator[str]:
    """Write the mean patch feature of each image, by the encoder of a pretrain or downstream row. Raises UserError."""
    weights = _weights(row, {**PRETRAINED, **rows.JUDGED})
    tables.check_target(out, [".parquet"], replace)
    files = list_images(images)
    encoder = _loaded(weights, "load_encoder")
    quarantined: list[dict[str, str]] = []
    with _table(out, {"row": row, "width": str(encoder.width)}) as table, Bar(f"embed {row}", 1) as bar:
        done = 0
        for batch in _read(encoder.reader, files, AT_ONCE, quarantined, lambda count: bar.count(count, len(files))):
            features = encoder.embed([read for _, read in batch])
            table.add([{"file": str(path), "vector": one} for (path, _), one in zip(batch, features, strict=True)])
            done += len(batch)
        _any(done, files, quarantined)
    yield f"{encoder.width} features an image, in fp32"
    yield from _told(done, out, None, quarantined)


def list_images(given: Sequence[str]) -> list[Path]:
    """Find the files that are meant by files, folders (with all below them) and globs, each once.

    Names that begin with a point are passed over in folders, as systems leave them behind. Raises UserError where
    nothing is found.
    """
    found: dict[Path, None] = {}
    for one in given:
        path = Path(one)
        if path.is_dir():
            part = [Path(at, name) for at, _, names in _walk(path) for name in names if not name.startswith(".")]
        elif path.exists() or path.is_symlink():
            part = [path]
        else:
            part = [Path(name) for name in glob.glob(one, recursive=True) if not os.path.isdir(name)]
            if not part:
                raise workspace.UserError(f"{one}: there is no such file, folder or match; check the path")
        found |= dict.fromkeys(sorted(part))
    if not found:
        raise workspace.UserError(f"{', '.join(given)}: found no file; give images, or a folder that holds some")
    return list(found)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield at, folders, names


def _weights(row: str, stages: Mapping[str, str]) -> Path:
    """Find the weights of a row of some sections; raises UserError."""
    given = rows.load()
    if set(PRETRAINED) - set(stages) and any(row in given[section] for section in PRETRAINED):
        raise workspace.UserError(f"{row}: a pretrain row answers nothing; use `unmask embed`, or a row that judges it")
    section = rows.section_of(given, stages, row)
    kind, name = ("pretrain", "encoder") if section in PRETRAINED else ("downstream", "model")
    file = workspace.run_folder(kind, row) / f"{name}.safetensors"
    if not file.exists():
        raise workspace.UserError(f"{row}: there are no weights yet; run `dvc repro {stages[section]}@{row}`")
    return file


def _loaded(weights: Path, load: str) -> Any:
    from mim_core import inference

    try:
        return getattr(inference, load)(weights)
    except (ValueError, RuntimeError) as error:
        raise workspace.UserError(str(error)) from error


def _read(
    reader: Callable[[Path], Read],
    files: Sequence[Path],
    size: int,
    quarantined: list[dict[str, str]],
    tell: Callable[[int], None],
) -> Iterator[Batch]:
    """Read files in threads, a batch of `size` ahead; refused ones go to `quarantined`, the number done to `tell`."""
    from PIL import Image

    waiting: deque[list[tuple[Path, Future[Read]]]] = deque()
    left, done = iter(files), 0
    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        # As the reader does for each image; Python changes the handling of warnings for all threads at once.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)

        def ahead() -> None:
            if some := list(itertools.islice(left, size)):
                waiting.append([(path, pool.submit(_checked, reader, path)) for path in some])

        ahead()
        while waiting:
            ahead()
            some = waiting.popleft()
            batch = _kept(some, quarantined)
            if batch:
                yield batch
            done += len(some)
            tell(done)


def _checked(reader: Callable[[Path], Read], path: Path) -> Read:
    from mim_core.data.images import RefusedError

    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RefusedError("the file's name is not UTF-8; rename it") from None
    return reader(path)


def _kept(some: Sequence[tuple[Path, Future[Read]]], quarantined: list[dict[str, str]]) -> Batch:
    from mim_core.data.images import RefusedError

    batch: Batch = []
    for path, reading in some:
        try:
            batch.append((path, reading.result()))
        except RefusedError as error:
            name = os.fsencode(path).decode(errors="backslashreplace")
            quarantined.append({"file": name, "reason": str(error)})
    return batch


class _Nowhere:
    """A table that is not asked for."""

    def add(self, rows: Sequence[tables.Row]) -> None:
        pass

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _table(out: Path | None, about: Mapping[str, str]) -> Any:
    return tables.writing(out, about) if out else _Nowhere()


def _any(done: int, files: Sequence[Path], quarantined: Sequence[Mapping[str, str]]) -> None:
    """Raise UserError where no file was an image."""
    if not done:
        first = quarantined[0]
        raise workspace.UserError(
            f"none of {len(files)} files is an image that can be used; the first, {first['file']}: {first['reason']}"
        )


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Name files below the folder that holds them all, so that equal names in two folders stay apart."""
    whole = [path.absolute() for path in files]
    top = Path(os.path.commonpath([path.parent for path in whole]))
    return {str(path): one.relative_to(top) for path, one in zip(files, whole, strict=True)}


def _draw(model: Model, found: Sequence[dict[str, Any]], folder: Path, names: Mapping[str, Path]) -> None:
    from flows.overlays import overlay

    told = list(model.facts.segments if model.name == "segment" else model.facts.classes)
    for answer in found:
        picture = overlay(model.reader.planes(Path(answer["file"])), answer, told)
        target = folder / names[answer["file"]].with_name(f"{names[answer['file']].name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        if picture:
            picture.save(target)


def _shown(found: Sequence[dict[str, Any]]) -> Shown:
    """Make the table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    table.add_column("answer", overflow="fold")
    for answer in found:
        table.add_row(answer["file"], ", ".join(_words(answer)))
    return table


def _words(answer: Mapping[str, Any]) -> list[str]:
    from flows.overlays import SURE

    if "objects" in answer:
        sides = ("left", "top", "right", "bottom")
        sure = sorted((one for one in answer["objects"] if one["score"] >= SURE), key=lambda one: -float(one["score"]))
        said = [
            f"{one['class']} {one['score']:.2f} at [{', '.join(f'{one[side]:.0f}' for side in sides)}]" for one in sure
        ]
        others = len(answer["objects"]) - len(sure)
        return said + ([f"{others} below {SURE}"] if others else []) or ["nothing found"]
    if "shares" in answer:
        return [f"{one['segment']} {one['share']:.1%}" for one in answer["shares"]]
    return [f"{one['class']} {one['probability']:.1%}" for one in answer["top"]]


def _told(done: int, out: Path | None, draw: Path | None, quarantined: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for what, where in (("images", out), ("pictures", draw)):
        if where:
            yield f"{done} {what} -> {where}"
    table = out.with_name(f"{out.stem}.quarantined.csv") if out else None
    if table and quarantined:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file", "reason"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(quarantined)
        write_atomically(table, text.getvalue())
        yield f"{len(quarantined)} files were left out; {table} says which and why"
    elif table:
        table.unlink(missing_ok=True)  # of a table that was replaced
    else:
        for one in quarantined:
            yield f"left out: {one['file']}: {one['reason']}"
