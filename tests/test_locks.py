"""One process at a time: who comes second waits or is told who holds it, and what a dead one left holds nobody up."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mim_core.locks import HeldError, held

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from mim_core.locks import held
with held(Path(sys.argv[1]), "the row"):
    print("held", flush=True)
    sys.stdin.read()
"""
ADD = """
import sys, time
from pathlib import Path
from mim_core.locks import held
count = Path(sys.argv[2])
for _ in range(50):
    with held(Path(sys.argv[1]), "the count", lambda: False, 0.001):
        count.write_text(str(int(count.read_text()) + 1))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True, stdin=pipe, stdout=pipe, stderr=pipe, env=environment
    )


def holder(path: Path) -> subprocess.Popen[str]:
    process = start(HOLD, str(path))
    assert process.stdout
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def note(**changes: Any) -> str:
    return json.dumps({"pid": 1, "host": socket.gethostname(), "boot": "other", "since": 0.0, **changes})


def test_a_second_one_is_told_who_holds_it_since_when_and_has_it_at_once_after_a_kill(tmp_path: Path) -> None:
    path, before = tmp_path / "deep" / "lock", time.time()
    process = holder(path)
    with pytest.raises(HeldError) as error, held(path, "the row"):
        pass
    said = str(error.value)
    start_, end = f"the row: process {process.pid} on host {socket.gethostname()} has it since ", "; wait for its end, "
    assert said.startswith(start_)
    assert end in said
    since = time.mktime(time.strptime(said.removeprefix(start_).partition(";")[0], "%Y-%m-%d %H:%M:%S"))
    assert int(before) <= since <= time.time()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads(path.read_text())["pid"] == process.pid, "what it left is stale, and known to be"
    with held(path, "the row"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""


def test_who_waits_gets_it_when_the_first_ends(tmp_path: Path) -> None:
    process, asked = holder(tmp_path / "lock"), []

    def give_up() -> bool:
        asked.append(1)
        if len(asked) == 3:
            process.stdin.close()  # type: ignore[union-attr]
        return False

    with process, held(tmp_path / "lock", "the row", give_up, 0.01):
        assert process.wait(120) == 0
    assert len(asked) >= 3


def test_many_processes_that_take_turns_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    processes = [start(ADD, str(tmp_path / "lock"), str(tmp_path / "count")) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert (tmp_path / "count").read_text() == "200"


def test_threads_of_a_process_are_kept_apart(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(20):
            with held(tmp_path / "lock", "it", lambda: False, 0.001):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert most == [1]


@pytest.mark.parametrize("left", [
    "", "{", "[]", "null", '{"pid": 1}', "\0\0", note(), note(pid=2**30), note(pid=os.getpid()),
    note(host="renamed", boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip() if sys.platform == "linux"
         else ""),
], ids=itertools.count())  # fmt: skip
def test_what_a_dead_process_of_this_machine_left_is_passed_over(tmp_path: Path, left: str) -> None:
    """Also after the machine was started again, and under a container's new name."""
    (tmp_path / "lock").write_text(left)
    with held(tmp_path / "lock", "the row"):
        pass
    assert (tmp_path / "lock").read_text() == ""


def test_what_another_machine_left_stands_until_it_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(note(pid=77, host="elsewhere"))
    said = rf"process 77 on host elsewhere .*if it does not, delete {path}"
    with pytest.raises(HeldError, match=said), held(path, "the row", lambda: False):
        pass
    path.unlink()
    with held(path, "the row"):
        pass


def test_a_lock_that_went_with_its_folder_holds_nobody_back_and_lets_no_two_in(tmp_path: Path) -> None:
    path = tmp_path / "job" / "lock"
    with held(path, "the row"):
        path.unlink()
        path.parent.rmdir()
        with held(path, "the row"), pytest.raises(HeldError), held(path, "the row"):
            pass
    with held(path, "the row"):
        pass


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "lock", "it"):
        1 / 0  # noqa: B018
    with held(tmp_path / "lock", "it"):
        pass
