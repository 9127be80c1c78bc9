"""What a run's weights follow from, and what changes no bit of them; what does is measured by benchmarks/spread.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_pieces import OPTIM, classify_row, pretrain_row, target_row

from mim_core.data.order import loader
from mim_core.data.pack import Pack
from mim_core.jobs import downstream, fit_target, pretrain
from mim_core.jobs import run as jobs_run

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {**OPTIM, "epochs": 2}


def numbers(file: Path) -> bytes:
    """The tensors' bytes of a safetensors file: its header also has the row, which says how often checkpoints come."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def weights(kind: str, pack: Pack, folder: Path, **changes: Any) -> bytes:
    """Run a job of a kind; gives its weights."""
    if kind == "pretrain":
        pretrain(pretrain_row(optim=SHORT, **changes), pack, folder, seed=1)
        return numbers(folder / "model.safetensors")
    if kind == "fit_target":
        fit_target(target_row(optim=SHORT, **changes), pack, folder, seed=1)
        return numbers(folder / "tokenizer.safetensors")
    optim = {key: value for key, value in SHORT.items() if key != "lr"}
    row = classify_row(optim={**optim, "ema": 0.9}, **changes)
    downstream(row, pack, folder, 1, 1.0e-3, None, True)
    return numbers(folder / "model.safetensors")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, pack: Pack) -> dict[str, bytes]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("usual")
    return {kind: weights(kind, pack, folder / kind) for kind in KINDS}


KINDS = ("pretrain", "fit_target", "downstream")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_again_gives_the_same_weights(
    tmp_path: Path, pack: Pack, usual: dict[str, bytes], kind: str
) -> None:
    torch.manual_seed(99)
    assert weights(kind, pack, tmp_path) == usual[kind]


@pytest.mark.parametrize("minutes", [1.0e-9, 1.0e9], ids=["at each report", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_checkpoint_interval_gives_the_same_weights(
    tmp_path: Path, pack: Pack, usual: dict[str, bytes], kind: str, minutes: float
) -> None:
    assert weights(kind, pack, tmp_path, checkpoint_minutes=minutes) == usual[kind]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # of more than there are cores
@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_loader_workers_gives_the_same_weights(
    tmp_path: Path, pack: Pack, usual: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(jobs_run, "loader", lambda fetch, order, *_: loader(fetch, order, workers))
    for kind in KINDS if workers == 1 else ("pretrain",):
        assert weights(kind, pack, tmp_path / kind) == usual[kind], kind


class Threads:
    """A loader whose batches are made with a number of threads, and torch's own number goes on for the rest."""

    def __init__(self, inner: Any, count: int) -> None:
        self.inner, self.count = inner, count

    def __call__(self, addresses: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(self.count)
        try:
            return self.inner(addresses)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 4])
def test_another_thread_count_of_the_loader_gives_the_same_weights(
    tmp_path: Path, pack: Pack, usual: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(jobs_run, "loader", lambda fetch, order, *_: loader(Threads(fetch, count), order))
    assert weights("pretrain", pack, tmp_path) == usual["pretrain"]


def test_a_seed_changes_the_weights(tmp_path: Path, pack: Pack, usual: dict[str, bytes]) -> None:
    """Equality means something: another seed gives others."""
    pretrain(pretrain_row(optim=SHORT), pack, tmp_path, seed=2)
    assert numbers(tmp_path / "model.safetensors") != usual["pretrain"]
