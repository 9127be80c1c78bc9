"""The papers' full-size recipes: a list of them, and one as a row for a file of params/."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from flows import family, results, rows, workspace

SECTIONS = (*rows.PRETRAIN, *rows.JUDGED)
FILE = "recipes.yaml"


def listing() -> Iterator[str]:
    """Say each recipe in a line: its pieces, or its task and start, length, batch and learning rates."""
    found = _load()
    pretrained, judged = found.pretrained(), found.judged()
    width = max(map(len, (*pretrained, *judged)), default=0)
    for name, row in {**pretrained, **judged}.items():
        content = row.model_dump(mode="json")
        if name in pretrained:
            said = " x ".join(family.short(content).values())
        else:
            said = f"{results.task_words(content['task'])} on {row.data}, from {row.init}"
        yield f"{name:{width}}  {said}; {_length(row)}"


def _length(row: Any) -> str:
    if row.optim is None:
        return "nothing is trained"
    return f"{row.optim.epochs:g} epochs, batch {row.optim.batch:,}, {_rate(row)}"


def recipe(name: str, dataset: str | None = None) -> str:
    """Give a recipe as YAML for its section of params/, below comments that say what it comes to.

    `dataset` takes the place of the recipe's own. Raises UserError where either is not known.
    """
    known = _load()
    given = known.model_dump(mode="json")
    section = rows.section_of(given, SECTIONS, name)
    row = getattr(known, section)[name]
    source = given["data"][row.data]["source"]
    content = yaml.safe_load((workspace.params_folder() / FILE).read_text())  # as written, with no default filled in
    said = list(_comment(name))
    if row.optim is not None:
        said.append(f"Learning rate: {_rate(row)}. Length: {row.optim.epochs:g} epochs, {_steps(row.optim, dataset)}.")
    if dataset:
        mine = rows.find(rows.load(), ("data",), dataset)["source"]
        if mine["size_px"] != source["size_px"]:
            said.append(
                f"It is for images of {_px(source)}; {dataset} has {_px(mine)}, for which it may have to change."
            )
    else:
        said.append(f"`{row.data}` is images of {_px(source)}; --data names the dataset that takes its place.")
    if section in rows.JUDGED:
        said.append(f"It belongs below `{section}:` in params/downstream.yaml. It begins from `{row.init}`.")
    elif row.fitted:
        said.append("It belongs below `pretrain_fitted:`, and its tokenizer into params/targets.yaml:")
        target = {**content["targets"][row.fitted], "data": dataset or row.data}
        said += ["  " + line for line in as_yaml({row.fitted: target}).splitlines()]
    made = {name: {**content[section][name], "data": dataset or row.data}}
    return "".join(f"  # {line}\n" for line in said) + indented(as_yaml(made))


def pretraining() -> dict[str, Any]:
    """Give the pretrain recipes as they are written, with no default filled in; none where the file is not there."""
    path = workspace.params_folder() / FILE
    content = yaml.safe_load(path.read_text()) if path.exists() else {}
    return {name: row for section in rows.PRETRAIN for name, row in content.get(section, {}).items()}


def _load() -> Any:
    from mim_core import params, spec

    try:
        return params.load_recipes(workspace.params_folder())
    except spec.SpecError as error:
        raise workspace.UserError(str(error)) from None


def _comment(name: str) -> Iterator[str]:
    """The comment that stands above a recipe in its file."""
    above: list[str] = []
    for line in (workspace.params_folder() / FILE).read_text().splitlines():
        if line == f"  {name}:":
            yield from above
            return
        above = [*above, line.strip().removeprefix("#").strip()] if line.startswith("  #") else []


def _rate(row: Any) -> str:
    optim = row.optim
    if not hasattr(optim, "base_lr"):
        return f"lr {', '.join(f'{rate:g}' for rate in row.lr_grid)}"
    if optim.base_lr is None:
        return f"lr {optim.lr:g}"
    return f"base lr {optim.base_lr:g} for {optim.base_batch:,} images, lr {optim.rate:g} at batch {optim.batch:,}"


def _steps(optim: Any, dataset: str | None) -> str:
    meta = workspace.pack_folder(dataset) / "meta.json" if dataset else None
    if not meta or not meta.exists():
        return f"{optim.warmup_epochs:g} of warm-up; an epoch has (training images // {optim.batch:,}) steps"
    images = json.loads(meta.read_text())["counts"]["train"]
    steps, warmup = optim.steps(images)
    few = f"; careful: {images:,} images are fewer than a batch" if images < optim.batch else ""
    return f"{steps:,} steps with the {images:,} training images of {dataset}, {warmup:,} of them warm-up{few}"


def _px(source: Mapping[str, Any]) -> str:
    return "{} x {} px".format(*source["size_px"])


def as_yaml(value: Mapping[str, Any]) -> str:
    """Write rows in the style of params/: a line a key, what is inside in braces."""
    lines = []
    for name, row in value.items():
        lines.append(f"{name}:\n")
        for key, inner in row.items():
            lines.append(
                f"  {key}: {yaml.safe_dump(inner, default_flow_style=True, sort_keys=False, width=4096).strip()}"
            )
            lines[-1] = lines[-1].removesuffix("...").rstrip() + "\n"
    return "".join(lines)


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
