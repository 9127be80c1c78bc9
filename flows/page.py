"""The report's page: what was found, on which data, at what cost, self-contained, with its figures and numbers.

`build` reads every input first and writes afterwards, each file at once, `index.html` last: a report is never half of
one state and half of another.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import ablations, family, ledger, recommend, rows, searches, workspace
from flows.family import PIECES
from flows.findings import caveats, edge, finding, headline, manifests_of
from flows.results import Arm, Published, comparisons, duration, hours, markdown, measure, percent, read, stale, title
from mim_core.changes import words
from mim_core.files import write_atomically

ROW_PICTURES = ("gallery_", "recovery_", "tokenizer_", "predictions_", "ablation_", "search_")
RUN_PAGES = {"mlflow": "{}/#/runs/{}", "prefect": "{}/runs/flow-run/{}"}
KNOWN_META = frozenset({"channels", "size", "classes", "counts", "mean", "std", "quarantined", "digest", "name", "md5"})


def build(folder: Path, links: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Write the report into `folder`; `links` may hold `mlflow_url` and `prefect_url`, the servers' addresses.

    Gives `headline`, `caveats`, `absent`, `index` (the page) and `summary` (as in summary.json). Raises UserError where
    nothing is published or a published file is broken.
    """
    from flows import figures

    published = read()
    if not (published.arms or published.pretrained or published.ablations or published.searches):
        raise workspace.UserError("report: nothing is published under runs/; run `dvc repro` first")
    shown = {f"tokenizer_{row}.png": one.folder / "gallery.png" for row, one in published.tokenizers.items()}
    for row, run in published.pretrained.items():
        shown |= {f"{name}_{row}.png": run.folder / f"{name}.png" for name in ("gallery", "recovery")}
    shown |= {f"predictions_{arm.row}.png": arm.folder / "predictions.png" for arm in published.arms}
    for kind, studies in (("ablation", published.ablations), ("search", published.searches)):
        for study in studies:
            folder_of = workspace.run_folder("ablate" if kind == "ablation" else kind, study.name)
            shown |= {f"{kind}_{name}_{study.name}.png": folder_of / f"{name}.png" for name in ("figure", "recoveries")}
    pictures = {name: path.read_bytes() for name, path in shown.items() if path.exists()}
    colour = figures.colours(rows.pretraining(published.rows))
    look = figures.looks(published.arms, colour)
    pictures |= {
        "accuracy.png": figures.accuracy(published.arms, look),
        "pretraining.png": figures.pretraining(list(published.pretrained.values()), colour),
        "lr_grid.png": figures.lr_grid(published.arms, look),
    }
    said: dict[str, Any] = {
        "headline": headline(published),
        "caveats": list(caveats(published)),
        "summary": summary(published),
    }
    table = family.family(published)
    costs = ledger.ledger(manifest for _, manifest in manifests_of(published))
    recommended = recommend.recommend(published)
    said |= {"costs": costs, "recommended": recommended, "nothing": recommend.NOTHING}
    page = _page(published, table, said, pictures, colour, links or {})
    files: dict[str, bytes | str] = {
        **pictures,
        "table.md": markdown(published.arms),
        "family.md": family.markdown(table),
        "family.csv": family.as_csv(table),
        "summary.json": json.dumps(said["summary"], indent=1) + "\n",
        "accuracy.csv": _seeds(published.arms),
        "ledger.csv": ledger.as_csv(costs),
        "recommended.yaml": recommend.as_yaml(recommended),
        "index.html": page,
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    for old in folder.glob("*_*.png"):  # of rows that are no more
        if old.name not in files and old.name.startswith(ROW_PICTURES):
            old.unlink()
    kept = {key: said[key] for key in ("headline", "caveats", "summary")}
    return {**kept, "absent": list(published.absent), "index": str(folder / "index.html")}


def summary(published: Published) -> dict[str, dict[str, dict[str, float]]]:
    """Give the numbers of each run, flat, by stage and row; what is not known is left out."""
    downstream = {}
    for arm in published.arms:
        numbers = {"test_score": arm.score.mean, "test_score_half_width": arm.score.half, "lr": arm.lr}
        if arm.difference:
            numbers |= {"difference": arm.difference.mean, "difference_half_width": arm.difference.half}
        numbers |= {"seeds": arm.score.count, "wall_seconds": arm.wall_seconds, "device_hours": arm.device_hours}
        if arm.total_device_hours is not None:
            numbers["device_hours_with_pretraining"] = arm.total_device_hours
        downstream[arm.row] = _finite(numbers)
    pretrain = {}
    for row, run in published.pretrained.items():
        costs = {key: run.manifest[key] for key in ("wall_seconds", "device_hours", "images_seen")}
        pretrain[row] = _finite({**run.manifest["metrics"], **costs})
        if run.fitted and run.device_hours is not None:
            pretrain[row]["device_hours_with_tokenizer"] = run.device_hours
    targets = {
        row: _finite(
            {**one.manifest["metrics"], **{key: one.manifest[key] for key in ("wall_seconds", "device_hours")}}
        )
        for row, one in published.tokenizers.items()
    }
    return {"downstream": downstream, "pretrain": pretrain, "targets": targets}


def _page(
    published: Published,
    table: family.Family,
    said: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    colours: Mapping[str, str],
    links: Mapping[str, str | None],
) -> str:
    import jinja2

    manifests = dict(manifests_of(published))
    groups = comparisons(published.arms)
    # Undefined names are errors, and every value is escaped: file names and reasons come from users' folders.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {"duration": duration, "hours": hours, "percent": percent, "figure": _figure}
    filters |= {"value": family.words, "millions": family.millions, "said": words}
    environment.filters |= filters
    embedded = {name: f"data:image/png;base64,{base64.b64encode(image).decode()}" for name, image in pictures.items()}
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text())
    return template.render(
        said,
        published=published,
        findings={arm.row: finding(arm, published) for arm in published.arms if arm.difference},
        pictures=embedded,
        colours=colours,
        datasets=[_dataset(name, meta, manifests.values()) for name, meta in published.packs.items()],
        pieces=PIECES,
        methods=[_method(row, published) for row in published.pretrained],
        family=table,
        metric=family.metric,
        measure=measure,
        note=family.NOTE,
        not_run=[row for row in rows.pretraining(published.rows) if row not in published.pretrained],
        groups=groups,
        title=title,
        grids=[(group, rates) for group in groups if (rates := _rates(group))],
        tried={arm.row: _tried(arm) for arm in published.arms},
        edges={arm.row: edge(arm) for arm in published.arms},
        manifests=manifests,
        stale={name: stale(manifest) for name, manifest in manifests.items()},
        json={name: json.dumps(manifest, indent=1, sort_keys=True) for name, manifest in manifests.items()},
        ids={name: _linked(manifest, links) for name, manifest in manifests.items()},
        not_asked=[
            f"{stage} {row}"
            for stage, sections in rows.LABORATORY.items()
            for section in sections
            for row in published.rows.get(section, {})
            if f"{stage} {row}" not in manifests
        ],
        ablations=ablations,
        searches=searches,
        studies=[_ablation(found, links) for found in published.ablations],
        hunts=[_search(found, links) for found in published.searches],
        code=workspace.code_fingerprint(),
    )


@dataclass(frozen=True)
class Table:
    """A table of the page: its head, and lines of cells; the first cell of a line has links to runs below it."""

    head: Sequence[str]
    lines: Sequence[tuple[Sequence[str], Sequence[tuple[str, str, str]], bool]]


def _ablation(found: Any, links: Mapping[str, str | None]) -> dict[str, Any]:
    """What the page shows of an ablation: its tables, each line with the MLflow runs of its seeds."""
    tables = []
    for table in found.tables:
        lines = []
        for line in table.lines:
            runs = _of_seeds({run["seed"]: run for run in line.runs})
            lines.append((list(ablations.cells(found, table, line).values()), _runs(runs, links), line.best))
        head = list(ablations.cells(found, table, table.lines[0]))
        tables.append((table, Table(head, lines), ablations.meaning(found, table)))
    return {"study": found, "tables": tables, "beside": _beside(found), "headline": ablations.headline(found)}


def _beside(found: Any) -> Table | None:
    """Others' numbers beside ours, by setting, in per cent."""
    if not found.published:
        return None
    table = found.tables[0]
    ours = {line.label: f"{100 * line.score.mean:.1f}" for line in table.lines if line.score and not line.scratch}
    labels = dict.fromkeys([*ours, *(label for one in found.published for label in one.numbers)])
    with contextlib.suppress(ValueError):  # labels that are no numbers keep their order
        labels = dict.fromkeys(sorted(labels, key=float))
    lines = []
    for label in labels:
        theirs = [f"{one.numbers[label]:g}" if label in one.numbers else "-" for one in found.published]
        lines.append([label, ours.get(label, "-"), *theirs])
    head = ["setting", f"here, validation {table.metric}, %", *(f"{one.source}, %" for one in found.published)]
    return Table(head, [(line, [], False) for line in lines])


def _search(found: Any, links: Mapping[str, str | None]) -> dict[str, Any]:
    """What the page shows of a search: the tables of its Markdown, with the MLflow runs of trials and finals."""
    said = found.results
    of_trials = {str(trial["number"]): [("trial", trial.get("mlflow_run_id"))] for trial in said["trials"]}
    of_finals = {name: _of_seeds(said["finals"][arm]) for arm, name in searches.ARMS.items()}
    tables = []
    for head, *lines in _tables(searches.markdown(found)):
        told = []
        for line in lines:
            runs = of_trials.get(line[0], []) if head[0] == "trial" else of_finals.get(line[0].split(" (")[0], [])
            told.append((line, _runs(runs, links), False))
        tables.append(Table(head, told))
    return {"study": found, "tables": tables, "headline": searches.headline(found)}


def _of_seeds(runs: Mapping[Any, Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """MLflow's runs by their seeds, in the order in which tables have these."""
    return [(f"seed {seed}", runs[seed].get("mlflow_run_id")) for seed in sorted(runs, key=int)]


def _runs(runs: Iterable[tuple[str, str | None]], links: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
    """MLflow's runs as (what, id, address); the address is empty where the server's is not known."""
    return [(what, run, _address("mlflow", run, links)) for what, run in runs if run]


def _tables(markdown: str) -> list[list[list[str]]]:
    """Read the tables of a text in Markdown: lines of cells, the head first."""
    found: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def _rates(arms: Iterable[Arm]) -> list[float]:
    return sorted({point["lr"] for arm in arms for point in arm.grid})


def _tried(arm: Arm) -> dict[float, float]:
    scores: dict[float, list[float]] = {}
    for point in arm.grid:
        scores.setdefault(point["lr"], []).append(point["validation_score"])
    return {rate: sum(values) / len(values) for rate, values in scores.items()}


def _method(row: str, published: Published) -> dict[str, Any]:
    """A pretrain row's six pieces and its training."""
    params = family.method(row, published)
    training = {**params["optim"], "adversarial": params.get("adversarial"), "augment": params.get("augment")}
    training |= {"seed": params.get("seed")}
    return {"row": row, "data": params["data"], "training": training} | {key: params[key] for key in PIECES}


def _dataset(name: str, meta: Mapping[str, Any], manifests: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    seen = {manifest["data"]["md5"] for manifest in manifests if manifest["data"]["name"] == name}
    md5 = sorted(seen | ({meta["md5"]} if "md5" in meta else set()))
    further = {key: value for key, value in meta.items() if key not in KNOWN_META}
    digest = meta.get("digest") or workspace.digest(meta)
    return {"name": name, "meta": meta, "md5": md5, "digest": digest, "further": further}


def _linked(manifest: Mapping[str, Any], links: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
    """The run's ids as (tool, id, address); the address is empty where the tool's is not known."""
    found = []
    for tool, key in (("mlflow", "mlflow_run_id"), ("prefect", "prefect_flow_run_id")):
        run = manifest.get(key)
        if not run:
            continue
        found.append((tool, run, _address(tool, run, links)))
    return found


def _address(tool: str, run: str, links: Mapping[str, str | None]) -> str:
    base = (links.get(f"{tool}_url") or "").rstrip("/")
    return RUN_PAGES[tool].format(base, run) if base.startswith(("http://", "https://")) else ""


def _seeds(arms: Sequence[Arm]) -> str:
    buffer = io.StringIO()
    lines = [(arm.row, seed, value) for arm in arms for seed, value in arm.seeds.items()]
    csv.writer(buffer, lineterminator="\n").writerows([("arm", "seed", "test_score"), *lines])
    return buffer.getvalue()


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return {key: value for key, value in numbers.items() if value - value == 0}  # neither nan nor infinite


def _figure(value: Any) -> str:
    """A number to three digits, or with thousands separated; a dash where there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
