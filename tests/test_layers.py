"""The core's imports: down the levels only, of declared packages only, and never an orchestrator."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_pieces import python

ROOT = Path(__file__).parents[1]
CORE = ROOT / "mim_core"
# A module may import from lines above its own, and a package's modules from one another. Never sideways.
LEVELS = (
    ("cores",),
    (
        "changes",
        "checkpoint",
        "devices",
        "files",
        "grid",
        "locks",
        "losses",
        "metrics",
        "optim",
        "philox",
        "ranks",
        "spec",
        "statistics",
    ),
    ("blocks", "gallery", "masks", "positions", "train", "transforms"),
    ("data", "encoders", "fills", "heads", "tokenizers"),
    ("targets",),
    ("adversarial", "fit_target", "probing", "tasks"),
    ("pretext",),
    ("params", "published"),
    ("inference",),
    ("jobs",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ORCHESTRATORS = ("prefect", "mlflow", "dvc", "optuna", "flows")
MODULES = sorted(path for path in CORE.rglob("*.py") if path != CORE / "__init__.py")
# A distribution's name where it is not the import's.
IMPORTED = {"pillow": "PIL", "pyyaml": "yaml"}
WITHOUT_ORCHESTRATORS = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules}:
    importlib.import_module(module)
print("imported", len({modules}))
"""


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every name that a file imports, dotted, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def family(name: str) -> str:
    """`mim_core.data.pack.Pack` -> `data`."""
    return name.split(".")[1]


def test_every_module_has_a_level() -> None:
    assert {family(dotted(path)) for path in MODULES} <= set(LEVEL), "name a new module's level in LEVELS"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down_the_levels(path: Path) -> None:
    own = family(dotted(path))
    for name in imports(path):
        if name.split(".")[0] == "mim_core" and family(name) != own:
            assert LEVEL[family(name)] < LEVEL[own], f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_are_of_the_core_and_its_declared_dependencies(path: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", line)[0] for line in declared}
    allowed = {"mim_core", *(IMPORTED.get(name, name) for name in names), *sys.stdlib_module_names}
    # pydantic's own core comes with it.
    allowed |= {"pydantic_core"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_the_core_imports_with_the_orchestrators_absent() -> None:
    modules = [dotted(path) for path in MODULES]
    out, errors = python("-c", WITHOUT_ORCHESTRATORS.format(names=ORCHESTRATORS, modules=modules)).communicate()
    assert out.split() == ["imported", str(len(modules))], errors


def test_modules_are_named_for_what_they_hold_and_stay_short() -> None:
    for path in MODULES:
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
        assert len(path.read_text().splitlines()) <= 400, f"{dotted(path)}: make it a package of the same name"
