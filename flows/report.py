"""Report on all published results: the page, its figures and numbers, also where MLflow and Prefect show them.

`python -m flows.report`, or `unmask report`.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import data, page, servers, workspace
from flows.stage import note_time, outliving_prefect, picture_address, shown


@task(cache_policy=NO_CACHE)
def write(folder: Path) -> dict[str, Any]:
    """Read what is published and write the report's files."""
    ports = servers.running()
    links = {f"{name}_url": servers.address(name, ports) if name in ports else None for name in servers.DEFAULT_PORTS}
    return page.build(folder, links)


@task(cache_policy=NO_CACHE)
def show(folder: Path, said: dict[str, Any]) -> None:
    """Show the report where people look: a run of MLflow, artifacts of Prefect's flow run."""
    from flows.tracking import Record

    state = workspace.jobs_folder() / "report"
    digests = data.guard()
    sources = {"name": ", ".join(digests), "md5": workspace.digest(digests)}
    record = Record("report", "all", state, sources, {"headline": said["headline"]}, watch=False)
    for kind, runs in said["summary"].items():
        for row, values in runs.items():
            name = f"targets.{row}" if kind == "targets" else row  # which may have the name of a pretrain row
            record.metrics(record.parent, {f"{name}.{key}": value for key, value in values.items()})
    for path in sorted(folder.iterdir()):
        if path.is_file():
            record.file(record.parent, path)
    record.end(record.parent)
    shutil.rmtree(state, ignore_errors=True)
    with shown():
        create_markdown_artifact(f"{said['headline']}\n\n{(folder / 'table.md').read_text()}", key="table")
        create_markdown_artifact((folder / "family.md").read_text(), key="family")
        create_image_artifact(image_url=picture_address(folder / "accuracy.png"), key="accuracy")


@flow(name="report", flow_run_name="report")
def report() -> dict[str, Any]:
    """Build report/ from everything that is published under runs/."""
    begun = time.time()
    folder = workspace.report_folder()
    said = write(folder)
    built = time.time()
    show(folder, said)
    note_time("report", [(begun, built)])
    return said


def main() -> None:
    try:
        with outliving_prefect("report"):
            report()
    except workspace.UserError as error:
        sys.exit(f"report cannot be built:\n{error}")


if __name__ == "__main__":
    main()
