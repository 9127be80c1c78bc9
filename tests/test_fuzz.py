"""Inputs that nobody would write: rows, annotations, images, archives and weights, changed at random by hypothesis.

Each is read, or refused with a message that helps; nothing else is raised, nothing hangs, and nothing is written
elsewhere. The ordinary run tries some hundreds, the slow one (`make test-slow`) more than ten thousand.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from core_pieces import FILES, PRETRAIN, TUNE, TUNED, write_rows
from format_trees import (
    CSV,
    VOC_OBJECTS,
    ade_tree,
    coco_content,
    coco_tree,
    csv_tree,
    inaturalist_content,
    inaturalist_tree,
    voc_annotation,
    voc_tree,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_formats_fuzz import damaged, places, read, spoiled

from flows.archives import unpack
from flows.workspace import UserError
from mim_core import checkpoint
from mim_core.data.ade20k import ade20k
from mim_core.data.coco import coco
from mim_core.data.csv_table import csv_table
from mim_core.data.folder import folder
from mim_core.data.images import RefusedError, decode, decode_bytes, read_values
from mim_core.data.inaturalist import inaturalist
from mim_core.data.sources import SOURCES
from mim_core.data.voc import voc
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.heads import HEADS
from mim_core.losses import LOSSES
from mim_core.masks import MASKS
from mim_core.optim import OPTIMISERS, SCHEDULES
from mim_core.params import derived, load
from mim_core.published import convert, read_state
from mim_core.spec import SpecError
from mim_core.targets import TARGETS
from mim_core.tasks import TASKS
from mim_core.tokenizers import TOKENIZERS

# Python's own writer of archives warns of names that come twice, which are among what is tried.
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")

SECONDS = 60
"""An input that takes more of the processor's time hangs."""
FEW: dict[str, int] = {"row": 2, "text": 3, "annotation": 8, "image": 20, "archive": 10, "weights": 10}
MANY: dict[str, int] = {"row": 150, "text": 100, "annotation": 350, "image": 400, "archive": 300, "weights": 300}
"""Inputs of each test of a kind, in the ordinary and in the slow run."""


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def tried(body: Callable[[Any], object], strategy: st.SearchStrategy[Any], count: int) -> None:
    """Run `body` on `count` inputs; the same ones each time in the ordinary run."""
    few = count < 100

    def inner(drawn: Any) -> None:
        with in_time():
            body(drawn)

    chosen = settings(
        max_examples=count, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    test = chosen(given(strategy)(inner))
    (seed(0)(test) if few else test)()


def inputs(kind: str, names: Iterable[str], few: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """Give a test `name` and `count`: few in the ordinary run, of `few` names if not of all; many else."""
    names = list(names)
    ordinary = [pytest.param(name, FEW[kind], id=name) for name in (names if few is None else few)]
    thousands = [pytest.param(name, MANY[kind], id=f"{name}, thousands", marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize(("name", "count"), [*ordinary, *thousands])


def helps(error: Any, begins: str = "") -> None:
    """A message says where, and what, in some words and not in a flood of them."""
    said = str(error)
    assert said.startswith(begins), f"no place: {said}"
    assert 3 < len(said.split()) < 2000, f"no message that helps: {said}"


def test_the_slow_run_tries_more_than_ten_thousand() -> None:
    tests = {"row": len(ROWS), "text": len(FILES), "annotation": len(IMPORTERS), "image": len(IMAGES)}
    tests |= {"archive": len(ARCHIVES), "weights": len(WEIGHTS)}
    assert sum(MANY[kind] * count for kind, count in tests.items()) >= 10_000
    tests["row"] = 4
    assert sum(FEW[kind] * count for kind, count in tests.items()) >= 300


# Rows

TASKS_OF = {
    "classify": TUNED,
    "probe": {**TUNED, "task": {"name": "probe", "blocks": [1, 2]}, "augment": None, "drop_path": 0.0},
    "knn": {key: TUNED[key] for key in ("data", "init", "seeds")} | {"task": {"name": "knn", "k": 5}},
    "segment": {**TUNED, "task": {"name": "segment", "head": "upernet"}, "augment": None, "optim": TUNE},
    "detect": {**TUNED, "task": {"name": "detect", "detector": {"name": "mask_rcnn"}}, "augment": None, "optim": TUNE},
}
CONTEXT = {
    **PRETRAIN, "encoder": {"name": "conv", "layers": 3, "base": 8}, "mask": {"name": "central"}, "fill": "colour",
    "head": "channelwise_decoder", "loss": {"name": "l2", "scope": "ring", "ring_px": 2, "visible_weight": 10.0},
    "adversarial": {"base": 8},
}  # fmt: skip
ROWS: dict[str, tuple[str, str, str, Any]] = {
    f"{section}.{name}": (file, section, name, row)
    for file, sections in FILES.items() for section, rows in sections.items() for name, row in rows.items()
} | {f"downstream.{task}": ("downstream.yaml", "downstream", "tuned", row) for task, row in TASKS_OF.items()} | {
    "pretrain.mae": ("pretrain.yaml", "pretrain", "mae", {
        **PRETRAIN, "fill": "drop", "target": {"name": "pixels", "normalise": "patch"}, "loss": "l2",
        "head": {"name": "transformer_decoder", "width": 16, "depth": 1, "heads": 2},
    }),
    "pretrain.context": ("pretrain.yaml", "pretrain", "context", CONTEXT),
    "pretrain.swin": ("pretrain.yaml", "pretrain", "swin", {
        **PRETRAIN, "encoder": {"name": "swin", "width": 16, "depths": [1, 1], "heads": [1, 2], "window": 2},
        "mask": {"name": "random", "unit_px": 8},
    }),
}  # fmt: skip
"""File, section, name and valid row of each test."""
PIECES = sorted({name for table in (SOURCES, ENCODERS, MASKS, FILLS, HEADS, TARGETS, LOSSES, TASKS, TOKENIZERS,
                                    OPTIMISERS, SCHEDULES) for name in table})  # fmt: skip
KEYS = sorted(
    {str(key) for _, _, _, row in ROWS.values() for container, key in places(row) if isinstance(container, dict)}
)
NUMBERS = (
    st.sampled_from([0, -1, 1, 2, 3, 5, 7, 10**6, 2**31, 2**63, 2**64, 2**70, -(2**70), 10**400])
    | st.integers(-100, 5000)
    | st.sampled_from([0.0, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 0.5, 1.0])
    | st.floats()
)
WORDS = (
    st.sampled_from(
        [*PIECES, *KEYS, "one", "two", "tuned", "codes", "tiny", "scratch", "timm:x", "a.pth", "../x", "1e-4"]
    )
    | st.text(max_size=12)
    | st.sampled_from(["\0", "\x85", "\u2028", "\ufeff", "<b>", "x" * 300, "%s{}", "\n\n"])
)
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=6
)


@st.composite
def changed(draw: st.DrawFn, row: Any) -> Any:
    """A row with one to three values replaced, taken out, doubled, or put in under a key."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(row))
        if not spots:
            break
        container, key = draw(st.sampled_from(spots))
        act = draw(st.integers(0, 7))
        if act == 0:
            del container[key]
        elif act == 1:
            other, name = draw(st.sampled_from(spots))
            container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else None)
        elif act == 2 and isinstance(container, dict):
            container[draw(WORDS)] = draw(JUNK)
        elif act == 3 and isinstance(container, list):
            container.append(draw(JUNK))
        elif act == 4 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] = container[key] * draw(st.sampled_from([-1, 0, 2, 3, 10, 1000, 1.5, 0.1]))
        else:
            container[key] = draw(JUNK)
    return row


def check_rows(root: Path) -> bool:
    """Rows load, and what follows from them does, or a message says what is wrong; gives whether they load."""
    try:
        return bool(derived(load(root)))
    except SpecError as error:
        for line in str(error).splitlines():
            helps(line, "params/")
        return False


@inputs("row", ROWS, ["ablations.ratio", "downstream.detect", "pretrain.context", "pretrain.mae"])
def test_rows(tmp_path: Path, name: str, count: int) -> None:
    root = write_rows(tmp_path)
    file, section, key, row = ROWS[name]

    def body(new: Any) -> bool:
        content = {**FILES[file], section: {**FILES[file][section], key: new}}
        (root / file).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return check_rows(root)

    assert body(row), "the row that is changed is a good one"
    tried(body, changed(row), count)


ODD = [
    "&a ", "*a", "<<: *a", "!!python/name:os.system ''", "!x ", "? ", "- ", ": ", "{", "}", "[", "]", "|\n", ">", "#",
    "~", "%YAML 9.9\n", "---\n", "...\n", "\t", "'", '"', "@", "`", "0o7", "0x", "1:30:99", "2024-99-99", "=",
]  # fmt: skip


@inputs("text", FILES)
def test_texts_of_rows(tmp_path: Path, name: str, count: int) -> None:
    root = write_rows(tmp_path)
    text = (root / name).read_text()

    def body(rng: random.Random) -> None:
        new = spoiled(text, rng)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(new) + 1)
            new = new[:at] + rng.choice(ODD).encode() + new[at:]
        (root / name).write_bytes(new)
        check_rows(root)

    tried(body, st.randoms(use_true_random=False), count)


# Annotations

Spoil = Callable[[Path, random.Random], None]


def as_json(name: str, content: Any) -> Spoil:
    def spoil(root: Path, rng: random.Random) -> None:
        text = json.dumps(damaged(content, rng))
        (root / name).write_bytes(spoiled(text, rng) if rng.random() < 0.2 else text.encode())

    return spoil


def as_text(name: str, text: str) -> Spoil:
    return lambda root, rng: (root / name).write_bytes(spoiled(text, rng)) and None


def as_bytes(*names: str) -> Spoil:
    """Some bytes of one of the files changed, or its end missing."""
    whole: dict[str, bytes] = {}

    def spoil(root: Path, rng: random.Random) -> None:
        for name in names:
            content = bytearray(whole.setdefault(name, (root / name).read_bytes()))
            if name == rng.choice(names):
                for _ in range(rng.randint(1, 4)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                content = content[: rng.choice((len(content), rng.randrange(len(content))))]
            (root / name).write_bytes(content)

    return spoil


ANNOTATION = ElementTree.tostring(voc_annotation(VOC_OBJECTS["2007_000001"]), encoding="unicode")
ONE = "2007_000001"
SEGMENTS = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{n}\t0.1\t2\t1\t0\ts{n}\n" for n in range(1, 151))
IMPORTERS: dict[str, tuple[Callable[[Path], Path], Callable[..., Any], Spoil, dict[str, Any]]] = {
    "coco": (coco_tree, coco, as_json("annotations/instances_train2017.json", coco_content()), {}),
    "inaturalist": (
        inaturalist_tree, inaturalist, as_json("train2018.json", inaturalist_content("train", (1, 2, 3, 4))), {},
    ),
    "voc annotation": (voc_tree, voc, as_text(f"Annotations/{ONE}.xml", ANNOTATION), {"lists": "segmentation"}),
    "voc list": (
        voc_tree, voc, as_text("ImageSets/Segmentation/train.txt", "\n".join(list(VOC_OBJECTS)[:4])),
        {"lists": "segmentation"},
    ),
    "voc pixels": (
        voc_tree, voc, as_bytes(*(f"{part}/{ONE}.png" for part in ("SegmentationClass", "SegmentationObject"))),
        {"lists": "segmentation"},
    ),
    "csv": (csv_tree, csv_table, as_text("labels.csv", CSV), {}),
    "ade20k segments": (ade_tree, ade20k, as_text("objectInfo150.txt", SEGMENTS), {}),
    "ade20k scenes": (
        ade_tree, ade20k, as_text("sceneCategories.txt", "ADE_train_00000001 airport\nADE_val_00000001 attic\n"), {},
    ),
    "folder": (lambda root: csv_tree(root), folder, as_bytes("a/1.png", "b/3.png"), {}),
}  # fmt: skip


@inputs("annotation", IMPORTERS)
def test_annotations(tmp_path: Path, name: str, count: int) -> None:
    make, source, spoil, options = IMPORTERS[name]
    root = make(tmp_path / "data")

    def body(rng: random.Random) -> None:
        spoil(root, rng)
        read(source, root, **options)

    tried(body, st.randoms(use_true_random=False), count)


# Images


def pictures() -> dict[str, bytes]:
    """A small image in each format and several modes."""
    rng, found = np.random.default_rng(0), {}
    colours = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    for kind, mode in (("png", "RGB"), ("png", "P"), ("jpeg", "RGB"), ("gif", "P"), ("bmp", "RGB"), ("ppm", "RGB"),
                       ("tiff", "RGB"), ("webp", "RGB"), ("png", "I;16")):  # fmt: skip
        out = io.BytesIO()
        picture = (
            Image.fromarray(rng.integers(0, 65536, (9, 12), np.uint16)) if mode == "I;16" else colours.convert(mode)
        )
        picture.save(out, kind)
        found[f"{kind} {mode}"] = out.getvalue()
    out = io.BytesIO()
    np.save(out, rng.integers(0, 256, (3, 9, 12), np.uint8))
    return {**found, "npy": out.getvalue()}


IMAGES = pictures()


def altered(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten by telling ones, put in, taken out, or cut off."""
    new = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        at, act = rng.randrange(len(new) + 1), rng.randrange(5)
        if act == 0 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif act == 1:
            new[at : at + 4] = rng.choice(
                (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x01", rng.randbytes(4))
            )
        elif act == 2:
            new[at:at] = rng.randbytes(rng.randint(1, 9))
        elif act == 3:
            del new[at : at + rng.randint(1, 9)]
        else:
            del new[max(at, 1) :]
        new = new or bytearray(b"\0")
    return bytes(new)


@inputs("image", IMAGES)
def test_images(tmp_path: Path, name: str, count: int) -> None:
    path = tmp_path / f"image.{name.split()[0]}"

    def body(rng: random.Random) -> None:
        content = altered(IMAGES[name], rng)
        path.write_bytes(content)
        channels: Any = rng.choice(("rgb", "grey", "all"))
        for reader in (
            lambda: decode(path, channels), lambda: decode(path, channels, (9, 12)),
            lambda: decode_bytes(content, channels), lambda: read_values(path)[None],
        ):  # fmt: skip
            try:
                found = reader()
            except RefusedError as error:
                helps(error)
            else:
                assert found.dtype == np.uint8
                assert found.ndim == 3

    tried(body, st.randoms(use_true_random=False), count)


# Archives

ARCHIVES = (".zip", ".tar", ".tar.gz")
NAMES = [
    "a.png", "b/c.png", "../x", "../../x", "/tmp/unmask-x", "a/../../x", "b/..", "..", ".", "", "/", "a\\..\\x",
    "C:\\x", "b", "a.png/x", "x" * 300, "\u00e9", "a\0b", ".hidden", "b/.git/x", "./a.png", "a//b",
]  # fmt: skip


def pack_archive(path: Path, rng: random.Random) -> None:
    content = rng.randbytes(40)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for _ in range(rng.randint(1, 5)):
                entry = zipfile.ZipInfo(rng.choice(NAMES) or "empty")
                entry.external_attr = rng.choice((0, 0o100644, 0o120777, 0o40755, 0o10644, 0o60644)) << 16
                archive.writestr(entry, rng.choice((content, b"../x", b"/etc", b"")))
        return
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for _ in range(rng.randint(1, 5)):
            member = tarfile.TarInfo(rng.choice(NAMES))
            member.type = rng.choice((tarfile.REGTYPE,) * 4 + (
                tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE
            ))  # fmt: skip
            member.linkname, member.mode = rng.choice(("..", "/etc", "../x", "a.png", "b")), 0o777
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))


@inputs("archive", ARCHIVES)
def test_archives(tmp_path: Path, name: str, count: int) -> None:
    path, out = tmp_path / f"a{name}", tmp_path / "far" / "out"

    def body(rng: random.Random) -> None:
        path.unlink(missing_ok=True)
        try:
            pack_archive(path, rng)
        except ValueError:  # of a name that the writer itself refuses
            return
        if rng.random() < 0.4:
            path.write_bytes(altered(path.read_bytes(), rng))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            for entry in unpack(path, out):
                assert entry["file"].encode()
                assert entry["reason"]
        except UserError as error:
            helps(error, str(path))
        assert {one.name for one in tmp_path.iterdir()} == {path.name, "far"}, "only what is inside comes out"
        assert {one.name for one in out.parent.iterdir()} == {"out"}
        assert not any(one.is_symlink() for one in out.rglob("*"))
        assert not Path("/tmp/unmask-x").exists()

    tried(body, st.randoms(use_true_random=False), count)


# Weights

STATE = {
    "blocks.0.attn.qkv.weight": torch.arange(12.0).reshape(3, 4),
    "patch_embed.proj.weight": torch.ones(2, 3, 4, 4),
}


def save_new(state: Mapping[str, Any], path: Path) -> None:
    torch.save({"model": state}, path)


def save_old(state: Mapping[str, Any], path: Path) -> None:
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)


def save_pickle(state: Mapping[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps({key: value.tolist() for key, value in state.items()}, 2))


WEIGHTS: dict[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "zip": (".pth", save_new), "sequence": (".pth", save_old), "pickle": (".pkl", save_pickle),
    "safetensors": (".safetensors", lambda state, path: save_file(dict(state), path, {"unmask": '{"encoder": 3}'})),
}  # fmt: skip


@inputs("weights", WEIGHTS)
def test_weights(tmp_path: Path, name: str, count: int) -> None:
    ending, write = WEIGHTS[name]
    path = tmp_path / f"a{ending}"
    write(STATE, path)
    whole = path.read_bytes()

    def body(rng: random.Random) -> None:
        path.write_bytes(altered(whole, rng))
        for reader in (lambda: convert(read_state(path)), lambda: checkpoint.read_weights(path)):
            try:
                reader()
            except ValueError as error:
                helps(error)

    tried(body, st.randoms(use_true_random=False), count)
