"""Segmentation: what it learns from, its windows, its loss, its training and its picture."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from core_pieces import AUGMENT, ENCODER, OPTIM, TUNE, pretrain_row
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor

from mim_core import checkpoint
from mim_core.data.order import Order, loader
from mim_core.data.pack import CROWD, Pack, Sample, Source, open_pack, semantic_map, write
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve
from mim_core.jobs import downstream, pretrain
from mim_core.jobs.run import Run
from mim_core.params import DownstreamRow, load
from mim_core.spec import SpecError, build, check
from mim_core.tasks import TASKS
from mim_core.tasks.segment import sheet
from mim_core.tasks.segment.palette import BACKGROUND, UNJUDGED, apart, palette, seen
from mim_core.tasks.segment.segment import MappedFetch, Segment, pixel_loss
from mim_core.tasks.segment.windows import corners, slide
from mim_core.tasks.task import Facts
from mim_core.train import Scalars
from mim_core.transforms import Augment

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = {"train": 48, "validation": 12, "test": 16}
SIZE = (16, 24)
NAMES = ["background", "flat", "tall", "odd"]
COLOURS = np.array([[90, 90, 90], [230, 40, 40], [40, 230, 40], [40, 40, 230]])
SEGMENT = {
    "task": {"name": "segment", "head": {"name": "fcn", "hidden": 16}},
    "data": "shapes",
    "init": "scratch",
    "encoder": ENCODER,
    "lr_grid": [1.0e-3],
    "seeds": [0],
    "augment": AUGMENT,
    "optim": {**TUNE, "layer_decay": 0.75},
    "precision": "fp32",
}
CPU = Compute(torch.device("cpu"), bf16=False)


def source(unjudged: bool = True) -> Source:
    """Rectangles whose colour is that of their class, two an image; a border of 1 px at the right is not judged."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(COUNTS).index(split))
        for index in range(COUNTS[split]):
            semantic = np.zeros(SIZE, np.uint8)
            for value in rng.choice([1, 2, 3], 2, replace=False):
                top, left = rng.integers(0, 9), rng.integers(0, 15)
                semantic[top : top + 7, left : left + 9] = value
            image = COLOURS[semantic].transpose(2, 0, 1).astype(np.uint8)
            if unjudged:
                semantic[:, -1] = 255
            if unjudged and index == 3:
                semantic[:] = 255
            yield Sample(image, semantic=semantic)

    return Source(["flat", "tall", "odd"], COUNTS, samples, annotations=("semantic",), segments=NAMES)


def make(folder: Path, of: Source) -> Pack:
    write(of, folder, {"source": {"name": "shapes"}})
    return open_pack(folder)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return make(tmp_path_factory.mktemp("packs") / "shapes", source())


def row(**changes: Any) -> DownstreamRow:
    return check(DownstreamRow, {**SEGMENT, **changes}, "row")


def task(pack: Pack, sees: tuple[int, int] = SIZE, **params: Any) -> Segment:
    piece = row(task={"name": "segment", "head": {"name": "fcn", "hidden": 16}, **params}).task
    torch.manual_seed(0)
    encoder = ENCODERS["vit"](sees, 3, **{key: value for key, value in ENCODER.items() if key != "name"})
    built: Segment = build(TASKS, piece, encoder, Facts.of(pack), CPU)
    return built


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_curve(folder / "curve.jsonl") if key in line]


def test_images_without_a_judged_pixel_have_no_label(pack: Pack) -> None:
    found = task(pack).labelled(pack.split("train"))
    np.testing.assert_array_equal(found, [index for index in range(48) if index != 3])


def test_instances_stand_in_for_semantic_maps(tmp_path: Path) -> None:
    instances = np.zeros(SIZE, np.uint8)
    instances[2:5, 3:9], instances[8:12, 10:20], instances[13:, :4] = 1, 2, 3
    boxes = np.array([[3, 2, 9, 5, 1], [10, 8, 20, 12, 0], [0, 13, 4, 16, 0]], np.float32)
    flags = np.array([0, 0, CROWD], np.uint8)

    def samples(split: str) -> Iterator[Sample]:
        for _ in range(2):
            yield Sample(np.zeros((3, *SIZE), np.uint8), boxes=boxes, box_flags=flags, instances=instances)

    of = Source(
        ["a", "b"],
        dict.fromkeys(COUNTS, 2),
        samples,
        annotations=("boxes", "instances"),
        segments=["background", "a", "b"],
    )
    split = make(tmp_path / "pack", of).split("train")
    np.testing.assert_array_equal(task(open_pack(tmp_path / "pack")).labelled(split), [0, 1])
    maps = MappedFetch(split, None, 0)([(0, 1)]).maps[0].numpy()
    expected = np.array([0, 2, 1, 255])[instances]
    np.testing.assert_array_equal(maps, expected)
    np.testing.assert_array_equal(maps, semantic_map(split, 1))


@pytest.mark.parametrize("window", [None, (9, 14)])
def test_augmented_maps_stay_on_their_images(pack: Pack, window: tuple[int, int] | None) -> None:
    augment = check(Augment, {"scale": [0.3, 1.0], "ratio": [0.5, 2.0], "flip": 0.5}, "augment")
    fetch = MappedFetch(pack.split("train"), augment, 0, window)
    batch = fetch([(epoch, index) for epoch in range(3) for index in range(16)])
    assert batch.maps.shape == (48, *(window or SIZE))
    assert batch.maps.dtype == torch.uint8
    assert type(batch.maps) is Tensor
    inside = 0
    colours = torch.from_numpy(COLOURS)
    for image, values in zip(batch.images.long(), batch.maps.long(), strict=True):
        # Where a neighbourhood is of one class, resizing mixes no colours.
        around = F.unfold(F.pad(values[None, None].float(), (3, 3, 3, 3), value=-1), 7)[0]
        one = (around == around[24]).all(0).reshape(values.shape) & (values != 255)
        off = (image - colours[values.clamp(max=3)].permute(2, 0, 1)).abs().amax(0)
        inside += int(one.sum())
        assert not (off[one] > 1).any()
    assert inside > 200
    plain = MappedFetch(pack.split("train"), None, 0)([(0, 5)])
    np.testing.assert_array_equal(plain.images[0], pack.split("train").images[5])
    np.testing.assert_array_equal(plain.maps[0], pack.split("train").array("semantic")[5])


def test_other_processes_fetch_the_same_batches(pack: Pack) -> None:
    fetch = MappedFetch(pack.split("train"), check(Augment, AUGMENT, "augment"), 3, (8, 12))
    order = Order(np.arange(48), 12, seed=2, start=1, steps=6)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mim_core.tasks"])
    alone, shared = list(loader(fetch, order)), list(loader(fetch, order, workers=2))
    assert len(alone) == len(shared) == 5
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.maps, other.maps)
    assert len(alone[0]) == 12


def test_the_loss_of_equal_scores_is_log_k_whatever_is_not_judged() -> None:
    maps = torch.randint(0, 5, (2, 6, 7)).to(torch.uint8)
    maps[0, :3] = 255
    logits = torch.zeros(2, 5, 6, 7, requires_grad=True)
    assert pixel_loss(logits, maps).item() == pytest.approx(math.log(5))
    noisy = torch.randn(2, 5, 6, 7)
    other = noisy.clone()
    other[0, :, :3] = 7
    assert pixel_loss(noisy, maps) == pixel_loss(other, maps)
    # The mean is over pixels, not over images.
    judged = maps != 255
    by_hand = -noisy.log_softmax(1).gather(1, maps.long().clamp(max=4)[:, None])[:, 0][judged].mean()
    torch.testing.assert_close(pixel_loss(noisy, maps), by_hand)


def test_a_batch_with_nothing_judged_has_no_loss_and_moves_nothing() -> None:
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_auxiliary_head_s_loss_is_added_by_its_weight(pack: Pack) -> None:
    batch = MappedFetch(pack.split("train"), None, 0)([(0, index) for index in range(4)])
    both = task(pack, auxiliary=0.4, head={"name": "fcn", "hidden": 16, "dropout": 0.0})
    assert both.model.auxiliary is not None
    both.model.auxiliary.layers[-1] = torch.nn.Identity()  # its dropout would draw anew
    ((player, loss),) = both.losses(batch, 0)
    main, auxiliary = (pixel_loss(scores, batch.maps) for scores in both.model.both(both._normalised(batch.images)))
    assert player == "model"
    torch.testing.assert_close(loss, main + 0.4 * auxiliary)
    assert task(pack).model.auxiliary is None


def test_corners_of_the_papers_windows() -> None:
    # BEiT's 640 px windows 426 px apart on an image of 640 x 853.
    assert corners((640, 853), (640, 640), (426, 426)) == [(0, 0), (0, 213)]
    assert corners((5, 7), (5, 7), (1, 1)) == [(0, 0)]
    assert corners((5, 8), (3, 3), (2, 3)) == list(product((0, 2), (0, 3, 5)))


@given(st.data())
def test_windows_cover_each_pixel_and_stay_inside(data: st.DataObject) -> None:
    size = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    window = tuple(data.draw(st.integers(1, side)) for side in size)
    stride = tuple(data.draw(st.integers(1, side)) for side in window)
    times = np.zeros(size, int)
    places = corners(size, (window[0], window[1]), (stride[0], stride[1]))
    for top, left in places:
        assert top + window[0] <= size[0]
        assert left + window[1] <= size[1]
        times[top : top + window[0], left : left + window[1]] += 1
    assert times.min() >= 1
    assert len(set(places)) == len(places)


def test_sliding_is_the_mean_of_windows_pixel_by_pixel(pack: Pack) -> None:
    model = task(pack, (8, 12), window_px=[8, 12]).model.eval()
    images, window, stride = torch.randn(2, 3, *SIZE), (8, 12), (3, 5)
    with torch.no_grad():
        found = slide(model, images, window, stride)
        places = corners(SIZE, window, stride)
        scores = {(top, left): model(images[..., top : top + 8, left : left + 12]) for top, left in places}
    for y, x in product(range(SIZE[0]), range(SIZE[1])):
        over = [
            each[..., y - top, x - left]
            for (top, left), each in scores.items()
            if 0 <= y - top < 8 and 0 <= x - left < 12
        ]
        torch.testing.assert_close(found[..., y, x], torch.stack(over).mean(0))


def test_one_window_of_the_whole_image_is_plain_inference(pack: Pack) -> None:
    plain, sliding = task(pack), task(pack, window_px=list(SIZE))
    images = torch.from_numpy(np.array(pack.split("test").images[:4]))
    plain.model.eval()
    sliding.model.eval()
    assert torch.equal(plain.logits(images), sliding.logits(images))
    assert task(pack, (8, 12), window_px=[8, 12]).stride == (5, 8)


@pytest.mark.parametrize(
    ("params", "sees", "message"),
    [
        ({"window_px": 32}, (32, 32), "window_px: found [32, 32]; images are [16, 24] px"),
        ({"window_px": 8}, SIZE, "window_px: found [8, 8]; the encoder is built for [16, 24] px"),
        ({"window_px": 8, "stride_px": [8, 9]}, (8, 8), "stride_px: found [8, 9]; windows are [8, 8] px"),
        ({"stride_px": 8}, SIZE, "stride_px: found [8, 8] without window_px"),
        ({"taps": [3]}, SIZE, "taps: found 3; the encoder's blocks are 1 to 2"),
        ({"head": {"name": "fcn", "skips": 1}}, SIZE, "head.skips: found 1; 0 of the encoder's maps"),
    ],
)
def test_what_does_not_fit_is_refused_at_build(
    pack: Pack, params: dict[str, Any], sees: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        task(pack, sees, **params)


def test_a_dataset_without_classes_of_pixels_is_refused() -> None:
    facts = Facts(SIZE, 3, (0.5,) * 3, (0.5,) * 3, ["a"], [], ["labels"])
    encoder = ENCODERS["vit"](SIZE, 3, patch_px=4, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"name: found segment for a dataset with 0 classes of pixels"):
        build(TASKS, row().task, encoder, facts, CPU)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("segment", "head: missing; this key is required"),
        ({"name": "segment", "head": "fnc"}, "head.name: 'fnc' is not one of ['linear', 'fcn', 'setr_pup', 'upernet']"),
        ({"name": "segment", "head": {"name": "upernet", "hiden": 8}}, "head.hiden: unknown key; known keys are"),
        ({"name": "segment", "head": "linear", "taps": [0]}, "taps.0: found 0; must be greater than 0"),
    ],
)
def test_a_row_s_fault_is_told_with_its_path(task: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        row(task=task)
    assert str(error.value).startswith(f"row.task.{message}")


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([8, 12], ""),
        ([8, 10], "baselines.one.encoder: image width: found 10 px; it must be a multiple of the encoder's patch_px 4"),
        ([20, 12], "baselines.one.task.window_px: found [20, 12]; images are [16, 24] px"),
    ],
)
def test_a_row_s_encoder_is_checked_at_the_size_of_its_windows(tmp_path: Path, window: list[int], message: str) -> None:
    one = {**SEGMENT, "task": {"name": "segment", "head": "linear", "window_px": window}}
    files: dict[str, Any] = {
        "data": {"data": {"shapes": {"source": {"name": "scenes", "size_px": list(SIZE)}}}},
        "targets": {"targets": {}},
        "pretrain": {"pretrain_fitted": {}, "pretrain": {}},
        "downstream": {"baselines": {"one": one}, "supervised": {}, "downstream": {}, "continued": {}},
        "ablations": {"ablations_fitted": {}, "ablations": {}},
        "search": {"search_fitted": {}, "search": {}},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    if not message:
        assert load(tmp_path).judged()["one"].task.params()["window_px"] == (8, 12)
        return
    with pytest.raises(SpecError) as error:
        load(tmp_path)
    assert message in str(error.value)


def test_metrics_are_those_of_the_split_as_a_whole(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, split = task(pack), pack.split("test")
    found = segment.evaluate(split)
    assert segment.model.training
    assert set(found) == {"miou", "pixel_accuracy", "mean_accuracy", "cross_entropy"}
    # One image at a time, and on another path.
    monkeypatch.setattr("mim_core.tasks.segment.segment.AT_ONCE", 1)
    again = segment.evaluate(split)
    assert found == pytest.approx(again)
    segment.model.eval()
    logits = segment.logits(torch.from_numpy(np.array(split.images))).detach()
    maps = torch.from_numpy(np.array(split.array("semantic"))).long()
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits, maps, ignore_index=255).item())
    judged = maps != 255
    scores = jaccard_score(maps[judged], logits.argmax(1)[judged], average=None, labels=range(4), zero_division=0)
    assert found["miou"] == pytest.approx(scores.mean())


def test_a_prediction_is_the_best_class_of_each_pixel(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, images = task(pack), torch.from_numpy(np.array(pack.split("test").images[:5]))
    segment.model.eval()
    monkeypatch.setattr("mim_core.tasks.segment.segment.AT_ONCE", 2 * 4 * SIZE[0] * SIZE[1])
    with torch.no_grad():
        found = np.stack([one["map"] for one in segment.predict(images)])
        np.testing.assert_array_equal(found, segment.logits(images).argmax(1))
    assert found.dtype == np.uint8


def test_a_split_with_nothing_judged_is_refused(tmp_path: Path) -> None:
    def samples(split: str) -> Iterator[Sample]:
        for _ in range(COUNTS[split]):
            yield Sample(np.zeros((3, *SIZE), np.uint8), semantic=np.full(SIZE, 255, np.uint8))

    pack = make(tmp_path / "pack", Source(["flat"], COUNTS, samples, annotations=("semantic",), segments=NAMES))
    with pytest.raises(ValueError, match=r"test: no pixel of its semantic maps is judged"):
        task(pack).evaluate(pack.split("test"))


def test_training_learns_and_leaves_what_it_says(tmp_path: Path, pack: Pack) -> None:
    head = {"name": "upernet", "hidden": 16}
    long = row(
        task={"name": "segment", "head": head, "auxiliary": 0.4}, optim={**TUNE, "epochs": 30, "layer_decay": 0.9}
    )
    found = downstream(long, pack, tmp_path, 0, 4e-3, None, test=True)
    losses = curve(tmp_path, "loss")
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    assert found["metric"] == "miou"
    assert found["test_score"] == found["test_miou"] > 0.4
    weights, about = checkpoint.read_weights(tmp_path / "model.safetensors")
    assert about["task"] == long.task.model_dump(mode="json")
    assert about["segments"] == NAMES
    # The file rebuilds the task.
    again = task(pack, head=head, auxiliary=0.4)
    again.model.load_state_dict(weights)
    assert again.evaluate(pack.split("test"))["miou"] == pytest.approx(found["test_miou"])
    with Image.open(tmp_path / "predictions.png") as page:
        assert page.width > 300


class Killed(BaseException):
    pass


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = {"name": "segment", "head": {"name": "upernet", "hidden": 8}, "window_px": [8, 12], "auxiliary": 0.4}
    one = row(task=windows, drop_path=0.2, checkpoint_minutes=1.0e-6)
    downstream(one, pack, tmp_path / "whole", 5, 2e-3, None, test=True)
    report = Run.report

    def dies(run: Run, step: int, scalars: Scalars) -> None:
        if step == 7:
            raise Killed
        report(run, step, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "report", dies)
        with pytest.raises(Killed):
            downstream(one, pack, tmp_path / "broken", 5, 2e-3, None, test=True)
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints") is not None
    downstream(one, pack, tmp_path / "broken", 5, 2e-3, None, test=True)
    for product_ in ("model.safetensors", "predictions.png"):
        assert (tmp_path / "whole" / product_).read_bytes() == (tmp_path / "broken" / product_).read_bytes()
    for key in ("loss", "validation_miou", "validation_cross_entropy"):
        assert curve(tmp_path / "whole", key) == curve(tmp_path / "broken", key)


def test_an_encoder_moves_from_whole_images_to_windows_and_on(tmp_path: Path, pack: Pack) -> None:
    learned = {**ENCODER, "positions": "learned"}
    pretrain(pretrain_row(encoder=learned, optim={**OPTIM, "epochs": 1}), pack, tmp_path / "pretrain", seed=0)
    windows = {"name": "segment", "head": "linear", "window_px": [8, 12]}
    short = {**TUNE, "epochs": 0.5}
    first = row(task=windows, init="one", encoder=None, optim=short)
    downstream(first, pack, tmp_path / "first", 0, 1e-30, tmp_path / "pretrain" / "encoder.safetensors", test=True)
    weights, about = checkpoint.read_weights(tmp_path / "first" / "model.safetensors")
    assert (about["size"], about["sees"]) == ([16, 24], [8, 12])
    assert weights["encoder.backbone.pos_embed"].shape[1] == 1 + 2 * 3
    second = row(init="first", encoder=None, optim=short)
    downstream(second, pack, tmp_path / "second", 0, 1e-30, tmp_path / "first" / "model.safetensors", test=True)
    weights, _ = checkpoint.read_weights(tmp_path / "second" / "model.safetensors")
    assert weights["encoder.backbone.pos_embed"].shape[1] == 1 + 4 * 6


def test_colours_stay_apart_for_all_kinds_of_sight() -> None:
    assert palette(40)[:12] == palette(12)
    for count, least in ((12, 0.07), (40, 0.045)):
        places = seen([*palette(count), BACKGROUND, UNJUDGED])
        distances = apart(places, places) + 9 * np.eye(count + 2)
        assert distances.min() > least


def rows_of(count: int, size: tuple[int, int], values: list[int]) -> list[sheet.Row]:
    rng = np.random.default_rng(0)

    def one() -> Tensor:
        return torch.from_numpy(rng.choice(values, size).astype(np.uint8))

    return [sheet.Row(torch.rand(3, *size), one(), one(), 0.5) for _ in range(count)]


def test_a_page_shows_the_maps_in_the_legend_s_colours() -> None:
    rows = rows_of(5, (8, 12), [0, 2, 255])
    colours = sheet.legend(rows, NAMES)
    assert colours == {0: BACKGROUND, 2: palette(1)[0], 255: UNJUDGED}
    page = np.array(sheet.draw(rows, NAMES, "Five"))
    assert {tuple(map(int, colour)) for colour in page.reshape(-1, 3)} >= set(colours.values())
    # The second column of the first image: 96 px wide tiles of 8 px a pixel.
    tile = page[54 : 54 + 64, 10 + 100 : 10 + 100 + 96][4::8, 4::8]
    expected = np.array([[colours[int(value)] for value in line] for line in rows[0].true])
    np.testing.assert_array_equal(tile, expected)


@pytest.mark.parametrize(("count", "size", "names"), [(1, (5, 5), 2), (7, (200, 301), 150), (12, (32, 32), 11)])
def test_a_page_of_any_size(count: int, size: tuple[int, int], names: int) -> None:
    listed = [f"a long name of class {at}" for at in range(names)]
    page = sheet.draw(rows_of(count, size, list(range(names))), listed, "A caption", "A note")
    assert page.width < 1300
    assert page.height > 100
