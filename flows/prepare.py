"""Prepare a dataset: decode it once into a pack. `python -m flows.prepare DATASET`."""

from __future__ import annotations

import json
import time

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import workspace
from flows.progress import Bar
from flows.stage import Stage, artifact_key, begun, command, shown
from mim_core.cores import cores


@task(cache_policy=NO_CACHE)
def write_pack(stage: Stage) -> None:
    """Write the pack. No retry: a failure is in the files or the disk, and would come again."""
    from mim_core.data import pack
    from mim_core.data.sources import SOURCES
    from mim_core.data.work import Work
    from mim_core.params import DataRow
    from mim_core.spec import build, check

    row = check(DataRow, stage.params, stage.row)
    about = {"name": stage.row, "md5": stage.data["md5"], "row": stage.params}
    # Beside the pack, as it has to be on the same disk; the stage's key names all that it follows from.
    part = stage.pack.with_name(f".{stage.row}.part")
    try:
        with Bar(f"prepare {stage.row}", 1) as bar, Work(part, stage.key, cores(), bar.count) as work:
            source = build(SOURCES, row.source, workspace.data_folder(stage.row))
            pack.write(source, stage.pack, about, work)
    except (ValueError, OSError) as error:
        raise workspace.UserError(f"data/{stage.row}: {error}") from error


def checked(dataset: str) -> Stage:
    """Check all that can be checked before work starts; raises UserError."""
    return Stage("prepare", dataset, ("data",))


@flow(name="prepare", flow_run_name="prepare {dataset}")
def prepare(dataset: str) -> None:
    """Decode data/<dataset> into packs/<dataset>."""
    stage = begun(checked, dataset)
    since = time.time()
    with stage.alone():
        write_pack(stage)
    stage.spans.append((since, time.time()))
    meta = json.loads((stage.pack / "meta.json").read_text())
    counts = "\n".join(f"| {split} | {count} |" for split, count in meta["counts"].items())
    text = (
        f"**{dataset}** (md5 {meta['md5']}), {meta['size'][0]} x {meta['size'][1]} px, {meta['channels']} channels, "
        f"{len(meta['classes'])} classes, {len(meta['quarantined'])} files quarantined, "
        f"{sum(meta['left_out'].values())} boxes cut away by fitting to this size"
        f"\n\n| split | images |\n|---|---|\n{counts}"
    )
    with shown():
        create_markdown_artifact(text, key=artifact_key("pack", dataset))
    stage.close()


if __name__ == "__main__":
    command("prepare", checked, prepare)
