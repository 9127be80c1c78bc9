"""Tell by its files in which form a dataset is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100, STL10

from mim_core.data.csv_table import header
from mim_core.data.folder import visible


def recognise(root: Path) -> dict[str, str]:
    """The forms of SOURCES that the files in `root` have, each with what shows it; a plain folder shows nothing."""
    return {name: why for name, shows in FORMATS.items() if (why := shows(root))}


def locate(root: Path) -> tuple[Path, dict[str, str]]:
    """Go down from `root` through folders that hold nothing but one folder, until a form is recognised."""
    at = root
    while not (found := recognise(at)):
        inside = [at / name for name in visible([path.name for path in at.iterdir()])]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].is_symlink():
            break
        at = inside[0]
    return at, found


def _coco(root: Path) -> str:
    names = [path.relative_to(root).as_posix() for path in root.glob("annotations/instances_*.json")]
    names += [path.relative_to(root).as_posix() for path in root.glob("*/_annotations.coco.json")]
    return ", ".join(sorted(names))


def _voc(root: Path) -> str:
    folders = ("JPEGImages", "Annotations", "ImageSets")
    return ", ".join(folders) if all((root / name).is_dir() for name in folders) else ""


def _ade20k(root: Path) -> str:
    names = ("objectInfo150.txt", "images/training", "annotations/training")
    return ", ".join(names) if all((root / name).exists() for name in names) else ""


def _inaturalist(root: Path) -> str:
    return ", ".join(sorted(path.name for path in root.glob("train20[0-9][0-9].json")))


def _csv(root: Path) -> str:
    tables = [path for path in sorted(root.glob("*.csv")) if not path.name.startswith(".")]
    named = [path.name for path in tables if "file" in header(path)]
    return f"{named[0]} with a column `file`" if len(tables) == len(named) == 1 else ""


def _one_folder(name: str) -> Callable[[Path], str]:
    return lambda root: f"{name}/" if (root / name).is_dir() else ""


FORMATS: dict[str, Callable[[Path], str]] = {
    "coco": _coco,
    "voc": _voc,
    "ade20k": _ade20k,
    "inaturalist": _inaturalist,
    "csv": _csv,
    "cifar10": _one_folder(CIFAR10.base_folder),
    "cifar100": _one_folder(CIFAR100.base_folder),
    "stl10": _one_folder(STL10.base_folder),
}
