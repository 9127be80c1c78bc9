"""What the numbers say, in sentences made from the statistics, so that they cannot say more than those do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import ablations, rows, searches, workspace
from flows.results import SCRATCH, Arm, Published, budget, measure, stale, verdict

NAMED = 3
"""Rows that are not published are named up to this number, and counted above it."""
SECTIONS = {
    "prepare": ("data",),
    "fit_target": ("targets",),
    "pretrain": ("pretrain", "pretrain_fitted"),
    "downstream": tuple(rows.JUDGED),
}


def headline(published: Published) -> str:
    """Say what was found in a few sentences: of the arms, and the strongest claims of ablations and of searches."""
    claims = list(_of_laboratory(published))
    if published.arms or not (published.ablations or published.searches):
        return " ".join([_of_arms(published), *claims])
    if not claims:
        claims = [f"Ablation {ablations.headline(found)}" for found in published.ablations[:1]]
        claims = claims or [f"Search {searches.headline(found)}" for found in published.searches[:1]]
    return " ".join(claims)


def _of_arms(published: Published) -> str:
    compared = [arm for arm in published.arms if arm.difference]
    if not published.arms:
        return "No downstream result is published: nothing can be said about encoders yet."
    if not compared:
        return f"{len(published.arms)} arms are published, but none has a baseline to be compared with."
    if len(compared) == 1:
        return finding(compared[0], published)
    gains, losses = (sum(_sign(arm) == sign for arm in compared) for sign in (1, -1))
    single = sum(arm.difference.count < 2 for arm in compared if arm.difference)
    parts = [f"{gains} with a gain", f"{losses} with a loss", f"{len(compared) - gains - losses - single} undecided"]
    parts += [f"{single} with one seed only"] if single else []
    counts = f"{len(compared)} arms were compared with training the same encoder from scratch: {', '.join(parts)}."
    best = max(compared, key=lambda arm: (_sign(arm), arm.difference.mean if arm.difference else 0.0))
    return f"{counts} The largest gain: {finding(best, published)}" if _sign(best) == 1 else counts


def _of_laboratory(published: Published) -> Iterator[str]:
    """Say the largest gain that an ablation's table claims, and the largest of the searches' on test images; none where
    none is claimed."""
    tops = [
        (line.difference, line, found)
        for found in published.ablations
        for line in found.tables[0].lines
        if line.best and line.difference
    ]
    if tops:
        gain, line, study = max(tops, key=lambda top: top[0].mean)
        base = study.tables[0].base.label
        yield f"Ablation {study.name}: {line.label} over {base} {verdict(gain)} on validation images."
    gains = [(found.gain("test"), found) for found in published.searches if found.found]
    held = [(gain, found) for gain, found in gains if gain.count > 1 and gain.low > 0]
    if held:
        gain, search = max(held, key=lambda one: one[0].mean)
        yield f"Search {search.name}: its best row over its default row {verdict(gain)} on test images."


def finding(arm: Arm, published: Published) -> str:
    """Say how an arm compares with its baseline; the means are those of the seeds that both have."""
    gain = arm.difference
    assert gain, "only arms with a difference have a finding"
    rival = next(other for other in published.arms if other.row == arm.baseline)
    shared = [seed for seed in arm.seeds if seed in rival.seeds]
    before, after = (100 * sum(one.seeds[seed] for seed in shared) / len(shared) for one in (rival, arm))
    metric, where = measure([arm]), budget(arm.labels)
    run = published.pretrained.get(arm.init)
    count = published.packs.get(run.manifest["data"]["name"], {}).get("counts", {}).get("train") if run else None
    images = f"{count:,} unlabelled images" if count else "unlabelled images"
    start = f"Pretraining on {images} ({arm.init})" if run else f"Beginning from {Path(arm.init).name} ({arm.row})"
    change = f"from {before:.1f} % to {after:.1f} %"
    points = f"{100 * gain.mean:+.1f} points"
    if gain.count < 2:
        return f"{start} took test {metric} at {where} {change}: {points} with one seed, so no interval and no claim."
    bounds = f"{points}, 95 % interval [{100 * gain.low:.1f}, {100 * gain.high:.1f}], {gain.count} seeds"
    if not _sign(arm):
        return f"{start} made no difference to test {metric} at {where} that {gain.count} seeds can show: {bounds}."
    return f"{start} {'raised' if gain.mean > 0 else 'lowered'} test {metric} at {where} {change}: {bounds}."


def _of_data(published: Published, key: str, of_pack: Callable[[Any], str | None]) -> dict[str, set[str]]:
    """Give by dataset what the pack that lies here is, and what runs say that theirs was."""
    found = {name: {said} for name, meta in published.packs.items() if (said := of_pack(meta))}
    for _, manifest in manifests_of(published):
        if key in manifest["data"]:
            found.setdefault(manifest["data"]["name"], set()).add(manifest["data"][key])
    return found


def caveats(published: Published) -> Iterator[str]:
    """Say what a careful reader has to know before believing the table."""
    arms, manifests = published.arms, list(manifests_of(published))
    if published.absent:
        yield f"Not published, and so not in this report: {_absent(published)}."
    old = [name for name, manifest in manifests if stale(manifest)]
    if old:
        yield f"Made by other code than the code that lies here now: {_few(old, len(manifests))}."
    dirty = [name for name, manifest in manifests if manifest.get("git", {}).get("dirty")]
    if dirty:
        yield f"Made with uncommitted changes to code or rows: {_few(dirty, len(manifests))}."
    versions = _of_data(published, "md5", lambda meta: meta.get("md5"))
    for name, found in versions.items():
        if len(found) > 1:
            told = ", ".join(sorted(found))
            yield f"{name}: runs and pack are of {len(found)} versions of it and do not compare: {told}."
    for name, found in _of_data(published, "pack", workspace.digest).items():
        if len(found) > 1 and len(versions.get(name, ())) < 2:
            yield f"{name}: runs are of {len(found)} packs of it, by different rows of data.yaml, and do not compare."
    devices = {str(manifest.get("compute", {}).get("device")) for _, manifest in manifests}
    if len(devices) > 1:
        yield f"Times are from different devices and cannot be compared: {', '.join(sorted(devices))}."
    single = [arm.row for arm in arms if arm.score.count < 2]
    if single:
        yield f"One seed only, so no interval is given: {_few(single, len(arms))}."
    alone = [arm.row for arm in arms if arm.init != SCRATCH and not arm.baseline]
    if alone:
        yield f"Not compared, as no baseline has their encoder, task, data and labels: {', '.join(alone)}."
    ends = {end: [arm.row for arm in arms if edge(arm) == end] for end in ("lowest", "highest")}
    for end, named in ends.items():
        if named:
            yield f"The chosen learning rate is the {end} tried, and a wider grid may do better: {', '.join(named)}."
    for arm in arms:
        if arm.difference and arm.difference.count < arm.score.count:
            yield f"{arm.row}: only {arm.difference.count} of its seeds are also its baseline's."
    compared = sum(arm.difference is not None for arm in arms)
    if published.ablations:
        yield (
            "Ablations compare at budgets of their own and on validation images; each table is corrected for its own "
            "comparisons, not for the number of tables."
        )
    if compared > 1:
        yield (
            f"{compared} differences are shown, each with its own 95 % interval; none is corrected for their number, "
            "and the largest of many is likely to be too large."
        )


def manifests_of(published: Published) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give every run with its manifest, named `<stage> <row>`."""
    yield from ((f"fit_target {row}", one.manifest) for row, one in published.tokenizers.items())
    yield from ((f"pretrain {row}", run.manifest) for row, run in published.pretrained.items())
    yield from ((f"downstream {arm.row}", arm.manifest) for arm in published.arms)
    yield from ((f"ablate {found.name}", found.manifest) for found in published.ablations)
    yield from ((f"search {found.name}", found.manifest) for found in published.searches)


def _few(names: Sequence[str], among: int) -> str:
    """Name all of a few; of more, some and how many they are."""
    if len(names) <= 2 * NAMED:
        return ", ".join(names)
    return f"{len(names)} of {among}, such as {', '.join(names[:NAMED])}"


def _absent(published: Published) -> str:
    """Name what is not published; where that is much, only how much of which stage."""
    if len(published.absent) <= NAMED:
        return ", ".join(published.absent)
    counts = Counter(name.split()[0] for name in published.absent)
    given = {stage: sum(len(published.rows[section]) for section in SECTIONS[stage]) for stage in counts}
    return ", ".join(f"{count} of {given[stage]} {stage} rows" for stage, count in counts.items())


def edge(arm: Arm) -> str:
    """Say which end of its grid the chosen learning rate lies at; empty where it lies inside or was the only one."""
    rates = sorted({point["lr"] for point in arm.grid})
    if arm.lr is None or len(rates) < 2 or rates[0] < arm.lr < rates[-1]:
        return ""
    return "lowest" if arm.lr == rates[0] else "highest"


def _sign(arm: Arm) -> int:
    """1 where the interval of the difference lies above zero, -1 below, 0 where it holds zero or there is none."""
    gain = arm.difference
    if not gain or gain.count < 2:
        return 0
    return 1 if gain.low > 0 else -1 if gain.high < 0 else 0
