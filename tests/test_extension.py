"""What a new method costs its author: a target is one function, its line in the table, and a row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from core_pieces import tiny_pack

ROOT = Path(__file__).parents[1]
FUNCTION = '''

def brightness(grid: Grid, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """The mean colour of each position, as numbers."""
    return Pixels(grid, mean, std, cell_px=grid.patch_px)


TARGETS'''
ROW = """
  brightness:
    data: scenes
    encoder: {name: vit, patch_px: 4, width: 32, depth: 1, heads: 2, positions: sincos}
    mask: {name: random, ratio: 0.6, unit_px: 4}
    fill: mask_token
    head: linear
    target: brightness
    loss: l1
    optim: {lr: 1.0e-3, batch: 16, epochs: 2}
"""
TRAIN = """
import json, sys
from pathlib import Path
from mim_core.data.pack import open_pack
from mim_core.jobs import pretrain
from mim_core.params import load

row = load(Path("params")).pretrain["brightness"]
result = pretrain(row, open_pack(Path(sys.argv[1])), Path(sys.argv[2]), seed=0)
print(json.dumps({key: result[key] for key in ("loss", "hole_psnr", "steps")}))
"""


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_new_target_is_a_function_a_line_and_a_row(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("mim_core", "params"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = files(copy)

    table = copy / "mim_core" / "targets" / "__init__.py"
    text = table.read_text().replace("\nTARGETS", FUNCTION, 1)
    text = text.replace('"pixels": Pixels,', '"pixels": Pixels,\n    "brightness": brightness,')
    table.write_text(text.replace("\n\nfrom mim_core", "\n\nfrom mim_core.grid import Grid\nfrom mim_core", 1))
    with (copy / "params" / "pretrain.yaml").open("a") as rows:
        rows.write(ROW)

    pack = tiny_pack(tmp_path / "pack", size=(32, 32))
    command = [sys.executable, "-c", TRAIN, str(pack.folder), str(tmp_path / "job")]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 8
    assert result["hole_psnr"] > 5
    assert (tmp_path / "job" / "recovery.png").exists()

    after = files(copy)
    changed = sorted(name for name in after if before.get(name) != after[name])
    assert changed == ["mim_core/targets/__init__.py", "params/pretrain.yaml"]
    assert set(before) <= set(after)
