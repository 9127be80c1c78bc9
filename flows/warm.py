"""What a search is told before it starts: published points of ablations that are trials of it in all but name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows import results, workspace
from flows.spaces import Row, Space


def known(
    ablations: Sequence[str], space: Space, judge: Mapping[str, Row], data: Mapping[str, str], seeds: Sequence[int]
) -> dict[str, list[Any]]:
    """Find the points of ablations whose row the space can make, judged by the same judge on the same data and code.

    `taken`: settings, score (a share) and origin of each; `left`: a sentence for each that was not, with the reason. A
    score is over the trials' own seeds where the ablation has them, as all trials share those; else over its seeds.
    """
    found: dict[str, list[Any]] = {"taken": [], "left": []}
    for name in ablations:
        folder = workspace.run_folder("ablate", name)
        try:
            said, manifest = (json.loads((folder / f"{file}.json").read_text()) for file in ("results", "manifest"))
        except FileNotFoundError:
            found["left"].append(f"ablation {name}: it is not published; `unmask ablate {name}` runs it")
            continue
        if reason := "; ".join(_others(said, manifest, judge, data)):
            found["left"].append(f"ablation {name}: {reason}")
            continue
        (judged,) = judge
        for point in said["points"]:
            if not point["row"]:
                continue  # from scratch
            scores = {run["seed"]: run["scores"][judged] for run in point["runs"]}
            settings = space.settings(point["row"])
            if settings is None or not scores:
                why = "its row is outside the space" if scores else "it failed"
                found["left"].append(f"ablation {name}, {point['label']}: {why}")
                continue
            shared = seeds if all(seed in scores for seed in seeds) else sorted(scores)
            score = sum(scores[seed] for seed in shared) / len(shared)
            origin = f"ablation {name} ({results.of_seeds(shared)})"
            found["taken"].append({"settings": settings, "score": score, "origin": origin})
    return found


def _others(said: Mapping[str, Any], manifest: Mapping[str, Any], judge: Mapping[str, Row], data: Any) -> Iterator[str]:
    ((name, row),) = judge.items()
    if said["data"] != data:
        yield "it is of other data, or of another pack of the same"
    if results.stale(manifest):
        yield "it is of other code"
    if manifest["params"]["judges"].get(name) != row:
        yield f"its judges are not {name} with the same changes"
