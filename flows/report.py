"""The report: what was found, on which data, at what cost, in one self-contained page with its figures and numbers.

`build` reads every input first and writes afterwards, each file at once, `index.html` last: a report is never half of one
state and half of another. Every sentence is made from the statistics, so it cannot say more than they do.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import workspace
from flows.results import SCRATCH, Arm, Published, duration, hours, markdown, percent, read, run_ids, stale
from mim_core.checkpoint import write_atomically

PIECES = ("mask", "fill", "encoder", "head", "target", "loss")
RUN_PAGES = {"mlflow": "{}/#/runs/{}", "prefect": "{}/runs/flow-run/{}"}
KNOWN_META = frozenset({"channels", "size", "classes", "counts", "mean", "std", "quarantined", "digest"})


def build(folder: Path, links: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Write the report into `folder`; `links` may hold `mlflow_url` and `prefect_url`, the servers' addresses.

    Gives `headline`, `caveats`, `absent`, `index` (the page) and `summary` (as in summary.json). Raises UserError where
    nothing is published or a published file is broken.
    """
    from flows import figures

    published = read()
    if not published.arms and not published.pretrained:
        raise workspace.UserError("report: nothing is published under runs/; run `dvc repro` first")
    galleries = {row: run.folder / "gallery.png" for row, run in published.pretrained.items()}
    pictures = {f"gallery_{row}.png": path.read_bytes() for row, path in galleries.items() if path.exists()}
    colour = figures.colours(published.params.pretrain)
    look = figures.looks(published.arms, colour)
    pictures |= {
        "accuracy.png": figures.accuracy(published.arms, look),
        "pretraining.png": figures.pretraining(list(published.pretrained.values()), colour),
        "lr_grid.png": figures.lr_grid(published.arms, look),
    }
    said = {"headline": headline(published), "caveats": list(caveats(published)), "summary": summary(published)}
    page = _page(published, said, pictures, {row: one.colour for row, one in look.items()}, links or {})
    files: dict[str, bytes | str] = {
        **pictures,
        "table.md": markdown(published.arms),
        "summary.json": json.dumps(said["summary"], indent=1) + "\n",
        "accuracy.csv": _seeds(published.arms),
        "index.html": page,
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    for old in folder.glob("gallery_*.png"):  # of rows that are no more
        if old.name not in files:
            old.unlink()
    return {**said, "absent": list(published.absent), "index": str(folder / "index.html")}


def headline(published: Published) -> str:
    """Say what was found in a sentence or two."""
    compared = [arm for arm in published.arms if arm.difference]
    if not published.arms:
        return "No downstream result is published: nothing can be said about accuracy yet."
    if not compared:
        return f"{len(published.arms)} arms are published, but none has a baseline to be compared with."
    if len(compared) == 1:
        return finding(compared[0], published)
    gains, losses = (sum(_sign(arm) == sign for arm in compared) for sign in (1, -1))
    single = sum(arm.difference.count < 2 for arm in compared if arm.difference)
    parts = [f"{gains} with a gain", f"{losses} with a loss", f"{len(compared) - gains - losses - single} undecided"]
    parts += [f"{single} with one seed only"] if single else []
    counts = f"{len(compared)} arms were compared with training from scratch: {', '.join(parts)}."
    best = max(compared, key=lambda arm: (_sign(arm), arm.difference.mean if arm.difference else 0.0))
    return f"{counts} {finding(best, published)}" if _sign(best) == 1 else counts


def finding(arm: Arm, published: Published) -> str:
    """Say how an arm compares with its baseline; the means are those of the seeds that both have."""
    gain = arm.difference
    assert gain and arm.baseline, "only arms with a difference have a finding"
    rival = next(other for other in published.arms if other.row == arm.baseline)
    shared = [seed for seed in arm.seeds if seed in rival.seeds]
    before, after = (100 * sum(one.seeds[seed] for seed in shared) / len(shared) for one in (rival, arm))
    where = "all labels" if arm.labels is None else f"{arm.labels:,} labels"
    run = published.pretrained.get(arm.init)
    source = run.manifest["data"]["name"] if run else published.params.pretrain[arm.init].data
    count = published.packs.get(source, {}).get("counts", {}).get("train")
    images = f"{count:,} unlabelled images" if count else f"the unlabelled images of {source}"
    start = f"Pretraining on {images} ({arm.init})"
    change = f"from {before:.1f} % to {after:.1f} %"
    points = f"{100 * gain.mean:+.1f} points"
    if gain.count < 2:
        return f"{start} took test accuracy at {where} {change}: {points} with one seed, so no interval and no claim."
    bounds = f"{points}, 95 % interval [{100 * gain.low:.1f}, {100 * gain.high:.1f}], {gain.count} seeds"
    if not _sign(arm):
        return f"{start} made no difference to test accuracy at {where} that {gain.count} seeds can show: {bounds}."
    return f"{start} {'raised' if gain.mean > 0 else 'lowered'} test accuracy at {where} {change}: {bounds}."


def caveats(published: Published) -> Iterator[str]:
    """Say what a careful reader has to know before believing the table."""
    arms, manifests = published.arms, list(_manifests(published))
    if published.absent:
        yield f"Not published, and so not in this report: {', '.join(published.absent)}."
    old = [name for name, manifest in manifests if stale(manifest)]
    if old:
        yield f"Made by other code than the code that lies here now: {', '.join(old)}."
    dirty = [name for name, manifest in manifests if manifest.get("git", {}).get("dirty")]
    if dirty:
        yield f"Made with uncommitted changes to code or rows: {', '.join(dirty)}."
    versions: dict[str, set[str]] = {}
    for _, manifest in manifests:
        versions.setdefault(manifest["data"]["name"], set()).add(manifest["data"]["md5"])
    for name, found in versions.items():
        if len(found) > 1:
            yield f"The runs on {name} saw {len(found)} versions of it and cannot be compared: {', '.join(sorted(found))}."
    devices = {str(manifest.get("compute", {}).get("device")) for _, manifest in manifests}
    if len(devices) > 1:
        yield f"Times are from different devices and cannot be compared: {', '.join(sorted(devices))}."
    single = [arm.row for arm in arms if arm.score.count < 2]
    if single:
        yield f"One seed only, so no interval is given: {', '.join(single)}."
    for arm in arms:
        if end := _edge(arm):
            yield f"{arm.row}: the best learning rate tried, {arm.lr:g}, is the {end} of its grid; a wider grid may do better."
        if arm.baseline and not arm.same_encoder:
            yield f"{arm.row}: its baseline {arm.baseline} has another encoder."
        if arm.difference and arm.difference.count < arm.score.count:
            yield f"{arm.row}: only {arm.difference.count} of its seeds are also its baseline's."
    compared = sum(arm.difference is not None for arm in arms)
    if compared > 1:
        yield f"{compared} differences are shown, each with its own 95 % interval; none is corrected for their number."


def summary(published: Published) -> dict[str, dict[str, dict[str, float]]]:
    """Give the numbers of each run, flat, by stage and row; what is not known is left out."""
    downstream = {}
    for arm in published.arms:
        numbers = {"test_accuracy": arm.score.mean, "test_accuracy_half_width": arm.score.half, "lr": arm.lr}
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
    return {"downstream": downstream, "pretrain": pretrain}


def _page(
    published: Published,
    said: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    colours: Mapping[str, str],
    links: Mapping[str, str | None],
) -> str:
    import jinja2

    manifests = dict(_manifests(published))
    rates = sorted({point["lr"] for arm in published.arms for point in arm.grid})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "hours": hours, "percent": percent, "figure": _figure, "value": _value}
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text())
    return template.render(
        said,
        published=published,
        findings=[finding(arm, published) for arm in published.arms if arm.difference],
        pictures={name: "data:image/png;base64," + base64.b64encode(image).decode() for name, image in pictures.items()},
        colours=colours,
        datasets=[_dataset(name, meta, manifests.values()) for name, meta in published.packs.items()],
        pieces=PIECES,
        methods=[_method(row, published) for row in published.params.pretrain],
        rates=rates,
        tried={arm.row: _tried(arm) for arm in published.arms},
        edges={arm.row: _edge(arm) for arm in published.arms},
        manifests=manifests,
        stale={name: stale(manifest) for name, manifest in manifests.items()},
        json={name: json.dumps(manifest, indent=1, sort_keys=True) for name, manifest in manifests.items()},
        ids={name: _linked(manifest, links) for name, manifest in manifests.items()},
        totals={key: sum(manifest[key] for manifest in manifests.values()) for key in ("wall_seconds", "device_hours")},
        code=workspace.code_fingerprint(),
    )


def _manifests(published: Published) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from ((f"pretrain {row}", run.manifest) for row, run in published.pretrained.items())
    yield from ((f"downstream {arm.row}", arm.manifest) for arm in published.arms)


def _sign(arm: Arm) -> int:
    """1 where the interval of the difference lies above zero, -1 below, 0 where it holds zero or there is none."""
    gain = arm.difference
    if not gain or gain.count < 2:
        return 0
    return 1 if gain.low > 0 else -1 if gain.high < 0 else 0


def _edge(arm: Arm) -> str:
    """Say which end of its grid the chosen learning rate lies at; empty where it lies inside or was the only one."""
    rates = sorted({point["lr"] for point in arm.grid})
    if len(rates) < 2 or rates[0] < arm.lr < rates[-1]:
        return ""
    return "lowest" if arm.lr == rates[0] else "highest"


def _tried(arm: Arm) -> dict[float, float]:
    scores: dict[float, list[float]] = {}
    for point in arm.grid:
        scores.setdefault(point["lr"], []).append(point["validation_accuracy"])
    return {rate: sum(values) / len(values) for rate, values in scores.items()}


def _method(row: str, published: Published) -> dict[str, Any]:
    """A pretrain row's six pieces and its training, as it ran, or as it would run where it is not published."""
    run = published.pretrained.get(row)
    params = published.params.pretrain[row].model_dump(mode="json")
    if run and all(piece in run.manifest["params"] for piece in PIECES):
        params = dict(run.manifest["params"])
    training = {key: params.get(key) for key in ("optim", "augment", "seed")}
    return {"row": row, "run": run, "data": params["data"], "training": training} | {key: params[key] for key in PIECES}


def _dataset(name: str, meta: Mapping[str, Any], manifests: Any) -> dict[str, Any]:
    md5 = sorted({manifest["data"]["md5"] for manifest in manifests if manifest["data"]["name"] == name})
    further = {key: value for key, value in meta.items() if key not in KNOWN_META}
    digest = meta.get("digest") or workspace.digest(meta)
    return {"name": name, "meta": meta, "md5": md5, "digest": digest, "further": further}


def _linked(manifest: Mapping[str, Any], links: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
    """The run's ids as (tool, id, address); the address is empty where the tool's is not known."""
    found = []
    for tool, run in run_ids(manifest).items():
        base = (links.get(f"{tool}_url") or "").rstrip("/")
        known = base.startswith(("http://", "https://"))
        found.append((tool, run, RUN_PAGES[tool].format(base, run) if known else ""))
    return found


def _seeds(arms: Sequence[Arm]) -> str:
    buffer = io.StringIO()
    lines = [(arm.row, seed, value) for arm in arms for seed, value in arm.seeds.items()]
    csv.writer(buffer, lineterminator="\n").writerows([("arm", "seed", "test_accuracy"), *lines])
    return buffer.getvalue()


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return {key: value for key, value in numbers.items() if value - value == 0}  # neither nan nor infinite


def _figure(value: Any) -> str:
    """A number to three digits, or with thousands separated; a dash where there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _value(value: Any) -> str:
    """A param in words: `name (key value, ...)` for a piece, plain text for the rest."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} {_value(one)}" for key, one in value.items() if key != "name" and one is not None)
        return f"{value['name']} ({inner})" if "name" in value and inner else str(value.get("name", inner))
    if isinstance(value, (list, tuple)):
        return " x ".join(map(_value, value)) if len(value) < 4 else ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


# The Prefect flow around `build`, and `main`, come below this line.
