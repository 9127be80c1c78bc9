"""The rows of `params/`, checked and resolved to plain values.

Checking imports torch, so its outcome is kept, under a key of the files' bytes and the code: a stage whose rows an
earlier command has checked starts without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flows import workspace
from mim_core.files import write_atomically

Rows = dict[str, dict[str, Any]]


def load() -> Rows:
    """Give every row by section (data, targets, pretrain_fitted, pretrain, baselines, downstream) and name.

    Raises UserError with every fault of every row.
    """
    folder = workspace.params_folder()
    key = hashlib.sha256(workspace.code_fingerprint().encode())
    for path in sorted(folder.glob("*.yaml")):
        key.update(path.name.encode() + path.read_bytes())
    kept = workspace.home() / "rows.json"
    try:
        content = json.loads(kept.read_text())
        if content["key"] == key.hexdigest():
            return dict(content["rows"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        pass
    from mim_core import params, spec

    try:
        rows = params.load(folder).model_dump(mode="json")
    except spec.SpecError as error:
        raise workspace.UserError(str(error)) from None
    # Not sorted: rows keep the order of their files, which tables and colours follow.
    write_atomically(kept, json.dumps({"key": key.hexdigest(), "rows": rows}))
    return rows


def pretraining(rows: Rows) -> dict[str, Any]:
    """Give the pretrain rows of both sections."""
    return {**rows["pretrain"], **rows["pretrain_fitted"]}


def fitted(params: Mapping[str, Any]) -> str | None:
    """Name the row of targets.yaml that a pretrain row's target is fitted by, where it is."""
    target = params["target"]
    return target.get("fitted") if isinstance(target, Mapping) else None


def find(rows: Rows, sections: tuple[str, ...], name: str) -> Any:
    """Give a row; raises UserError with the nearest name where there is none."""
    for section in sections:
        if name in rows[section]:
            return rows[section][name]
    known = sorted(key for section in sections for key in rows[section])
    from difflib import get_close_matches

    close = get_close_matches(name, known, 1)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise workspace.UserError(f"{'/'.join(sections)}: '{name}' is not one of {known}{meant}")
