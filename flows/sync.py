"""`unmask sync`: send MLflow what waits in `.unmask/spool/`, and put its ids into what was published meanwhile.

What is published is DVC's: a stage whose outputs are as DVC knows them is committed with the ids, so that it is not
stale for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from flows import spool, workspace
from flows.sender import NAME, Sender, with_ids

WORDS = {"open": "runs", "metrics": "points", "file": "files", "tag": "tags", "end": "ends of runs"}
WORDS |= {"register": "encoders", "compete": "models"}
# Under DVC's lock: another of its commands that is running would take a file for changed.
MEND = """
import json, sys
from pathlib import Path
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from mim_core.files import write_atomically

mended = json.load(sys.stdin)
with Repo() as repo:
    try:
        with lock_repo(repo):
            stages = {}
            for path in mended:
                try:
                    (out,) = repo.find_outs_by_path(path)
                except DvcException:  # of no row that is in params/
                    continue
                stages[out.stage.addressing] = out.stage
            fresh = [name for name, stage in stages.items() if not any(stage.changed_entries())]
            for path, text in mended.items():
                write_atomically(Path(path), text)
            for name in fresh:
                repo.commit(name, force=True)
    except LockError as error:
        sys.exit(str(error))
"""


def sync() -> None:
    """Send all that waits, mend what was published, and print it; raises UserError where MLflow does not answer."""
    sender = Sender()
    try:
        for path in spool.left():
            _send(path, sender)
        found = unnamed()
        ids = {name: sender.find(name) for name in sorted(set().union(*map(NAME.findall, found.values())))}
    except Exception as error:
        waiting = ", ".join(f"{spool.name_of(path)} ({spool.count(path)} operations)" for path in spool.left())
        raise workspace.UserError(
            f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} does not answer: {workspace.first_line(error)}\n"
            f"what waits: {waiting or 'ids of runs'}; start its server (`unmask up`), then give the same command again"
        ) from error
    mended = {path: with_ids(text, {name: run for name, run in ids.items() if run}) for path, text in found.items()}
    mended = {path: text for path, text in mended.items() if text != found[path]}
    if mended:
        _mend(mended)
    if not spool.left():
        print("MLflow has the whole record")


def unnamed() -> dict[Path, str]:
    """Published files that name runs which MLflow had not given an id, with their texts."""
    root = workspace.root()
    paths = (*root.glob("runs/*/*/*.json"), *(root / "report").glob("*.html"))
    texts = {path.relative_to(root): path.read_text() for path in sorted(paths)}
    return {path: text for path, text in texts.items() if NAME.search(text)}


def _send(path: Path, sender: Sender) -> None:
    name, done = spool.name_of(path), Counter[str]()
    sending = spool.rest(path, sender)
    while True:
        try:
            operation = next(sending)
        except StopIteration as end:
            if not end.value:
                print(f"{name}: its process goes on, and sends it itself")
            elif done:
                print(f"{name}: sent {', '.join(f'{count} {WORDS[op]}' for op, count in done.items())}", flush=True)
            return
        if "refused" in operation:
            print(f"{name}: MLflow refused '{operation['op']}': {operation['refused']}")
        else:
            done[operation["op"]] += len(operation.get("points", "."))


def _mend(mended: dict[Path, str]) -> None:
    given = json.dumps({str(path): text for path, text in mended.items()})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    root = workspace.root()
    done = subprocess.run([sys.executable, "-c", MEND], input=given, cwd=root, env=environment, text=True)
    if done.returncode:
        raise workspace.UserError(
            f"{next(iter(mended))}: MLflow's id of the run could not be put in: DVC failed or is at work (see above); "
            "run `unmask sync` again when its command is over"
        )
    print(f"put MLflow's ids into {', '.join(map(str, mended))}")
