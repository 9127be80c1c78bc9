"""The embedded dataset and the packs that training reads."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mim_core.data import pack
from mim_core.data.moments import channel_moments
from mim_core.data.pack import SPLITS, Pack, Sample, Source
from mim_core.data.scenes import BANDS, FILES, scenes, split_digits

WIDTHS = (640, 640)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files, as scikit-learn carries them."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-learn, which carries the files, is not installed")
    folder = tmp_path_factory.mktemp("scenes")
    datasets = Path(found.submodule_search_locations[0], "datasets")
    for name in FILES:
        origin = datasets / ("data" if name.endswith(".gz") else "images") / name
        (folder / name).write_bytes(origin.read_bytes())
    return folder


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs") / "scenes"
    source = scenes(root, train=240, validation=60, test=90, several=0.5)
    pack.write(source, folder, {"name": "scenes", "md5": "x"})
    return pack.open_pack(folder)


def digit_classes(root: Path) -> np.ndarray:
    with gzip.open(root / "digits.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",")[:, 64].astype(int)


def test_splits_share_no_digit(packed: Pack) -> None:
    origins = {split: np.asarray(packed.split(split).array("origins")) for split in SPLITS}
    used = {split: set(rows[:, [0, 6, 7]].ravel().tolist()) - {-1} for split, rows in origins.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert used[one].isdisjoint(used[other])
    assert all(len(digits) > 30 for digits in used.values())


def test_splits_share_no_pixel_of_a_photograph(packed: Pack) -> None:
    columns: dict[str, set[tuple[int, int]]] = {}
    for split in SPLITS:
        origins = np.asarray(packed.split(split).array("origins"))
        assert set(origins[:, 1]) == {0, 1}
        columns[split] = {(row[1], x) for row in origins.tolist() for x in range(row[2], row[4])}
        for photograph, left, top, right, bottom in origins[:, 1:6].tolist():
            first, last = (round(share * WIDTHS[photograph]) for share in BANDS[split])
            assert first <= left < right <= last
            assert 0 <= top < bottom <= 427
    for one, other in itertools.combinations(SPLITS, 2):
        assert columns[one].isdisjoint(columns[other])


def test_every_digit_has_one_split(root: Path) -> None:
    classes = digit_classes(root)
    parts = split_digits(classes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(classes))) == list(range(1797))
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert len(part) / 1797 == pytest.approx(share, abs=0.01)
        assert set(classes[part]) == set(range(10))


def test_labels_boxes_and_instances_agree(root: Path, packed: Pack) -> None:
    classes, several = digit_classes(root), 0
    for split in map(packed.split, SPLITS):
        labels, origins = split.labels, np.asarray(split.array("origins"))
        starts, boxes = np.asarray(split.array("box_starts")), np.asarray(split.array("boxes"))
        instances = np.asarray(split.array("instances"))
        assert starts[0] == 0
        assert starts[-1] == len(boxes)
        for index in range(len(split)):
            mine = boxes[starts[index] : starts[index + 1]]
            several += len(mine) > 1
            assert set(np.unique(instances[index])) - {0} == set(range(1, len(mine) + 1))
            for number, (left, top, right, bottom, _) in enumerate(mine, 1):
                rows, columns = np.nonzero(instances[index] == number)
                tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert (left, top, right, bottom) == tight
            heights = mine[:, 3] - mine[:, 1]  # not areas: a large 1 is narrower than a small 0
            assert heights.argmax() == 0
            assert labels[index] == mine[0, 4] == classes[origins[index, 0]]
            assert set(mine[1:, 4]) <= {classes[row] for row in origins[index, 6:] if row >= 0}
            semantic = pack.semantic_map(split, index)
            assert set(np.unique(semantic)) <= {0, *(mine[:, 4].astype(int) + 1)}
            assert (semantic[instances[index] == 1] == labels[index] + 1).all()
    assert several > 150


def test_same_seed_same_bytes(root: Path) -> None:
    def images(seed: int, train: int = 40) -> np.ndarray:
        return np.stack([sample.image for sample in scenes(root, train=train, seed=seed).samples("train")])

    assert images(0).tobytes() == images(0).tobytes()
    assert images(0).tobytes() != images(1).tobytes()
    assert images(0, 30).tobytes() == images(0)[:30].tobytes()


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 16), (64, 48)])
def test_any_size(root: Path, size: tuple[int, int]) -> None:
    for sample in scenes(root, size_px=size, train=40, several=1.0).samples("train"):
        assert sample.image.shape == (3, *size)
        assert sample.image.dtype == np.uint8
        assert sample.instances is not None
        assert sample.boxes is not None
        assert sample.instances.shape == size
        assert 1 <= len(sample.boxes) <= 3
        assert (sample.boxes[:, :2] >= 0).all()
        assert (sample.boxes[:, 2:4] <= (size[1], size[0])).all()


def test_share_of_images_with_several_digits(root: Path) -> None:
    for share in (0.0, 1.0):
        samples = list(scenes(root, train=40, several=share).samples("train"))
        # A digit that finds no free place is left out, so a few images of those that asked for several hold one.
        held = sum(sample.origin[6] >= 0 for sample in samples) / len(samples)
        assert held == 0 if share == 0 else held > 0.9


def test_a_pack_keeps_what_the_source_gives(root: Path, packed: Pack) -> None:
    source = scenes(root, train=240, validation=60, test=90, several=0.5)
    assert packed.meta["counts"] == {"train": 240, "validation": 60, "test": 90}
    assert (packed.size, packed.channels, packed.classes) == ((32, 32), 3, [str(digit) for digit in range(10)])
    for name in SPLITS:
        split = packed.split(name)
        starts, boxes = split.array("box_starts"), split.array("boxes")
        for index, sample in enumerate(source.samples(name)):
            assert (split.tensor(index).numpy() == sample.image).all()
            assert (split.array("instances")[index] == sample.instances).all()
            assert (boxes[starts[index] : starts[index + 1]] == sample.boxes).all()
            assert tuple(split.array("origins")[index]) == sample.origin
        assert index == len(split) - 1


def test_channel_moments_are_numpys(packed: Pack) -> None:
    images = np.asarray(packed.split("train").images) / 255
    assert packed.mean == pytest.approx(images.mean((0, 2, 3)))
    assert packed.std == pytest.approx(images.std((0, 2, 3)))
    chunked = channel_moments(np.asarray(packed.split("train").images), chunk=7)
    assert chunked == pytest.approx(np.stack([packed.mean, packed.std]))
    constant = np.full((3, 1, 4, 4), 51, np.uint8)
    assert channel_moments(constant).tolist() == [[pytest.approx(0.2)], [1e-3]]


def test_a_pack_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(split: str):  # type: ignore[no-untyped-def]
        yield Sample(np.zeros((1, 4, 4), np.uint8))
        raise OSError("the disk is gone")

    def good(split: str):  # type: ignore[no-untyped-def]
        yield from [Sample(np.full((1, 4, 4), 7, np.uint8))] * counts[split]

    counts = {"train": 2, "validation": 0, "test": 0}
    folder = tmp_path / "packs" / "small"
    with pytest.raises(OSError, match="the disk is gone"):
        pack.write(Source([], counts, broken), folder, {})
    assert not folder.exists()
    with pytest.raises(ValueError, match="there is no pack here"):
        pack.open_pack(folder)
    with pytest.raises(ValueError, match="no readable training image"):
        pack.write(Source([], {"train": 0, "validation": 0, "test": 0}, good), folder, {})
    pack.write(Source([], counts, good), folder, {"name": "small"})
    pack.write(Source([], counts, good), folder, {"name": "again"})
    opened = pack.open_pack(folder)
    assert json.loads((folder / "meta.json").read_text())["name"] == "again"
    assert (opened.split("train").labels == -1).all()
    assert (opened.annotations, opened.segments) == ([], [])
    with pytest.raises(ValueError, match="the pack has no boxes"):
        opened.split("train").array("boxes")
    with pytest.raises(ValueError, match="no test images"):
        opened.split("test")


# Labels


@pytest.mark.parametrize("seed", range(5))
def test_label_budget_is_balanced(seed: int) -> None:
    labels = np.random.default_rng(9).permutation(np.repeat([-1, 0, 1, 2], [20, 30, 30, 4]))
    chosen = pack.label_budget(labels, 24, seed)
    assert len(set(chosen.tolist())) == 24
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 4]
    assert (chosen == pack.label_budget(labels, 24, seed)).all()
    assert (chosen != pack.label_budget(labels, 24, seed + 100)).any()
    smaller = np.bincount(labels[pack.label_budget(labels, 8, seed)], minlength=3)
    assert smaller.max() - smaller.min() <= 1


def test_label_budget_has_limits() -> None:
    labels = np.array([0, -1, 1, 1])
    assert pack.label_budget(labels, None, 0).tolist() == [0, 2, 3]
    assert pack.label_budget(labels, 3, 0).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="found 4; the training split has 3"):
        pack.label_budget(labels, 4, 0)


def test_batched() -> None:
    assert list(pack.batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(pack.batched([], 2)) == []
