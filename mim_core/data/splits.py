"""Which images a dataset trains on, chooses by and is tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mim_core.data.pack import SPLITS

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of the training images of each class."""
Published = Mapping[str, Sequence[int]]
"""Indices of the images by the sets that a format has, out of "train", "val" and "test"."""


def digest(content: bytes | Path) -> str:
    """Hash of an image's bytes, which its split follows from."""
    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def share_out(
    digests: Sequence[str], groups: Sequence[Hashable], validation: float, test: float
) -> dict[str, list[int]]:
    """Share images out over the splits within each group (class), by their bytes' hash; gives their indices.

    Copies of one image never lie in two splits. What rounding leaves over in one group is made up in the next, so that
    the shares hold over groups of a few images too; each group keeps an image for training.
    """
    shared: dict[Hashable, dict[str, list[int]]] = {}
    seen: dict[str, Hashable] = {}
    for index, (mark, group) in enumerate(zip(digests, groups, strict=True)):
        # A copy under another class stays with the first one's group, and so in its split.
        shared.setdefault(seen.setdefault(mark, group), {}).setdefault(mark, []).append(index)
    owned: dict[str, list[int]] = {split: [] for split in SPLITS}
    images = all_tested = all_validated = 0
    for copies in shared.values():
        marks = sorted(copies)
        images += len(marks)
        tested = min(round(test * images) - all_tested, len(marks) - 1)
        validated = min(round(validation * images) - all_validated, len(marks) - 1 - tested)
        all_tested, all_validated = all_tested + tested, all_validated + validated
        for rank, mark in enumerate(marks):
            split = "test" if rank < tested else "validation" if rank < tested + validated else "train"
            owned[split].extend(copies[mark])
    return {split: sorted(indices) for split, indices in owned.items()}


def published_splits(
    published: Published,
    mark: Callable[[int], str],
    groups: Sequence[Hashable],
    validation: float,
    test: float,
) -> dict[str, list[int]]:
    """Splits of a dataset that has sets of its own; shares of its training set make up for those that it lacks.

    `mark` gives an image's digest, which is asked for only where shares are taken, and `groups` each image's class.
    `val` is the test split where there is no test set with annotations: papers report on it, so it may not choose.
    """
    train = list(published.get("train", []))
    held = {"validation": list(published.get("val", [])), "test": list(published.get("test", []))}
    if not held["test"]:
        held = {"validation": [], "test": held["validation"]}
    validation = 0.0 if held["validation"] else validation
    test = 0.0 if held["test"] else test
    if not validation and not test:
        return {"train": train, **held}
    shared = share_out(list(map(mark, train)), [groups[index] for index in train], validation, test)
    return {
        "train": [train[at] for at in shared["train"]],
        **{split: held[split] or [train[at] for at in shared[split]] for split in held},
    }
