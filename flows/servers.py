"""The Prefect and MLflow servers on this machine, and the environment in which our commands run the tools.

All state lies in the workspace's `.unmask/`, every server binds 127.0.0.1, and all telemetry is off. An address that is
already set in the environment (`PREFECT_API_URL`, `MLFLOW_TRACKING_URI`) wins: a team's shared servers are used
instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows import janitor, limits, workspace
from flows.workers import slots, wait_until

HOST = "127.0.0.1"
DEFAULT_PORTS = {"prefect": 4200, "mlflow": 5000}
HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
START_SECONDS = 180
POOL = "unmask"
"""The work pool that the deployments of prefect.yaml are run from."""


def settings() -> dict[str, str]:
    """Environment that keeps the tools' state in the workspace and their telemetry off."""
    home = workspace.home()
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_SECONDS),
        # Its pages have the logs; what a person has to read at the terminal, our commands say.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        # The default of 5 tries takes minutes at the end of a flow whose server has died.
        "PREFECT_CLIENT_MAX_RETRIES": "3",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # A try again of what was only slow could do it twice: `flows.sender` tries again in a way that cannot.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        # Its job runners take 2 GB and serve nothing that is used here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "DVC_NO_ANALYTICS": "1",
    }


def apply() -> None:
    """Put the settings and the running servers' addresses into this process's environment.

    Without servers MLflow writes to its database directly and Prefect starts a temporary server of its own.
    """
    for key, value in settings().items():
        os.environ.setdefault(key, value)
    with contextlib.suppress(OSError):  # Prefect makes its folder in this one, and warns where it cannot
        workspace.home().mkdir(parents=True, exist_ok=True)
    ports = running()
    if "prefect" in ports:
        os.environ.setdefault("PREFECT_API_URL", f"{address('prefect', ports)}/api")
    os.environ.setdefault("MLFLOW_TRACKING_URI", address("mlflow", ports) if "mlflow" in ports else database())


def database() -> str:
    """MLflow's database as an address that does not depend on the current folder."""
    return f"sqlite:///{workspace.home() / 'mlflow' / 'mlflow.db'}"


def artifacts() -> str:
    """Where MLflow's artifacts lie; written directly, by runs with and without a server."""
    return (workspace.home() / "mlflow" / "artifacts").as_uri()


def address(name: str, ports: dict[str, int]) -> str:
    return f"http://{HOST}:{ports[name]}"


def compare_page(runs: Sequence[str]) -> str | None:
    """MLflow's page that compares runs; None where the server does not run or does not know them."""
    ports = running()
    if "mlflow" not in ports or not runs:
        return None
    base = address("mlflow", ports)
    try:
        with urllib.request.urlopen(f"{base}/api/2.0/mlflow/runs/get?run_id={runs[0]}", timeout=10) as answer:
            experiment = json.load(answer)["run"]["info"]["experiment_id"]
    except (OSError, KeyError, json.JSONDecodeError):
        return None
    ids = json.dumps(list(runs), separators=(",", ":"))
    return f"{base}/#/compare-runs?runs={urllib.parse.quote(ids)}&experiments=[%22{experiment}%22]"


def healthy(name: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{HEALTH[name]}", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def running() -> dict[str, int]:
    """Ports of our own servers that answer, by name."""
    return {
        name: said["port"] for name, said in _recorded().items() if _alive(said["pid"]) and healthy(name, said["port"])
    }


def port_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def wanted_ports() -> dict[str, int]:
    """Ports to use: `UNMASK_PREFECT_PORT` and `UNMASK_MLFLOW_PORT`, else the tools' usual ones. Raises UserError."""
    ports = {}
    for name, default in DEFAULT_PORTS.items():
        text = os.environ.get(f"UNMASK_{name.upper()}_PORT", str(default))
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise workspace.UserError(f"UNMASK_{name.upper()}_PORT: found '{text}'; it must be a port from 1 to 65535")
        ports[name] = int(text)
    return ports


def blocked_ports() -> list[str]:
    """Say for each wanted port that another program holds what to do about it."""
    ours = running()
    return [
        f"port {port} for {name} is in use by another program; stop it, or choose another port: "
        f"UNMASK_{name.upper()}_PORT={port + 1} unmask up"
        for name, port in wanted_ports().items()
        if name not in ours and port_taken(port)
    ]


def up(wait: bool = True, say: Callable[[str], None] = print) -> dict[str, int]:
    """Start the servers that do not run yet; gives the ports. Raises UserError where a port is taken."""
    ours = running()
    faults = blocked_ports()
    if faults:
        raise workspace.UserError("\n".join(faults))
    ports = {**wanted_ports(), **ours}
    for name in DEFAULT_PORTS:
        if name not in ours:
            _stop(name)  # a process of ours that hangs, if any
            _record(name, _start(name, ports[name]), ports[name])
    if wait:
        await_up(ports)
        for name in DEFAULT_PORTS:
            say(f"{name:8} {address(name, ports)}{'' if name not in ours else '  (was up)'}")
    return ports


def await_up(ports: dict[str, int]) -> None:
    """Wait until the servers answer, and put in place what flows need of them; raises UserError with the log where one
    does not answer."""
    for name, port in ports.items():
        started = _recorded()[name]["pid"]

        def settled(name: str = name, port: int = port, pid: int = started) -> bool:
            return healthy(name, port) or not _alive(pid)

        wait_until(settled, START_SECONDS)
        if not healthy(name, port):
            log = _log(name)
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["(empty)"]
            raise workspace.UserError(f"{name}: did not come up on port {port}; the log {log} ends: {last[0]}")
    api = f"{address('prefect', ports)}/api"
    # What is there already answers 409: a limit that someone has changed stays as it is.
    _create(f"{api}/v2/concurrency_limits/", {"name": limits.NAME, "limit": slots()})
    _create(f"{api}/work_pools/", {"name": POOL, "type": "process"})
    if janitor.left():
        os.environ.setdefault("PREFECT_API_URL", api)
        janitor.sweep()


def _create(address: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise workspace.UserError(f"{address}: the Prefect server answered {error.code}; see its log") from None


def down(say: Callable[[str], None] = print) -> None:
    """Stop our servers by their pids."""
    for name in DEFAULT_PORTS:
        say(f"{name:8} {'stopped' if _stop(name) else 'was not running'}")


def _start(name: str, port: int) -> int:
    home = workspace.home()
    environment = {**os.environ, **settings()}
    for key in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        environment.pop(key, None)
    if name == "prefect":
        # Prefect's pages take the address of its API from these two, whatever `--port` says.
        environment |= {"PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": str(port)}
        environment |= {"PREFECT_API_URL": f"http://{HOST}:{port}/api"}
        # Leases in memory would be lost with the server, and the slots they hold never be given back.
        environment |= {
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"
        }
        environment |= {"PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "5"}
        command = ["flows.prefect_server", str(port)]
    else:
        (home / "mlflow").mkdir(parents=True, exist_ok=True)
        command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", database(), "--default-artifact-root", artifacts(), "--no-serve-artifacts"]
    log = _log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=home,
            start_new_session=True,
        )
    return process.pid


def _stop(name: str) -> bool:
    recorded = _recorded()
    said = recorded.pop(name, None)
    _state().parent.mkdir(parents=True, exist_ok=True)
    workspace.write_json(_state(), recorded)
    if not said or not _alive(said["pid"]):
        return False
    # The server leads a session of its own, so its group holds its helpers and nothing else.
    os.killpg(said["pid"], signal.SIGTERM)
    if not wait_until(lambda: not _alive(said["pid"]), 15):
        os.killpg(said["pid"], signal.SIGKILL)
        wait_until(lambda: not _alive(said["pid"]), 5)
    return True


def _alive(pid: int) -> bool:
    """Whether a process runs and is one of ours: pids are used again after a restart of the machine."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a server that we started and that ended has to be collected
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        done = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True)
        command = done.stdout
    return b"prefect" in command or b"mlflow" in command


def _state() -> Path:
    return workspace.home() / "servers.json"


def _recorded() -> dict[str, dict[str, int]]:
    try:
        return dict(json.loads(_state().read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _record(name: str, pid: int, port: int) -> None:
    workspace.write_json(_state(), {**_recorded(), name: {"pid": pid, "port": port}})


def _log(name: str) -> Path:
    return workspace.home() / "logs" / f"{name}.log"
