"""CIFAR-10, CIFAR-100 (Krizhevsky 2009) and STL-10 (Coates et al. 2011), read from disk by torchvision.

CIFAR's files are pickles, which run code when they are opened, so nothing is opened unless its MD5 is the published
one, which torchvision has. An image's origin is its place in torchvision's order of its training or test set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from torchvision.datasets.utils import check_integrity

from mim_core.data.fit import Fit, place
from mim_core.data.images import Channels
from mim_core.data.pack import SPLITS, Sample, Source
from mim_core.data.splits import Share, digest, published_splits
from mim_core.spec import Pair


def cifar10(
    root: Path,
    *,
    size_px: Pair = (32, 32),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
) -> Source:
    """Read `cifar-10-batches-py/`: 50,000 training and 10,000 test images of 32 x 32 px in 10 classes.

    `validation` is a share of each class's training images by a hash of their pixels. Not used are the batches'
    `filenames` and `batch_label`. Raises ValueError where a file is missing or not the published one.
    """
    return _cifar(root, CIFAR10, size_px, fit, channels, validation)


def cifar100(
    root: Path,
    *,
    size_px: Pair = (32, 32),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
) -> Source:
    """Read `cifar-100-python/`: 50,000 training and 10,000 test images of 32 x 32 px in 100 classes.

    `validation` is a share of each class's training images by a hash of their pixels. Not used are `coarse_labels` with
    their names, `filenames` and `batch_label`. Raises ValueError where a file is missing or not the published one.
    """
    return _cifar(root, CIFAR100, size_px, fit, channels, validation)


def stl10(
    root: Path,
    *,
    size_px: Pair = (96, 96),
    fit: Fit = "cover",
    channels: Channels = "rgb",
    validation: Share = 0.1,
) -> Source:
    """Read `stl10_binary/`: 5,000 training, 8,000 test and 100,000 unlabelled images of 96 x 96 px in 10 classes.

    The unlabelled ones are training images without a label; they take 2.8 GB of memory while they are read.
    `validation` is a share of each class's training images, and of the unlabelled, by a hash of their pixels.
    Not used is fold_indices.txt. Raises ValueError where a file is missing or not the published one.
    """
    _check_files(root, STL10, ())
    names = root / STL10.base_folder / STL10.class_names_file
    if not names.is_file():
        raise ValueError(
            f"{names.relative_to(root)}: the file is missing; the classes' names are there; fetch it again"
        )
    train = STL10(root, "train+unlabeled", download=False)
    test = STL10(root, "test", download=False)
    files = [names, *(root / STL10.base_folder / name for name, _ in STL10.train_list + STL10.test_list)]
    images = (np.asarray(train.data), np.asarray(test.data))
    return _source(images, (train.labels, test.labels), train.classes, files, size_px, fit, channels, validation)


def _cifar(
    root: Path, kind: type[CIFAR10], size: tuple[int, int], fit: Fit, channels: Channels, validation: float
) -> Source:
    meta = (kind.meta["filename"], kind.meta["md5"])
    _check_files(root, kind, (meta,))
    train, test = (kind(root, train=part, download=False) for part in (True, False))
    images = (train.data.transpose(0, 3, 1, 2), test.data.transpose(0, 3, 1, 2))
    files = [root / kind.base_folder / name for name, _ in (*kind.train_list, *kind.test_list, meta)]
    return _source(images, (train.targets, test.targets), train.classes, files, size, fit, channels, validation)


def _check_files(root: Path, kind: Any, more: Sequence[tuple[str, str]]) -> None:
    for name, md5 in (*kind.train_list, *kind.test_list, *more):
        path = root / kind.base_folder / name
        where = path.relative_to(root).as_posix()
        if not path.is_file():
            raise ValueError(f"{where}: the file is missing; it is part of {kind.__name__}; fetch the dataset again")
        if not check_integrity(str(path), md5):
            found = f"found {path.stat().st_size} bytes whose MD5 is not {md5}"
            raise ValueError(f"{where}: {found}, the published file's; it is cut short or another; fetch it again")


def _source(
    images: tuple[np.ndarray, np.ndarray],
    labels: tuple[Sequence[int], Sequence[int]],
    classes: list[str],
    files: list[Path],
    size: tuple[int, int],
    fit: Fit,
    channels: Channels,
    validation: float,
) -> Source:
    """Make the source of training and test images [n, 3, h, w]."""
    numbers = [np.asarray(part).astype(np.int64).tolist() for part in labels]
    worst = max(map(max, numbers))
    assert worst < len(classes), "files whose MD5 is right have labels within the classes"
    kept = {"train": range(len(images[0]))}
    owned = published_splits(kept, lambda index: digest(images[0][index].tobytes()), numbers[0], validation, 0.0)
    owned["test"] = np.arange(len(images[1]))
    placing = place((images[0].shape[2], images[0].shape[3]), size, fit)

    def samples(split: str) -> Iterator[Sample]:
        part = int(split == "test")
        for index in owned[split].tolist():
            planes = images[part][index]
            if channels == "grey":
                planes = np.asarray(Image.fromarray(planes.transpose(1, 2, 0)).convert("L"))[None]
            yield Sample(placing.image(planes), numbers[part][index], origin=(index,))

    counts = {split: len(owned[split]) for split in SPLITS}
    return Source(list(classes), counts, samples, annotations=("labels",), files=files)
