"""The README's own lines run as they stand, and what it says of the project is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Clone
from PIL import Image

README = (ROOT / "README.md").read_text()


def blocks(section: str) -> list[str]:
    """The shell blocks of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def test_it_is_short_and_names_files_that_exist() -> None:
    assert len(README.splitlines()) < 200
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    layout = README.split("## Where things live")[1].split("```")[1]
    for folder in ("params", "mim_core", "flows", "tests"):
        assert f"{folder}/" in layout
        assert (ROOT / folder).is_dir()


@pytest.mark.orchestration
def test_the_lines_for_ones_own_images_run(clone: Clone) -> None:
    folder = clone.folder.parent / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(80):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{index}.png")
    clone.unmask("data", "restore")
    lines = "\n".join(blocks("Your own images"))
    assert "unmask data add /path/to/images" in lines
    script = Path(clone.folder.parent / "lines.sh")
    # The tests' environment is active already, and the folder is the one made here.
    script.write_text(
        'set -e\nunmask() { python -m flows.cli "$@"; }\n'
        + lines.replace("source .venv/bin/activate\n", "").replace("/path/to/images", str(folder))
    )
    clone.run("bash", str(script))
    made = clone.folder / "runs" / "pretrain" / "mine_simmim"
    for name in ("encoder.safetensors", "gallery.png", "curve.csv", "manifest.json"):
        assert (made / name).stat().st_size > 0
    assert json.loads((made / "manifest.json").read_text())["data"]["name"] == "mine"
