"""Fixtures. Every tool is pointed into a temporary folder; servers start only for the tests that ask for them."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Before any test imports `flows`, which settles the tools' environment at import.
SANDBOX = Path(tempfile.mkdtemp(prefix="unmask-tests-"))
os.environ["UNMASK_HOME"] = str(SANDBOX / "home")
os.environ["HOME"] = str(SANDBOX)
os.environ["GIT_CONFIG_GLOBAL"] = str(SANDBOX / "gitconfig")
(SANDBOX / "gitconfig").write_text("[user]\nname = tests\nemail = tests@example.org\n[init]\ndefaultBranch = main\n")
for inherited in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "UNMASK_PREFECT_PORT", "UNMASK_MLFLOW_PORT"):
    os.environ.pop(inherited, None)
# What commands in a clone inherit: not what `flows`, once imported here, settles for this process.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "UNMASK_HOME"}
COLLECTED_AFTER = gc.get_threshold()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption("--kills", type=int, default=1, help="runs of each kind of training that are killed")
    parser.addoption("--reliability", type=Path, help="write what was tried, how often and what was lost to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TRIED] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: one process is busy with it while others do the rest."""
    items.sort(key=lambda item: not uses_served(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole files, and all files that look at the pipeline's run to one process: it runs once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "served" if uses_served(nodeid) else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


@functools.cache
def _text(file: str) -> str:
    return (ROOT / file).read_text()


def uses_served(nodeid: str) -> bool:
    return "served: Clone" in _text(nodeid.split("::")[0])


def pytest_collection_finish() -> None:
    # `flows`, once imported, collects seldom: what a test leaves open would show in another test, or after the last.
    gc.set_threshold(*COLLECTED_AFTER)


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(SANDBOX, ignore_errors=True)
    file, tried = session.config.getoption("--reliability"), Counter[tuple[str, str]]()
    for what, times, outcome in session.config.stash[TRIED]:
        tried[what, outcome] += times
    if file and tried and not session.testsfailed:
        text = file.read_text()
        lines = sorted((what, times, outcome) for (what, outcome), times in tried.items())
        table = "".join(f"| {what} | {times:,} | {outcome} |\n" for what, times, outcome in lines)
        head = text[: text.index("| what was tried")]
        file.write_text(f"{head}| what was tried | times | what came of it |\n|---|---|---|\n{table}")


Tried = Callable[[str, int, str], None]
TRIED = pytest.StashKey[list[tuple[str, int, str]]]()


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Tried:
    """Note a fault that was tried, how many times, and what came of it, for docs/reliability.md."""
    return lambda what, times, outcome: request.config.stash[TRIED].append((what, times, outcome))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over threads differ in their last bits with the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small pack, made anew for each file of tests."""
    from core_pieces import tiny_pack

    return tiny_pack(tmp_path_factory.mktemp("packs") / "tiny")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


Command = Callable[..., "subprocess.CompletedProcess[str]"]


class Clone:
    """A clone of the project with rows that run in seconds, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **ENVIRONMENT,
            "HOME": str(folder.parent),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "UNMASK_PREFECT_PORT": str(free_port()),
            "UNMASK_MLFLOW_PORT": str(free_port()),
            "COLUMNS": "200",
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command in the clone; gives its output, errors included."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=900)
        assert (process.returncode != 0) == fails, output
        return output

    def unmask(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", "flows.cli", *arguments, fails=fails)

    def dvc(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, fails=fails)

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        """Replace texts in a file; each has to be there."""
        path = self.folder / name
        text = path.read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new)
        path.write_text(text)


# Rows have the names of the demo's, not their sizes.
SMALL = {
    "params/data.yaml": """\
data:
  scenes:
    source: {name: scenes, size_px: [32, 32], train: 256, validation: 64, test: 64, several: 0.2, seed: 0}
""",
    "params/targets.yaml": """\
targets:
  codes:
    data: scenes
    tokenizer: {name: dvae_small, codes: 16, layers: 2, width: 8, code_width: 8, blocks: 0}
    optim: {lr: 3.0e-3, batch: 32, epochs: 2}
    least_perplexity: 1.0
""",
    # The sections in the order of the real file, where new rows are appended.
    "params/pretrain.yaml": """\
pretrain_fitted:
  tokens:
    data: scenes
    encoder: {name: vit, patch_px: 4, width: 32, depth: 1, heads: 2, positions: relative}
    mask: {name: block_wise, ratio: 0.4, least: 4}
    fill: mask_token
    head: linear
    target: {name: tokens, fitted: codes}
    loss: cross_entropy
    optim: {lr: 1.0e-3, batch: 32, epochs: 1}
pretrain:
  simmim_vit:
    data: scenes
    encoder: {name: vit, patch_px: 4, width: 32, depth: 2, heads: 2, positions: sincos}
    mask: {name: random, ratio: 0.6, unit_px: 4}
    fill: mask_token
    head: linear
    target: pixels
    loss: l1
    optim: {lr: 1.0e-3, batch: 32, epochs: 8, clip: 5.0}
    checkpoint_minutes: 0.0001
""",
    "params/downstream.yaml": """\
supervised: {}
continued:
  neighbours:
    task: {name: knn, k: 5}
    data: scenes
    init: scratch_2000
    labels: 100
    seeds: [0, 1]
baselines:
  segment_scratch:
    task: {name: segment, head: linear}
    data: scenes
    init: scratch
    encoder: &small {name: vit, patch_px: 4, width: 32, depth: 2, heads: 2, positions: sincos}
    labels: 50
    lr_grid: [1.0e-3]
    seeds: [0, 1]
    optim: {batch: 25, epochs: 1}
  detect_scratch:
    task: {name: detect, detector: {name: faster_rcnn, width: 32}, neck: {name: simple_pyramid, width: 32}}
    data: scenes
    init: scratch
    encoder: *small
    labels: 50
    lr_grid: [1.0e-3]
    seeds: [0]
    optim: {batch: 25, epochs: 1}
  scratch_2000:
    task: {name: classify, smoothing: 0.1}
    data: scenes
    init: scratch
    encoder: {name: vit, patch_px: 4, width: 32, depth: 2, heads: 2, positions: sincos}
    labels: 100
    lr_grid: [1.0e-3, 3.0e-3]
    seeds: [0, 1]
    optim: {batch: 25, epochs: 2, layer_decay: 0.75}
downstream:
  simmim_vit_2000:
    task: {name: classify, smoothing: 0.1}
    data: scenes
    init: simmim_vit
    labels: 100
    lr_grid: [1.0e-3, 3.0e-3]
    seeds: [0, 1]
    optim: {batch: 25, epochs: 2, layer_decay: 0.75}
""",
    "params/ablations.yaml": """\
ablations_fitted:
  targets:
    data: scenes
    base: simmim_vit
    change: {optim.epochs: 1}
    points:
      pixels, raw: {target: pixels}
      tokens: {target: {name: tokens, fitted: codes}, loss: cross_entropy}
    seeds: [0]
    judges: {simmim_vit_2000: {lr_grid: [1.0e-3]}}
ablations:
  mask_ratio:
    data: scenes
    base: simmim_vit
    change: {optim.epochs: 2}
    grid: {mask.ratio: [0.3, 0.6, 0.9]}
    seeds: [0, 1]
    judges: {simmim_vit_2000: {lr_grid: [1.0e-3]}}
""",
    "params/search.yaml": """\
search_fitted: {}
search:
  recipe:
    data: scenes
    base: simmim_vit
    change: {optim.epochs: 2}
    judge: {simmim_vit_2000: {lr_grid: [1.0e-3]}}
    space:
      mask.ratio: {low: 0.3, high: 0.9, step: 0.1}
      head: [linear, mlp]
    sampler: {name: random}
    pruner: {name: asha, reduction: 2, labels: 64, evaluations: 2}
    trials: 4
    budget_device_hours: 1.0
    trial_seeds: [0, 3]
    seeds: [1, 2]
    warm_start: [mask_ratio]
""",
}


def make_clone(folder: Path) -> Clone:
    """Copy the project as git would give it, with small rows, and commit it there."""
    tracked = (
        "flows",
        "mim_core",
        "params/recipes.yaml",
        "dvc.yaml",
        "data.dvc",
        "prefect.yaml",
        ".dvc/config",
        ".dvc/.gitignore",
        ".dvcignore",
        ".gitignore",
    )
    for name in tracked:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for name, text in SMALL.items():
        (folder / name).write_text(text)
    clone = Clone(folder)
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "Begin")):
        clone.run("git", *command)
    return clone


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Line:
    """A way to a server's port that can be cut, as the server's death would."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.sockets = int(self.listener.getsockname()[1]), [self.listener]

        def accept() -> None:
            with contextlib.suppress(OSError):  # cut
                while True:
                    near, _ = self.listener.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    self.sockets += [near, far]
                    for one, other in ((near, far), (far, near)):
                        threading.Thread(target=pass_on, args=(one, other), daemon=True).start()

        def pass_on(one: socket.socket, other: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := one.recv(1 << 16):
                    other.sendall(data)
                other.shutdown(socket.SHUT_WR)

        threading.Thread(target=accept, daemon=True).start()

    def cut(self) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def recorded(clone: Clone, folder: Path) -> str:
    """MLflow's id of the run that a job's folder, or its stage's, names."""
    from mlflow.tracking import MlflowClient

    name = json.loads((folder / "mlflow.json").read_text())["run"]
    client = MlflowClient(f"http://127.0.0.1:{clone.environment['UNMASK_MLFLOW_PORT']}")
    (run,) = client.search_runs(["1"], f"tags.`unmask.id` = '{name}'")
    return str(run.info.run_id)


def prefect(clone: Clone, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{clone.environment['UNMASK_PREFECT_PORT']}/api{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone, without servers."""
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A clone whose pipeline has run with both servers up, shared by the tests that look at what came out.

    `output` is what the demo said, `rest` what DVC said as it ran the other rows.
    """
    there = make_clone(tmp_path_factory.mktemp("served") / "clone")
    try:
        there.output = there.unmask("demo")  # type: ignore[attr-defined]
        there.rest = there.dvc("repro")  # type: ignore[attr-defined]
        yield there
    finally:
        there.unmask("down")
