"""Published weights in, encoders for timm out, with what was checked, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import family, rows, workspace

if TYPE_CHECKING:
    from mim_core.published import Report


def bring(path: Path, out: Path | None, **hints: Any) -> Iterator[str]:
    """Write published weights as a run's products; gives what to tell. `hints` are those of `import_file`."""
    from mim_core.published import import_file

    for given in (path, hints.get("decoder")):
        if given and not given.is_file():
            raise workspace.UserError(f"{given}: there is no such file; check the path")
    return _tell(_checked(lambda: import_file(path, out or path.with_name(f"{path.stem}_imported"), **hints)))


def give(row: str, out: Path | None) -> Iterator[str]:
    """Write a row's encoder as timm loads it; gives what to tell."""
    from mim_core.published import export_row

    weights = _weights(row)
    said = _checked(lambda: export_row(weights, out or Path("exports") / row))
    yield from _tell(said)
    if said.call:
        yield f"\nimport timm\nmodel = {said.call}"


def _weights(row: str) -> Path:
    """Find the weights of a pretrain or downstream row; raises UserError."""
    given = rows.load()
    stages = ("pretrain_fitted", "pretrain", *rows.JUDGED)
    section = rows.section_of(given, stages, row)
    for kind, name in (("pretrain", "encoder.safetensors"), ("downstream", "model.safetensors")):
        if (file := workspace.run_folder(kind, row) / name).exists():
            return file
    raise workspace.UserError(
        f"{row}: there are no weights yet; run `dvc repro {rows.JUDGED.get(section, section)}@{row}`"
    )


def _checked(work: Callable[[], Report]) -> Report:
    try:
        return work()
    except PermissionError:
        raise
    except (ValueError, OSError) as error:
        raise workspace.UserError(str(error)) from error


def _tell(said: Report) -> Iterator[str]:
    yield f"family      {said.family}"
    for piece, found in said.pieces.items():
        yield f"{piece:11} {family.words(found)}"
    yield f"parameters  {said.parameters:,}"
    for label, lines in (("checked", said.checks), ("note", said.notes), ("written", said.files)):
        for line in lines:
            yield f"{label:11} {line}"
    if said.unused:
        few = ", ".join(said.unused[:5]) + (", ..." if len(said.unused) > 5 else "")
        yield f"unused      {len(said.unused)} tensors of the file: {few}"
