"""The rows of `params/`, checked and resolved to plain values.

Checking imports torch, so its outcome is kept, under a key of the files' bytes and the code: a stage whose rows an
earlier command has checked starts without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from flows import workspace
from mim_core.files import write_atomically

Rows = dict[str, dict[str, Any]]


PRETRAIN = ("pretrain", "pretrain_fitted")
"""Sections of pretrain rows."""
JUDGED = {"baselines": "baseline", "supervised": "supervised", "downstream": "downstream", "continued": "continued"}
"""Sections of downstream rows, with DVC's stage for each."""
LABORATORY = {"ablate": ("ablations_fitted", "ablations"), "search": ("search_fitted", "search")}
"""Sections of ablations and searches, by stage: DVC's has the suffix of the section."""


def load() -> Rows:
    """Give every row by section (as in `mim_core.params.FILES`) and name.

    Raises UserError with every fault of every row.
    """
    rows: Rows = _load()["rows"]
    return rows


def needs(row: str) -> list[str]:
    """Give the annotations of which a downstream row needs one; raises UserError, as `load`."""
    found: list[str] = _load()["needs"][row]
    return found


def sizes() -> dict[str, dict[str, int]]:
    """Give the bytes of each row's `weights` and of its `checkpoint`, by `section.row`; raises UserError, as `load`."""
    found: dict[str, dict[str, int]] = _load()["sizes"]
    return found


def points(ablation: str) -> list[dict[str, Any]]:
    """Give an ablation's points: `label`, `values` by path, the whole `row`, and whether it is the `baseline`.

    Raises UserError, as `load`.
    """
    found: list[dict[str, Any]] = _load()["points"][ablation]
    return found


def judges(stage: str, name: str) -> dict[str, Any]:
    """Give the rows that judge an ablation's points (`stage` ablate) or a search's trials (search), whole.

    Raises UserError, as `load`.
    """
    found: dict[str, Any] = _load()["judges"][f"{stage} {name}"]
    return found


def _load() -> dict[str, Any]:
    folder = workspace.params_folder()
    key = hashlib.sha256(workspace.code_fingerprint().encode())
    for path in sorted(folder.glob("*.yaml")):
        key.update(path.name.encode() + path.read_bytes())
    kept = workspace.home() / "rows.json"
    try:
        content = json.loads(kept.read_text())
        if content["key"] == key.hexdigest():
            return dict(content)
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        pass
    from mim_core import params, spec

    try:
        found = params.load(folder)
    except spec.SpecError as error:
        raise workspace.UserError(str(error)) from None
    content = {"key": key.hexdigest(), "rows": found.model_dump(mode="json"), **params.derived(found)}
    # Not sorted: rows keep the order of their files, which tables and colours follow.
    write_atomically(kept, json.dumps(content))
    return content


def judged(rows: Rows) -> dict[str, Any]:
    """Give the rows of downstream tasks of all sections."""
    return {name: row for section in JUDGED for name, row in rows[section].items()}


def section_of(rows: Rows, sections: Iterable[str], name: str) -> str:
    """Give the section that a row stands in; raises UserError with the nearest name where it is in none."""
    for section in sections:
        if name in rows[section]:
            return section
    known = sorted(key for section in sections for key in rows[section])
    from difflib import get_close_matches

    close = get_close_matches(name, known, 1)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise workspace.UserError(f"{'/'.join(sections)}: '{name}' is not one of {known}{meant}")


def pretraining(rows: Rows) -> dict[str, Any]:
    """Give the pretrain rows of both sections."""
    return {**rows["pretrain"], **rows["pretrain_fitted"]}


def fitted(params: Mapping[str, Any]) -> str | None:
    """Name the row of targets.yaml that a pretrain row's target is fitted by, where it is."""
    target = params["target"]
    return target.get("fitted") if isinstance(target, Mapping) else None


def find(rows: Rows, sections: Iterable[str], name: str) -> Any:
    """Give a row; raises UserError with the nearest name where there is none."""
    return rows[section_of(rows, sections, name)][name]
