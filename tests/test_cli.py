"""The command line: help loads no tool, wrong arguments are told shortly, servers start once and stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, Clone

from flows import workspace
from flows.cli import main
from mim_core import params
from mim_core.checkpoint import read_weights
from mim_core.spec import check

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
    for command in ("demo", "doctor", "up", "down", "ui", "data", "import", "export", "recipe"):
        assert command in done.stdout


def test_outside_a_workspace_a_command_says_where_to_go(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "up"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1
    assert "run unmask inside its repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_prefect_starts_without_a_word_where_nothing_was_run_yet(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("")
    command = [sys.executable, "-W", "error::UserWarning", "-c", "import flows, prefect"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "UNMASK_"))}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / ".unmask" / "prefect").is_dir()


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


Told = Callable[..., str]


@pytest.fixture
def told(clone: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Told]:
    """Runs commands inside the clone, but in this process, which has imported torch; gives what each said."""
    monkeypatch.chdir(clone.folder)
    monkeypatch.setenv("UNMASK_HOME", str(clone.folder / ".unmask"))
    workspace.root.cache_clear()

    def run(*arguments: str, fails: bool = False) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert (ended.value.code != 0) == fails, ended.value.code
        return str(ended.value.code) if fails else capsys.readouterr().out

    yield run
    workspace.root.cache_clear()


def test_every_recipe_is_listed_with_its_rates(told: Told) -> None:
    known = params.load_recipes(ROOT / "params")
    lines = {line.split()[0]: line for line in told("recipe").splitlines()}
    assert list(lines) == [*known.pretrained(), *known.judged()]
    assert "segment (upernet) on ade20k_512, from beit_b16_800; 126.7 epochs" in lines["beit_b16_ade20k_upernet"]
    assert "random (0.75) x drop x vit (768, 12) x transformer_decoder x pixels (patch) x l2" in lines["mae_b16"]
    # 1.5e-4 for 256 images, at a batch of 4,096.
    assert "1600 epochs, batch 4,096, base lr 0.00015 for 256 images, lr 0.0024 at batch 4,096" in lines["mae_b16"]


@pytest.mark.parametrize("name", ["mae_l16", "context_encoder_inpainting", "beit_b16_800"])
def test_a_printed_recipe_is_the_row_itself(name: str, told: Told) -> None:
    known = params.load_recipes(ROOT / "params")
    printed = told("recipe", name, "--data", "scenes")
    assert all(line.startswith("  ") for line in printed.splitlines())
    row = known.pretrained()[name]
    wanted = {**row.model_dump(mode="json"), "data": "scenes"}
    (found,) = yaml.safe_load(printed).values()
    assert check(params.PretrainRow, found, name).model_dump(mode="json") == wanted
    assert ("belongs below `pretrain_fitted:`" in printed) == bool(row.fitted)
    if row.fitted:
        block = "".join(f"{line[4:]}\n" for line in printed.splitlines() if line.startswith("  #   "))
        (found,) = yaml.safe_load(block).values()
        wanted = {**known.targets[row.fitted].model_dump(mode="json"), "data": "scenes"}
        assert check(params.TargetRow, found, row.fitted).model_dump(mode="json") == wanted


@pytest.mark.parametrize(
    ("name", "section"), [("mae_b16_coco", "downstream"), ("deit_b16_ade20k_upernet", "supervised")]
)
def test_a_printed_recipe_of_a_task_is_the_row_itself(name: str, section: str, told: Told) -> None:
    row = getattr(params.load_recipes(ROOT / "params"), section)[name]
    printed = told("recipe", name, "--data", "scenes")
    assert f"belongs below `{section}:` in params/downstream.yaml" in printed
    (found,) = yaml.safe_load(printed).values()
    wanted = {**row.model_dump(mode="json"), "data": "scenes"}
    assert check(params.DownstreamRow, found, name).model_dump(mode="json") == wanted


def test_a_recipe_says_what_it_comes_to_on_ones_own_images(told: Told) -> None:
    meta = workspace.pack_folder("scenes") / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"counts": {"train": 40960}}))
    said = told("recipe", "mae_b16", "--data", "scenes")
    # 40,960 images are 10 batches an epoch.
    assert "16,000 steps with the 40,960 training images of scenes, 400 of them warm-up" in said
    assert "images of 224 x 224 px; scenes has 32 x 32 px" in said
    path = workspace.params_folder() / "pretrain.yaml"
    path.write_text(path.read_text() + said)
    assert "mae_b16" in told("check")
    assert "did you mean 'mae_b16'?" in told("recipe", "mae_b61", fails=True)
    assert "did you mean 'scenes'?" in told("recipe", "mae_b16", "--data", "scense", fails=True)


def test_published_weights_come_in_and_faults_say_what_to_do(told: Told, tmp_path: Path) -> None:
    shape = {"img_size": (32, 48), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    file = tmp_path / "tiny.pth"
    torch.save(timm.create_model("vit_base_patch16_224", **shape).state_dict(), file)
    said = told("import", str(file), "--heads", "2", "--size", "32x48")
    for words in ("timm's vit", "heads 2", "parameters  30,", "features on", "differ by 0", "encoder.safetensors"):
        assert words in said
    weights, about = read_weights(tmp_path / "tiny_imported" / "encoder.safetensors")
    assert about["size"] == [32, 48]
    assert len(weights) > 20
    told("import", str(file), "--heads", "2", "--size", "32x48", "-o", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "encoder.safetensors").exists()
    assert "give heads" in told("import", str(file), fails=True)
    file.write_bytes(b"no weights")
    assert f"{file}: found" in told("import", str(file), fails=True)
    assert "nowhere.pth: there is no such file" in told("import", "nowhere.pth", fails=True)


def test_an_export_of_what_has_not_run_says_so(told: Told) -> None:
    assert "run `dvc repro pretrain@simmim_vit`" in told("export", "simmim_vit", fails=True)
    assert "run `dvc repro baseline@scratch_2000`" in told("export", "scratch_2000", fails=True)
    assert "did you mean 'simmim_vit'?" in told("export", "simmim_vti", fails=True)


@pytest.mark.orchestration
@pytest.mark.parametrize("row", ["simmim_vit", "tokens", "scratch_2000"])
def test_the_line_that_export_prints_builds_the_encoder(row: str, served: Clone) -> None:
    said = served.unmask("export", row, "-o", str(served.folder.parent / "exported" / row))
    assert "timm's differ from ours by" in said
    program = said[said.index("import timm") :] + "\nprint(type(model).__name__, model.num_features)"
    assert served.run(sys.executable, "-c", program).split()[-1] == "32"
