"""Models that answer: the same image gets what the evaluation gave it, and files of any kind are read as packs are."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_pieces import CLASSIFY, classify_row, pretrain_row
from PIL import Image
from shapes import DETECTOR, FCN, NAMES, SIZE, shaped_pack

from mim_core import inference
from mim_core.checkpoint import read_weights, write_weights
from mim_core.data.fit import Fit, place
from mim_core.data.folder import folder
from mim_core.data.images import RefusedError
from mim_core.data.pack import NOT_JUDGED, Pack, Split, open_pack, semantic_map, write
from mim_core.encoders.vit import ViT
from mim_core.inference import Read, Reader, as_file, load_encoder, load_model, plain
from mim_core.jobs import downstream, pretrain
from mim_core.jobs.run import about
from mim_core.metrics.boxes import Found, coco_ap
from mim_core.metrics.classes import presence_map
from mim_core.metrics.segments import confusion, miou, pixel_accuracy
from mim_core.tasks import TASKS
from mim_core.tasks.detect.batch import truth
from mim_core.transforms import normalise

pytestmark = pytest.mark.usefixtures("one_thread")

FITS: tuple[Fit, ...] = ("cover", "contain", "stretch")
FRAMES = ((40, 64), (64, 40), (33, 47), (16, 24), (100, 101))
ORIENTATION = 0x0112


SOLVED: dict[str, dict[str, Any]] = {
    "classify": {"name": "classify"},
    "classify bf16": {"name": "classify"},
    "presence": {"name": "classify", "predicts": "presence"},
    "probe": {"name": "probe", "blocks": [1, 2], "rates": [1.0, 10.0]},
    "knn": {"name": "knn", "k": 5},
    "segment": FCN,
    "segment bf16": FCN,
    "segment windows": {**FCN, "window_px": [16, 24]},
    "detect": DETECTOR,
}
"""Rows of every task; the second word changes the precision or names a variant."""


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return shaped_pack(tmp_path_factory.mktemp("data") / "shapes")


def files(pack: Pack) -> list[bytes]:
    """The test images as a user has them: as files."""
    return [as_file(np.array(image)) for image in pack.split("test").images]


def scores(answers: list[dict[str, Any]], split: Split) -> dict[str, float]:
    """Judge answers as the evaluation judges its own numbers."""
    if "objects" in answers[0]:
        found = []
        for one in answers:
            boxes = [[box[side] for side in inference.SIDES] for box in one["objects"]]
            kinds = [NAMES.index(box["class"]) for box in one["objects"]]
            found.append(
                Found(
                    np.array(boxes).reshape(-1, 4),
                    np.array(kinds, int),
                    np.array([box["score"] for box in one["objects"]]),
                )
            )
        assert sum(len(one.scores) for one in found) > len(found), "an average precision of nothing tells nothing"
        return {"ap": coco_ap(found, [truth(split, at, masks=False) for at in range(len(split))], 3, SIZE)["ap"]}
    if "map" in answers[0]:
        maps = [torch.from_numpy(semantic_map(split, index)) for index in range(len(split))]
        counts = sum(
            confusion(torch.from_numpy(one["map"]).long(), real, 4, 255)
            for one, real in zip(answers, maps, strict=True)
        )
        return {"miou": miou(counts), "pixel_accuracy": pixel_accuracy(counts)}
    chances = torch.tensor(
        [[{top["class"]: top["probability"] for top in one["top"]}[name] for name in NAMES] for one in answers]
    )
    if "present" in answers[0]:
        assert [set(one["present"]) for one in answers] == [
            {NAMES[at] for at in row.nonzero()[:, 0]} for row in chances >= 0.5
        ]
        return {"voc07_map": presence_map(chances.logit(), torch.from_numpy(np.array(split.array("presence"))))[0]}
    assert chances.sum(1).numpy() == pytest.approx(1, abs=1e-6)
    assert [one["class"] for one in answers] == [NAMES[at] for at in chances.argmax(1)]
    labels = torch.from_numpy(split.labels)
    entropy = -chances.gather(1, labels[:, None]).log().mean().item()
    return {"accuracy": (chances.argmax(1) == labels).double().mean().item(), "cross_entropy": entropy}


@pytest.mark.parametrize("kind", SOLVED)
def test_files_get_the_answers_that_were_evaluated(kind: str, shaped: Pack, tmp_path: Path) -> None:
    name, _, variant = kind.partition(" ")
    trains = TASKS[SOLVED[kind]["name"]].trains  # type: ignore[attr-defined]
    row = classify_row(
        task=SOLVED[kind],
        precision="bf16" if variant == "bf16" else "fp32",
        augment=None,
        lr_grid=[3e-3] if trains else [],
        optim={"batch": 8, "epochs": 3} if trains else None,
    )
    judged = downstream(row, shaped, tmp_path, 0, 3e-3, None, test=True)
    model = load_model(tmp_path / "model.safetensors")
    answers = model.answer([model.reader(content) for content in files(shaped)])
    for metric, value in scores(answers, shaped.split("test")).items():
        if (name, metric) != ("knn", "cross_entropy"):  # shares of votes, of which some are 0
            # To the rounding of a logarithm of float32: the numbers behind it are the same.
            assert value == pytest.approx(judged[f"test_{metric}"], abs=2e-6), metric


def test_every_task_answers() -> None:
    assert {task["name"] for task in SOLVED.values()} == set(TASKS)


def test_shares_are_those_of_the_map(shaped: Pack, tmp_path: Path) -> None:
    row = classify_row(task=FCN, augment=None, optim={"batch": 8, "epochs": 1})
    downstream(row, shaped, tmp_path, 0, 3e-3, None, test=True)
    model = load_model(tmp_path / "model.safetensors")
    for answer in model.answer([model.reader(content) for content in files(shaped)]):
        told = {one["segment"]: one["share"] for one in answer["shares"]}
        expected = {name: float((answer["map"] == at).mean()) for at, name in enumerate(model.facts.segments)}
        assert told == pytest.approx({name: share for name, share in expected.items() if share})
        assert list(told.values()) == sorted(told.values(), reverse=True)


def test_an_image_gets_the_same_answer_alone_and_among_others(pack: Pack, tmp_path: Path) -> None:
    downstream(classify_row(optim={**CLASSIFY["optim"], "epochs": 1}), pack, tmp_path, 0, 1.0e-3, None, test=True)
    model = load_model(tmp_path / "model.safetensors")
    reads = [model.reader(content) for content in files(pack)]
    for read, among in zip(reads, model.answer(reads), strict=True):
        (alone,) = model.answer([read])
        assert alone["class"] == among["class"]
        assert alone["probability"] == pytest.approx(among["probability"], abs=1e-5)
    assert model.answer([]) == []


def test_encoders_embed_in_fp32_as_their_weights_do(pack: Pack, tmp_path: Path) -> None:
    optim = {**CLASSIFY["optim"], "epochs": 1}
    pretrain(pretrain_row(precision="bf16", optim={"lr": 1e-3, "batch": 16, "epochs": 1}), pack, tmp_path / "first", 0)
    begun = tmp_path / "first" / "encoder.safetensors"
    row = classify_row(init="first", encoder=None, optim=optim)
    downstream(row, pack, tmp_path / "then", 0, 1e-3, begun, test=True)
    for file in (begun, tmp_path / "then" / "model.safetensors"):
        embedder = load_encoder(file)
        found = embedder.embed([embedder.reader(content) for content in files(pack)])
        weights, _ = read_weights(file)
        encoder = ViT((16, 16), 3, patch_px=4, width=32, depth=2, heads=4, positions="sincos").eval()
        own = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
        encoder.load_state_dict(own or weights)
        images = torch.from_numpy(np.array(pack.split("test").images))
        with torch.no_grad():
            expected = encoder(encoder.embed(normalise(images, pack.mean, pack.std))).mean(1)
        assert (found.shape, found.dtype, embedder.width) == ((16, 32), np.float32, 32)
        np.testing.assert_array_equal(found, expected.numpy())


def turned_jpeg(path: Path, rng: np.random.Generator, size: tuple[int, int], orientation: int) -> None:
    """A photograph as a phone stores it: on its side, with a note how to turn it."""
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).resize((size[1] * 2, size[0] * 2))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif, quality=90)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("channels", ["rgb", "grey"])
def test_files_are_read_as_their_pack_had_them(fit: Fit, channels: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(8):
        turned_jpeg(tmp_path / "images" / f"{index}.jpg", rng, (9 + index, 14), orientation=index % 8 + 1)
    source = {"name": "folder", "fit": fit, "channels": channels}
    made = folder(tmp_path / "images", size_px=(16, 24), fit=fit, channels=channels, validation=0.0, test=0.0)
    write(made, tmp_path / "pack", {"row": {"source": source}})
    pack = open_pack(tmp_path / "pack")
    pretrain_of = pretrain_row(optim={"lr": 1e-3, "batch": 8, "epochs": 1})
    reader = Reader.of(about(pretrain_of.encoder, pack))
    packed = pack.split("train")
    origins = np.load(packed.folder / "origins.npy")[:, 0]
    paths = sorted((tmp_path / "images").iterdir())
    for at, image in zip(origins, packed.images, strict=True):
        np.testing.assert_array_equal(reader(paths[at]).pixels, image)
        np.testing.assert_array_equal(reader(paths[at].read_bytes()).pixels, image)


@pytest.mark.parametrize("planes", [1, 2, 3, 5])
def test_planes_written_as_a_file_read_back_the_same(planes: int) -> None:
    image = np.random.default_rng(planes).integers(0, 256, (planes, 16, 24), np.uint8)
    reader = Reader((16, 24), planes, "all", "cover")
    np.testing.assert_array_equal(reader(as_file(image)).pixels, image)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("frame", FRAMES)
def test_boxes_go_back_to_where_fitting_took_them_from(fit: Fit, frame: tuple[int, int]) -> None:
    placing = place(frame, (16, 24), fit)
    left, top, right, bottom = placing.crop
    inside = np.array([[left + 1, top + 2, left + 9, top + 11], [left, top, right, bottom]])
    moved, kept = placing.boxes(np.concatenate([inside, np.zeros((2, 1))], 1))
    assert kept.all()
    objects = [dict(zip(inference.SIDES, map(float, one[:4]), strict=True)) | {"class": "a"} for one in moved]
    read = Read(np.zeros((3, 16, 24), np.uint8), placing, frame)
    back = read.restore({"objects": objects})["objects"]
    np.testing.assert_allclose([[one[side] for side in inference.SIDES] for one in back], inside, atol=1e-3)
    assert {one["class"] for one in back} == {"a"}


def test_boxes_end_at_the_edge_of_the_image() -> None:
    read = Read(np.zeros((3, 16, 24), np.uint8), place((32, 48), (16, 24), "contain"), (32, 48))
    (box,) = read.restore({"objects": [{"left": -2.0, "top": -1.0, "right": 30.0, "bottom": 20.0}]})["objects"]
    assert box == {"left": 0.0, "top": 0.0, "right": 48, "bottom": 32}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("frame", [frame for frame in FRAMES if min(frame) >= 24])
def test_maps_go_back_to_the_images_size_and_say_what_was_not_seen(fit: Fit, frame: tuple[int, int]) -> None:
    placing = place(frame, (16, 24), fit)
    values = np.random.default_rng(0).integers(0, 5, (16, 24), np.uint8)
    read = Read(np.zeros((3, 16, 24), np.uint8), placing, frame)
    back = read.restore({"map": values})["map"]
    assert back.shape == frame
    # Fitted again it is what the model gave, and what was cut away is not judged.
    again, (height, width) = placing.mask(back, NOT_JUDGED), placing.inner
    np.testing.assert_array_equal(again[:height, :width], values[:height, :width])
    left, top, right, bottom = placing.crop
    seen = np.zeros(frame, bool)
    seen[math.ceil(top - 0.5) : math.ceil(bottom - 0.5), math.ceil(left - 0.5) : math.ceil(right - 0.5)] = True
    np.testing.assert_array_equal(back != NOT_JUDGED, seen)


def test_a_map_in_plain_values_is_a_png_of_its_values() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    told = plain({"map": values, "shares": []})
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(told["map"])))), values)
    assert plain({"class": "a"}) == {"class": "a"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"no image", "no image of a known format"),
        (as_file(np.random.default_rng(0).integers(0, 256, (3, 20, 20), np.uint8))[:600], "cannot be decoded"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_what_is_no_image_is_refused_with_the_reason(content: bytes, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        Reader((16, 16), 3, "rgb", "cover")(content)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(RefusedError, match="has 5 channels; the model takes 3"):
        Reader((16, 16), 3, "all", "cover")(as_file(np.zeros((5, 20, 20), np.uint8)))


def test_files_without_a_model_are_refused(pack: Pack, tmp_path: Path) -> None:
    said = {"encoder": CLASSIFY["encoder"], "size": [16, 16], "channels": 3}
    write_weights(tmp_path / "encoder.safetensors", {"a": torch.zeros(1)}, said)
    with pytest.raises(ValueError, match="holds no model of a task"):
        load_model(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="no images' mean"):
        load_encoder(tmp_path / "encoder.safetensors")
