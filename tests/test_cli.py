"""The command line: help loads no tool, wrong arguments are told shortly, servers start once and stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Clone

PROBE = """
import sys
from flows.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "timm", "prefect", "mlflow", "dvc", "pandas", "matplotlib", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_loads_none_of_the_tools() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "doctor", "up", "down", "ui", "data"):
        assert command in done.stdout


def test_outside_a_workspace_a_command_says_where_to_go(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "up"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1
    assert "run unmask inside its repository" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.orchestration
def test_servers_are_found_up_and_are_stopped(served: Clone) -> None:
    assert served.unmask("up").count("(was up)") == 2
    said = served.unmask("ui", "--no-open")
    for name in ("PREFECT", "MLFLOW"):
        assert f"http://127.0.0.1:{served.environment[f'UNMASK_{name}_PORT']}" in said
    said = served.unmask("doctor")
    assert "up at http://127.0.0.1" in said


@pytest.mark.orchestration
def test_down_without_servers_and_ui_without_servers_say_so(clone: Clone) -> None:
    assert clone.unmask("down").count("was not running") == 2
    assert "start them with `unmask up`" in clone.unmask("ui", fails=True)
