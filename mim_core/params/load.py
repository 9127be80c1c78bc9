"""Read the files of `params/`, and report every fault of every row at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from mim_core.params.laboratory import laboratory
from mim_core.params.relations import relations
from mim_core.params.rows import AblationRow, DataRow, DownstreamRow, PretrainRow, SearchRow, TargetRow
from mim_core.spec import SpecError, Strict, check, shown, shown_key


class Params(Strict):
    """All rows, by section and name."""

    data: dict[str, DataRow]
    targets: dict[str, TargetRow]
    pretrain_fitted: dict[str, PretrainRow]
    pretrain: dict[str, PretrainRow]
    baselines: dict[str, DownstreamRow]
    supervised: dict[str, DownstreamRow]
    downstream: dict[str, DownstreamRow]
    continued: dict[str, DownstreamRow]
    ablations_fitted: dict[str, AblationRow] = Field(default_factory=dict)
    ablations: dict[str, AblationRow] = Field(default_factory=dict)
    search_fitted: dict[str, SearchRow] = Field(default_factory=dict)
    search: dict[str, SearchRow] = Field(default_factory=dict)

    def judged(self) -> dict[str, DownstreamRow]:
        """All rows of downstream tasks together."""
        return {name: row for section in JUDGED for name, row in getattr(self, section).items()}

    def pretrained(self) -> dict[str, PretrainRow]:
        """All pretraining rows together."""
        return {**self.pretrain_fitted, **self.pretrain}

    def ablated(self) -> dict[str, AblationRow]:
        """All ablations together."""
        return {**self.ablations_fitted, **self.ablations}

    def searched(self) -> dict[str, SearchRow]:
        """All searches together."""
        return {**self.search_fitted, **self.search}


Sections = tuple[str, ...]
JUDGED: Sections = ("baselines", "supervised", "downstream", "continued")
"""Sections of downstream rows, by where they begin: DVC has no optional dependency, so each is a stage of its own."""
FILES: dict[str, Sections] = {
    "data.yaml": ("data",),
    "targets.yaml": ("targets",),
    # DVC has no optional dependency, so rows whose target is fitted first have a section, and a stage, of their own.
    "pretrain.yaml": ("pretrain_fitted", "pretrain"),
    "downstream.yaml": JUDGED,
    "ablations.yaml": ("ablations_fitted", "ablations"),
    "search.yaml": ("search_fitted", "search"),
}
RECIPES: dict[str, Sections] = {
    "recipes.yaml": ("data", "targets", "pretrain_fitted", "pretrain", "baselines", "supervised", "downstream")
}
ROW_NAME = "abcdefghijklmnopqrstuvwxyz0123456789_-"
LONGEST = 100
"""Characters of a row's name, which names folders and files."""
MOST_VALUES = 100_000
"""Values of a file, those that aliases repeat counted each time."""
MODELS: dict[str, type[Strict]] = {
    "data": DataRow,
    "targets": TargetRow,
    "pretrain_fitted": PretrainRow,
    "pretrain": PretrainRow,
    **dict.fromkeys(JUDGED, DownstreamRow),
    "ablations_fitted": AblationRow,
    "ablations": AblationRow,
    "search_fitted": SearchRow,
    "search": SearchRow,
}


def load(folder: Path) -> Params:
    """Read and check all rows that the pipeline runs; raises SpecError."""
    return _load(folder, FILES)


def load_recipes(folder: Path) -> Params:
    """Read and check the papers' full-size recipes, which are rows too; raises SpecError."""
    return _load(folder, RECIPES)


def _load(folder: Path, files: Mapping[str, Sections]) -> Params:
    faults: list[str] = []
    rows: dict[str, dict[str, Any]] = {section: {} for section in MODELS}
    places: dict[str, str] = {}
    for name, sections in files.items():
        content = _read(folder / name, sections, faults)
        for section in sections:
            places[section] = f"{folder.name}/{name}: {section}"
            for key, value in content[section].items():
                where = f"{places[section]}.{key}"
                if not isinstance(key, str) or not key or set(key) - set(ROW_NAME) or len(key) > LONGEST:
                    rule = "a row's name may hold lower-case letters, digits, '_' and '-' only"
                    faults.append(f"{places[section]}.{shown_key(key)}: {rule}, {LONGEST} at most; rename it")
                    continue
                try:
                    rows[section][key] = check(MODELS[section], value, where)
                except SpecError as error:
                    faults.append(str(error))
    if not faults:
        params = Params(**rows)
        faults = relations(params, places) or laboratory(params, places)
        if not faults:
            return params
    raise SpecError("\n".join(faults))


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tag makes an object, aliases repeat so much and no more, and a key that stands twice is an error,
    as the first of two rows of one name would be lost in silence."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def refuse(self, node: yaml.Node) -> None:
        problem = f"the tag '{node.tag}' asks for an object; rows hold text, numbers, lists and mappings; delete it"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    problem = f"the key '{key.value}' stands twice; rename or delete one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor(None, _Loader.refuse)  # type: ignore[arg-type]


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count a node's values as often as aliases repeat them: a few lines can stand for more than memory holds."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # until it is counted: a node that holds itself has no end
        inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else inner
        known[id(node)] = 1 + sum(_count(one, known) for one in parts)
    if known[id(node)] > MOST_VALUES:
        problem = f"found more than {MOST_VALUES:,} values, those that aliases repeat counted each time; write less"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return known[id(node)]


def _read(path: Path, sections: Sections, faults: list[str]) -> dict[str, dict[str, Any]]:
    where = f"{path.parent.name}/{path.name}"
    empty: dict[str, dict[str, Any]] = {section: {} for section in sections}
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        faults.append(f"{where}: the file is missing; restore it with `git checkout {where}`")
        return empty
    except RecursionError:
        faults.append(f"{where}: not valid YAML: it is nested too deeply; write it flatter")
        return empty
    # Others than YAMLError: of what claims to be a date, a number or a truth value and is none.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        faults.append(f"{where}: not valid YAML: {' '.join(str(error).split())}")
        return empty
    if not isinstance(content, dict) or set(content) != set(sections):
        found = sorted(map(str, content)) if isinstance(content, dict) else content
        faults.append(f"{where}: found {shown(found)} at the top; it must hold exactly {list(sections)}")
        return empty
    for section in sections:
        if not isinstance(content[section], dict):
            faults.append(f"{where}: {section}: found {shown(content[section])}; it must map row names to rows")
            return empty
    return content
