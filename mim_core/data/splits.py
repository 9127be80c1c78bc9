"""Which images a dataset trains on, chooses by and is tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from mim_core.data.pack import SPLITS

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of the training images of each class."""
DIGEST_BYTES = 16
MARK = f"S{DIGEST_BYTES}"
"""A digest in an array. Numpy's strings of bytes compare as they should where all are equally long."""
Published = Mapping[str, Sequence[int]]
"""Indices of the images by the sets that a format has, out of "train", "val" and "test"."""


def digest(content: bytes | Path) -> bytes:
    """Hash of an image's bytes, which its split follows from."""
    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()


def share_out(
    digests: Sequence[bytes] | np.ndarray, groups: Sequence[Hashable], validation: float, test: float
) -> dict[str, np.ndarray]:
    """Share images out over the splits within each group (class), by their bytes' hash; gives their indices.

    Copies of one image never lie in two splits. What rounding leaves over in one group is made up in the next, so that
    the shares hold over groups of a few images too; each group keeps an image for training.
    """
    numbers: dict[Hashable, int] = {}
    numbered = np.fromiter((numbers.setdefault(group, len(numbers)) for group in groups), np.int64, len(groups))
    _, first, copies = np.unique(np.asarray(digests, MARK), return_index=True, return_inverse=True)
    # A copy under another class stays with the first one's group, and so in its split.
    group_of = numbered[first]
    members = np.split(np.argsort(group_of, kind="stable"), np.bincount(group_of).cumsum()[:-1])
    splits = np.full(len(first), SPLITS.index("train"), np.int8)
    images = all_tested = all_validated = 0
    for group in dict.fromkeys(group_of[np.argsort(first)].tolist()):
        marks = members[group]  # sorted by their bytes
        images += len(marks)
        tested = min(round(test * images) - all_tested, len(marks) - 1)
        validated = min(round(validation * images) - all_validated, len(marks) - 1 - tested)
        all_tested, all_validated = all_tested + tested, all_validated + validated
        splits[marks[:tested]] = SPLITS.index("test")
        splits[marks[tested : tested + validated]] = SPLITS.index("validation")
    return {split: np.flatnonzero(splits[copies] == number) for number, split in enumerate(SPLITS)}


def published_splits(
    published: Published,
    mark: Callable[[int], bytes],
    groups: Sequence[Hashable],
    validation: float,
    test: float,
) -> dict[str, np.ndarray]:
    """Splits of a dataset that has sets of its own; shares of its training set make up for those that it lacks.

    `mark` gives an image's digest, which is asked for only where shares are taken, and `groups` each image's class.
    `val` is the test split where there is no test set with annotations: papers report on it, so it may not choose.
    """
    train, val, tested = (np.array(published.get(name, ()), np.int64) for name in ("train", "val", "test"))
    held = {"validation": val, "test": tested} if len(tested) else {"validation": tested, "test": val}
    validation = 0.0 if len(held["validation"]) else validation
    test = 0.0 if len(held["test"]) else test
    if not validation and not test:
        return {"train": train, **held}
    marks = np.fromiter((mark(index) for index in train.tolist()), MARK, len(train))
    shared = share_out(marks, [groups[index] for index in train.tolist()], validation, test)
    return {
        "train": train[shared["train"]],
        **{split: held[split] if len(held[split]) else train[shared[split]] for split in held},
    }
