"""A search's study in a real PostgreSQL server, which several machines can share."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from test_search import course, measure, run

from flows.study import Course
from flows.workers import wait_until

PROGRAMS = {name: shutil.which(name) for name in ("initdb", "postgres")}
# The server refuses to run as root: there it runs as the user that its package makes.
USER = "postgres" if os.getuid() == 0 else None


def absent() -> bool:
    if USER and USER not in {one.pw_name for one in pwd.getpwall()}:
        return True
    return not all(PROGRAMS.values())


pytestmark = pytest.mark.skipif(absent(), reason="no PostgreSQL server here (apt-get install postgresql)")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an empty database."""
    folder = Path(tempfile.mkdtemp(prefix="unmask-postgres-"))
    given: dict[str, Any] = {"user": USER, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, "cwd": folder}
    try:
        if USER:
            shutil.chown(folder, USER)
        data, at = folder / "data", free_port()
        subprocess.run(
            [PROGRAMS["initdb"], "-D", data, "-U", "me", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            **given,
        )
        where = ["-D", data, "-h", "127.0.0.1", "-p", str(at), "-k", folder]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([PROGRAMS["postgres"], *where], stdout=log, stderr=log, **given)
            try:
                ready = "database system is ready"
                assert wait_until(lambda: ready in (folder / "log").read_text(), 60), (folder / "log").read_text()
                yield f"postgresql://me@127.0.0.1:{at}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # a stop that waits for no client
                process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def opened() -> Iterator[Callable[..., Course]]:
    """Opens studies, and closes their connections in the end: Optuna leaves that to the end of the process."""
    there: list[Course] = []

    def one(*given: Any, **changes: Any) -> Course:
        there.append(course(*given, **changes))
        return there[-1]

    yield one
    for each in there:
        each.study._storage._backend.engine.dispose()  # type: ignore[attr-defined]


def test_a_study_there_is_the_same_as_in_a_file(server: str, opened: Callable[..., Course], tmp_path: Path) -> None:
    in_a_file = run(opened(tmp_path / "file", trials=4))
    there = run(opened(tmp_path / "database", storage=server, trials=4))
    assert len(there) == 4
    assert there == in_a_file
    assert not list((tmp_path / "database").glob("*.db"))


def test_two_machines_share_its_trials(server: str, opened: Callable[..., Course], tmp_path: Path) -> None:
    given = {"storage": server, "trials": 6, "seed": 1}
    one, other = (opened(tmp_path / name, name="shared", **given) for name in ("one", "other"))
    first = one.next()
    assert first
    first.keep(owner={"host": "elsewhere", "pid": 1, "born": 0.0})
    second = other.next()
    assert second
    assert {first.place, second.place} == {0, 1}
    measure(one, first)
    measure(other, second)
    run(one)
    assert [trial["place"] for trial in other.report()] == list(range(6))
    assert other.report() == one.report()
