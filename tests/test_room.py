"""What the doctor says of the disk is what files come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from core_pieces import CLASSIFY, OPTIM, PRETRAIN, TARGET, classify_row, pretrain_row, target_row, tiny_pack

from flows import doctor, room, rows, workspace
from mim_core import checkpoint
from mim_core.jobs import downstream, fit_target, pretrain
from mim_core.params import load
from mim_core.params.relations import sizes


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace with small rows."""
    root = tmp_path / "work"
    for name, text in SMALL.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.setenv("UNMASK_HOME", str(root / ".unmask"))
    monkeypatch.chdir(root)
    workspace.root.cache_clear()
    yield root
    workspace.root.cache_clear()


def params(folder: Path, **sections: Any) -> Any:
    """The small rows, with the rows of this test in place of others of their section and name."""
    (folder / "params").mkdir()
    for name, text in SMALL.items():
        content = yaml.safe_load(text)
        for section, named in sections.items():
            if section in content:
                content[section] |= named
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return load(folder / "params")


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """Within a tenth, or the headers of files: of adamw, without and with an average, and of a tokenizer."""
    pack = tiny_pack(tmp_path / "pack", size=(32, 32))
    short, scenes = {**OPTIM, "epochs": 0.5}, {"data": "scenes"}
    tune = {key: value for key, value in short.items() if key != "lr"} | {"ema": 0.9}
    one, codes = {**PRETRAIN, **scenes, "optim": short}, {**TARGET, **scenes, "optim": short}
    fresh = {**CLASSIFY, **scenes, "optim": tune}
    told = sizes(params(tmp_path, pretrain={"one": one}, targets={"mine": codes}, baselines={"fresh": fresh}))
    pretrain(pretrain_row(optim=short), pack, tmp_path / "one", seed=0)
    fit_target(target_row(optim=short), pack, tmp_path / "mine", seed=0)
    downstream(classify_row(optim=tune), pack, tmp_path / "fresh", 0, 1.0e-3, None, True)
    for row, file in (("pretrain.one", "model"), ("targets.mine", "tokenizer"), ("baselines.fresh", "model")):
        folder = tmp_path / row.split(".")[1]
        found = checkpoint.latest(folder / "checkpoints")
        assert found
        assert told[row]["weights"] == pytest.approx(
            (folder / f"{file}.safetensors").stat().st_size, rel=0.1, abs=20_000
        )
        assert told[row]["checkpoint"] == pytest.approx(bytes_of(found), rel=0.1, abs=60_000), row


def test_what_is_there_is_not_needed_again_and_what_is_changed_is(project: Path) -> None:
    before = room.needed()
    assert min(before.packs, before.runs, before.checkpoints) > 0
    assert before.packs == 2 * 384 * 32 * 32 * 5
    (project / "packs" / "scenes").mkdir(parents=True)
    source = rows.load()["data"]["scenes"]["source"]
    meta = project / "packs" / "scenes" / "meta.json"
    meta.write_text(json.dumps({"row": {"source": {**source, "train": 999}}}))
    assert room.needed().packs == before.packs, "a pack of another row is written anew"
    meta.write_text(json.dumps({"row": {"source": source}}))
    assert room.needed().packs == 0
    done = project / "runs" / "pretrain" / "simmim_vit"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    assert room.needed().runs < before.runs


def disk(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    usage = shutil.disk_usage("/")._replace(free=int(free))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_the_doctor_compares_it_with_what_is_free(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = room.needed().total
    monkeypatch.setattr(doctor, "DISK_GB", 0.0)
    disk(monkeypatch, need + 1)
    found = doctor._disk(all_rows=True)
    assert not found.mend
    assert f"what all rows still need is {need / 1e9:.1f} GB at most (packs " in found.found
    disk(monkeypatch, need - 1)
    found = doctor._disk(all_rows=True)
    assert "or run fewer rows" in found.mend
    assert not doctor._disk(all_rows=False).mend, "the demo runs few of them"
    (project / "params" / "data.yaml").write_text("data: 3")
    assert not doctor._disk(all_rows=True).mend, "a fault of the rows is told as such"
