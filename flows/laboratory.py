"""`unmask ablate` and `unmask search`: run what is stale of one by DVC, and print what came out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows import data, rows, servers, workspace

Shown = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A headline, the header of a table, and its lines."""


def run(console: Console, stage: str, name: str) -> None:
    """Run an ablation or a search with all that it needs, unless nothing of it is stale; raises UserError."""
    given = rows.load()
    section = rows.section_of(given, rows.LABORATORY[stage], name)
    data.restore(lambda text: None)
    servers.up(say=lambda text: console.print(text, highlight=False))
    suffix = "_fitted" if section.endswith("_fitted") else ""
    # Stages are run by `python`: this one, whichever the shell would find.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", f"{stage}{suffix}@{name}"],
        cwd=workspace.root(),
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        raise workspace.UserError(f"{stage} {name} stopped, as said above; the same command goes on from there")
    show(console, *SHOWN[stage](name))


def show(console: Console, headline: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(box=None, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    console.print(headline, highlight=False, markup=False)


def _ablation(name: str) -> Shown:
    from flows import ablations

    found: Any = next(one for one in ablations.read() if one.name == name)
    return (ablations.headline(found), *ablations.terminal(found))


def _search(name: str) -> Shown:
    from flows import searches

    found: Any = next(one for one in searches.read() if one.name == name)
    return (searches.headline(found), *searches.terminal(found))


SHOWN: dict[str, Callable[[str], Shown]] = {"ablate": _ablation, "search": _search}
