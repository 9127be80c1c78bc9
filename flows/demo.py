"""The whole shape in one command: doctor, data, servers, pipeline, report, and where to look next."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from flows import data, doctor, findings, results, rows, servers, workspace

ARMS = ("baseline@scratch_2000", "downstream@simmim_vit_2000")
"""The stages that the demo compares; DVC runs what they need before them, and no other row."""
# One process for two calls: what DVC imports takes longer than either where nothing is stale. The report depends on
# the folders of all rows, which DVC would run first, so it is run on its own.
REPRODUCE = """
import sys
from dvc.cli import main
sys.exit(main(["repro", *sys.argv[1:]]) or main(["repro", "--single-item", "report"]))
"""


def demo(console: Console) -> None:
    """Run what is stale of the demo's rows and show what came out. Raises UserError."""
    started = time.time()
    console.rule("doctor", align="left")
    faults = diagnose(console, data_needed=False)
    if faults:
        raise workspace.UserError("mend what is marked above, then run `unmask demo` again")
    console.rule("data and servers", align="left")
    ports = servers.up(wait=False)
    # It refuses bytes that are not those pinned, so the guard need not be asked again.
    data.restore(lambda text: console.print(text, highlight=False))
    servers.await_up(ports)
    for name in servers.DEFAULT_PORTS:
        console.print(f"{name:8} {servers.address(name, ports)}", highlight=False)
    servers_up = time.time()
    console.rule("pipeline", align="left")
    reproduce()
    show(console, started, servers_up)


def diagnose(console: Console, data_needed: bool = True) -> int:
    """Print the doctor's findings; gives the number of faults."""
    faults = 0
    for finding in doctor.examine(data_needed):
        faults += bool(finding.mend)
        mark = "[red]mend[/]" if finding.mend else "[green]ok[/]  "
        console.print(f"{mark} {finding.name:11}", end="")
        console.print(finding.found, markup=False, highlight=False)
        if finding.mend:
            console.print(f"     {'':11}-> {finding.mend}", markup=False, highlight=False)
    return faults


def reproduce() -> None:
    """Run the demo's rows and the report by `dvc repro`; raises UserError where a stage fails (it has said why)."""
    given = rows.load()
    missing = {arm.split("@")[1] for arm in ARMS} - given["baselines"].keys() - given["downstream"].keys()
    if missing:
        raise workspace.UserError(
            f"params/downstream.yaml: the demo's rows {sorted(missing)} are gone; put them back with "
            "`git checkout params`, or run your own rows with `dvc repro`"
        )
    for kind in ("ablate", "search"):  # the report depends on these folders, and DVC wants them to be there
        workspace.run_folder(kind, "").mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", REPRODUCE, *ARMS], cwd=workspace.root())
    if done.returncode:
        raise workspace.UserError("the pipeline stopped at the stage above; the same command goes on from there")


def show(console: Console, started: float, servers_up: float) -> None:
    """Print the result table, where the time went, and where to look."""
    found = results.read()
    header, lines = results.terminal(found.arms)
    console.rule("result", align="left")
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)
    console.print(findings.headline(found), highlight=False, markup=False)
    console.rule("time", align="left")
    spent = [line for line in timings() if line["ended"] >= started]
    total = time.time() - started
    if not spent:
        console.print(f"Nothing was stale: no stage ran ({total:.0f} s).", highlight=False)
    else:
        for line in spent:
            share = line["wall"] / total
            console.print(
                f"{line['stage']:34} {line['wall']:6.0f} s {share:5.0%}   work {line['work']:.0f} s", highlight=False
            )
        work = sum(line["work"] for line in spent)
        running = time.time() - servers_up
        console.print(
            f"{'doctor, data, servers':34} {servers_up - started:6.0f} s {(servers_up - started) / total:5.0%}\n"
            f"{'in all':34} {total:6.0f} s; with the servers up {running:.0f} s, of which orchestration "
            f"(imports, DVC, Prefect, MLflow) {running - work:.0f} s, {1 - work / running:.0%}",
            highlight=False,
        )
    console.rule("where to look", align="left")
    for name, where in places(found).items():
        console.print(f"{name:9} {where}", highlight=False, soft_wrap=True, markup=False)


def places(found: results.Published) -> dict[str, str]:
    """Where the results can be seen: the report's file, MLflow's compare page, Prefect's run of the last arm."""
    where = {"report": str(workspace.report_folder() / "index.html")}
    ports = servers.running()
    manifests = [arm.manifest for arm in found.arms]
    compared = servers.compare_page([said["mlflow_run_id"] for said in manifests if said.get("mlflow_run_id")])
    if "mlflow" in ports:
        where["mlflow"] = compared or servers.address("mlflow", ports)
    if "prefect" in ports:
        runs = [said["prefect_flow_run_id"] for said in manifests if said.get("prefect_flow_run_id")]
        page = f"/runs/flow-run/{runs[-1]}" if runs else "/runs"
        where["prefect"] = f"{servers.address('prefect', ports)}{page}"
    return where


def timings() -> list[dict[str, Any]]:
    """What stages noted of their time: `stage`, when it `ended`, `wall` and `work` in seconds."""
    path = workspace.home() / "timings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
