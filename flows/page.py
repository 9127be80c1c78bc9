"""The report's page: what was found, on which data, at what cost, self-contained, with its figures and numbers.

`build` reads every input first and writes afterwards, each file at once, `index.html` last: a report is never half of
one state and half of another.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import family, rows, workspace
from flows.family import PIECES
from flows.findings import caveats, edge, finding, headline, manifests_of
from flows.results import Arm, Published, comparisons, duration, hours, markdown, measure, percent, read, stale, title
from mim_core.files import write_atomically

ROW_PICTURES = ("gallery_", "recovery_", "tokenizer_", "predictions_")
RUN_PAGES = {"mlflow": "{}/#/runs/{}", "prefect": "{}/runs/flow-run/{}"}
KNOWN_META = frozenset({"channels", "size", "classes", "counts", "mean", "std", "quarantined", "digest", "name", "md5"})


def build(folder: Path, links: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Write the report into `folder`; `links` may hold `mlflow_url` and `prefect_url`, the servers' addresses.

    Gives `headline`, `caveats`, `absent`, `index` (the page) and `summary` (as in summary.json). Raises UserError where
    nothing is published or a published file is broken.
    """
    from flows import figures

    published = read()
    if not published.arms and not published.pretrained:
        raise workspace.UserError("report: nothing is published under runs/; run `dvc repro` first")
    shown = {f"tokenizer_{row}.png": one.folder / "gallery.png" for row, one in published.tokenizers.items()}
    for row, run in published.pretrained.items():
        shown |= {f"{name}_{row}.png": run.folder / f"{name}.png" for name in ("gallery", "recovery")}
    shown |= {f"predictions_{arm.row}.png": arm.folder / "predictions.png" for arm in published.arms}
    pictures = {name: path.read_bytes() for name, path in shown.items() if path.exists()}
    colour = figures.colours(rows.pretraining(published.rows))
    look = figures.looks(published.arms, colour)
    pictures |= {
        "accuracy.png": figures.accuracy(published.arms, look),
        "pretraining.png": figures.pretraining(list(published.pretrained.values()), colour),
        "lr_grid.png": figures.lr_grid(published.arms, look),
    }
    said = {"headline": headline(published), "caveats": list(caveats(published)), "summary": summary(published)}
    table = family.family(published)
    page = _page(published, table, said, pictures, colour, links or {})
    files: dict[str, bytes | str] = {
        **pictures,
        "table.md": markdown(published.arms),
        "family.md": family.markdown(table),
        "family.csv": family.as_csv(table),
        "summary.json": json.dumps(said["summary"], indent=1) + "\n",
        "accuracy.csv": _seeds(published.arms),
        "index.html": page,
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    for old in folder.glob("*_*.png"):  # of rows that are no more
        if old.name not in files and old.name.startswith(ROW_PICTURES):
            old.unlink()
    return {**said, "absent": list(published.absent), "index": str(folder / "index.html")}


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
    filters |= {"value": family.words, "millions": family.millions}
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
        totals={key: sum(manifest[key] for manifest in manifests.values()) for key in ("wall_seconds", "device_hours")},
        code=workspace.code_fingerprint(),
    )


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
        base = (links.get(f"{tool}_url") or "").rstrip("/")
        known = base.startswith(("http://", "https://"))
        found.append((tool, run, RUN_PAGES[tool].format(base, run) if known else ""))
    return found


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
