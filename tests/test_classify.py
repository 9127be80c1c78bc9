"""Fine-tuning for classes: mixing, heads, moving averages, presence, budgets, a supervised middle stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_pieces import AUGMENT, COUNTS, ENCODER, TUNE, classify_row, tiny_pack
from PIL import Image
from timm.data.mixup import Mixup

from mim_core import checkpoint
from mim_core.data.pack import Pack, Sample, Source, open_pack, write
from mim_core.devices import Compute
from mim_core.encoders import ENCODERS
from mim_core.files import read_curve
from mim_core.jobs import downstream
from mim_core.params import EncoderOf
from mim_core.spec import build, check
from mim_core.tasks import TASKS
from mim_core.tasks.classify import Classify, Labelled
from mim_core.tasks.confusion import most_confused
from mim_core.tasks.task import Facts
from mim_core.transforms import normalise, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Compute(torch.device("cpu"), bf16=False)
FACTS = Facts((16, 16), 3, (0.4,) * 3, (0.2,) * 3, ["a", "b", "c", "d"], [], ["labels"])
SWIN = {"name": "swin", "patch_px": 2, "width": 8, "depths": [1, 1], "heads": [1, 2], "window": 4}
MIXED = {"name": "classify", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "head_init_scale": 0.001}
HARD = {**AUGMENT, "randaugment": {}, "erase": 0.25, "jitter": 0.2}


def encoder_of(piece: dict[str, Any] = ENCODER) -> Any:
    return build(ENCODERS, check(EncoderOf, {"encoder": piece}, "row").encoder, (16, 16), 3)


def classify(piece: dict[str, Any] = ENCODER, **params: Any) -> Classify:
    torch.manual_seed(0)
    return Classify(encoder_of(piece), FACTS, CPU, **params)


def batch(images: int = 8) -> Labelled:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, 16, 16), np.uint8))
    return Labelled(pixels, torch.from_numpy(rng.integers(0, 4, images)))


def loss_at(task: Classify, given: Labelled, step: int) -> float:
    # As the loop does.
    torch.manual_seed(5 << 32 | step)
    ((name, loss),) = task.losses(given, step)
    assert name == "model"
    return loss.item()


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_timms_and_follows_the_step_alone(mixing: dict[str, float]) -> None:
    task, given = classify(smoothing=0.1, **mixing), batch()
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    losses = [loss_at(task, given, step) for step in range(4)]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    np.random.seed(7)
    assert [loss_at(task, given, step) for step in (3, 1)] == [losses[3], losses[1]]
    assert len(set(losses)) == 4

    mix = Mixup(mixing.get("mixup", 0.0), mixing.get("cutmix", 0.0), label_smoothing=0.1, num_classes=4)
    torch.manual_seed(5 << 32 | 2)
    with seeded(np.random.default_rng(int(torch.randint(2**62, ())))):
        images, targets = mix(normalise(given.images, FACTS.mean, FACTS.std), given.labels)
    wanted = -(targets * task.model(images).log_softmax(-1)).sum(-1).mean()
    assert losses[2] == pytest.approx(wanted.item(), rel=1e-5)
    # The batch is not the mixing's to change.
    assert torch.equal(given.images, batch().images)


def test_a_batch_that_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.batch: found 7 images a step; .* choose an even number"):
        loss_at(classify(mixup=0.8), batch(7), 0)


@pytest.mark.parametrize(
    ("piece", "params", "said"),
    [
        (ENCODER, {"predicts": "presence", "mixup": 0.8}, "mixup: found 0.8 with predicts presence; .* delete it"),
        (ENCODER, {"predicts": "presence", "cutmix": 1.0}, "cutmix: found 1.0 with predicts presence"),
        (ENCODER, {"predicts": "presence", "smoothing": 0.1}, "smoothing: found 0.1 with predicts presence"),
        (SWIN, {"pooling": "class"}, "pooling: found the class token's; the encoder, a Swin, has none; choose mean"),
    ],
)
def test_params_that_do_not_go_together_are_refused(piece: dict[str, Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classify(piece, **params)


def test_the_first_weights_of_the_layer_are_shrunk() -> None:
    plain, small = classify().model.classify, classify(head_init_scale=0.001).model.classify
    torch.testing.assert_close(small.weight, plain.weight * 0.001)
    assert not small.bias.any()


def test_the_class_token_is_classified_as_the_encoder_gives_it() -> None:
    task, given = classify(pooling="class"), batch()
    model = task.model.eval()
    images = normalise(given.images, FACTS.mean, FACTS.std)
    _, summary = model.encoder.encode(model.encoder.embed(images))
    torch.testing.assert_close(model(images), model.classify(summary[:, 0]))
    assert "norm.weight" not in model.state_dict()


def test_smoothed_targets_are_torchs_where_nothing_is_mixed() -> None:
    task, given = classify(smoothing=0.3), batch()
    wanted = F.cross_entropy(task.logits(given.images), given.labels, label_smoothing=0.3)
    assert loss_at(task, given, 0) == pytest.approx(wanted.item(), rel=1e-6)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def curve(folder: Path) -> list[dict[str, Any]]:
    dropped = {"seconds", "time", "images_per_s"}
    lines = read_curve(folder / "curve.jsonl")
    return [{key: value for key, value in line.items() if key not in dropped} for line in lines]


def interrupted(at: int) -> Any:
    """The loss of a task whose process dies at a step."""
    whole = Classify.losses

    def losses(self: Classify, given: Any, step: int) -> Any:
        if step == at:
            raise KeyboardInterrupt
        return whole(self, given, step)

    return losses


def test_a_resume_with_mixing_averages_and_augmentation_is_exact(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = classify_row(task=MIXED, augment=HARD, optim={**TUNE, "epochs": 3, "ema": 0.9}, checkpoint_minutes=1e-6)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = downstream(row, pack, whole, 1, 2e-3, None, True)
    with monkeypatch.context() as patched:
        patched.setattr(Classify, "losses", interrupted(7))
        with pytest.raises(KeyboardInterrupt):
            downstream(row, pack, broken, 1, 2e-3, None, True)
    assert (broken / "checkpoints" / "step_000000007").is_dir()
    again = downstream(row, pack, broken, 1, 2e-3, None, True)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert curve(whole) == curve(broken)
    assert again["test_accuracy"] == result["test_accuracy"]
    # A finished job that is run again gives the same file: its average is in the checkpoint.
    (broken / "model.safetensors").unlink()
    downstream(row, pack, broken, 1, 2e-3, None, True)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


def test_averaged_weights_are_evaluated_and_saved_and_training_goes_on_with_its_own(tmp_path: Path, pack: Pack) -> None:
    plain = classify_row(optim={**TUNE, "epochs": 2})
    averaged = classify_row(optim={**TUNE, "epochs": 2, "ema": 0.8})
    downstream(plain, pack, tmp_path / "plain", 0, 2e-3, None, True)
    downstream(averaged, pack, tmp_path / "averaged", 0, 2e-3, None, True)

    def read(name: str) -> dict[str, torch.Tensor]:
        return checkpoint.read_weights(tmp_path / name / "model.safetensors")[0]

    _, own, players = checkpoint.load(checkpoint.latest(tmp_path / "averaged" / "checkpoints"))  # type: ignore[arg-type]
    average = players["model"]["average"]
    for name, tensor in read("averaged").items():
        assert torch.equal(tensor, average.get(name, tensor)), name
    # What was trained is what is trained without an average, evaluations in the midst or not.
    for name, tensor in read("plain").items():
        assert torch.equal(tensor, own.get(name, tensor)), name
    assert not torch.equal(average["classify.weight"], own["classify.weight"])
    losses = [[line["loss"] for line in curve(tmp_path / name) if "loss" in line] for name in ("plain", "averaged")]
    assert losses[0] == losses[1]


def presence_pack(folder: Path) -> Pack:
    """Images whose left and right halves are bright where class 0 and class 1 are there; class 2 is judged in few."""

    def samples(split: str) -> Iterator[Sample]:
        rng = np.random.default_rng(list(COUNTS).index(split))
        for _ in range(COUNTS[split]):
            there = rng.integers(0, 2, 2)
            image = rng.integers(0, 60, (3, 16, 16))
            image[:, :, :8] += 150 * there[0]
            image[:, :, 8:] += 150 * there[1]
            judged = -1 if rng.random() < 0.7 else there[0] & there[1]
            yield Sample(image.astype(np.uint8), presence=np.array([*there, judged], np.int8))

    source = Source(["left", "right", "both"], COUNTS, samples, annotations=("presence",))
    write(source, folder, {"source": {"name": "tiny"}})
    return open_pack(folder)


def test_presence_is_learned_and_scored_by_voc07s_map(tmp_path: Path) -> None:
    pack = presence_pack(tmp_path / "pack")
    row = classify_row(task={"name": "classify", "predicts": "presence"}, augment=None, optim={**TUNE, "epochs": 12})
    result = downstream(row, pack, tmp_path / "job", 0, 3e-3, None, True)
    assert result["metric"] == "voc07_map"
    assert result["test_score"] == result["test_voc07_map"] > 0.8
    assert result["test_cross_entropy"] < 0.6
    assert size_of(tmp_path / "job" / "predictions.png")[0] > 700


def test_what_is_not_judged_moves_nothing(tmp_path: Path) -> None:
    task = Classify(encoder_of(), FACTS, CPU, predicts="presence")
    logits = torch.randn(6, 4, requires_grad=True)
    labels = torch.randint(-1, 2, (6, 4), dtype=torch.int8)
    task.answer.loss(logits, labels).backward()
    assert logits.grad is not None
    assert ((logits.grad == 0) == (labels < 0)).all()


@pytest.mark.parametrize("seed", [0, 3])
def test_every_task_sees_the_same_labels_of_a_seed(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    seen: dict[str, list[int]] = {}
    tune = {**TUNE, "batch": 4, "epochs": 0.5}
    for name, task in TASKS.items():
        if "labels" not in task.needs:  # type: ignore[attr-defined]
            continue
        # Each task has its own way to begin: what it is given is noted before.
        inner = task.begin  # type: ignore[attr-defined]

        def begin(self: Any, images: Any, chosen: Any, inner: Any = inner, name: str = name) -> None:
            seen[name] = chosen.tolist()
            inner(self, images, chosen)

        monkeypatch.setattr(task, "begin", begin)
        learns = {"lr_grid": [1e-3], "optim": tune} if task.trains else {"lr_grid": [], "optim": None}  # type: ignore[attr-defined]
        row = classify_row(task=name, labels=10, augment=None, drop_path=0.0, **learns)
        downstream(row, pack, tmp_path / f"{name}_{seed}", seed, 1e-3, None, False)
    assert set(seen) >= {"classify", "probe", "knn"}
    assert len({tuple(chosen) for chosen in seen.values()}) == 1
    labels = pack.split("train").labels[seen["knn"]]
    assert sorted(np.bincount(labels)) == [2, 2, 3, 3]


@pytest.mark.parametrize("piece", [ENCODER, {**ENCODER, "positions": "relative", "layer_scale": 0.1}, SWIN])
def test_a_supervised_middle_stage_gives_its_encoder_to_other_classes_and_sizes(
    tmp_path: Path, pack: Pack, piece: dict[str, Any]
) -> None:
    first = classify_row(encoder=piece, optim={**TUNE, "epochs": 1})
    downstream(first, pack, tmp_path / "first", 0, 1e-3, None, True)
    other = tiny_pack(tmp_path / "other", size=(16, 32), classes=3)
    # A rate so small that no bit moves.
    row = classify_row(encoder=None, init="first", optim={**TUNE, "epochs": 0.5})
    downstream(row, other, tmp_path / "second", 0, 1e-30, tmp_path / "first" / "model.safetensors", True)
    before, said = checkpoint.read_weights(tmp_path / "first" / "model.safetensors")
    after, about = checkpoint.read_weights(tmp_path / "second" / "model.safetensors")
    resized = [name for name in after if name.startswith("encoder.") and after[name].shape != before[name].shape]
    assert all("relative_position" in name or "pos_embed" in name or "attn_mask" in name for name in resized)
    learned = [name for name in after if name.startswith("encoder.") and name not in resized and "index" not in name]
    assert len(learned) > 10
    assert all(torch.equal(after[name], before[name]) for name in learned if "pos_embed" not in name)
    assert after["classify.weight"].shape[0] == 3
    assert about["classes"] == ["0", "1", "2"]
    assert said["encoder"]["name"] == about["encoder"]["name"] == piece["name"]


def test_a_picture_is_drawn_with_and_without_mistakes(tmp_path: Path, pack: Pack) -> None:
    task, test = classify(), pack.split("test")
    task.draw(test, tmp_path / "mistakes.png")
    labels = torch.from_numpy(test.labels)
    task._scores = lambda split: (F.one_hot(labels, 4).float() * 9, labels)  # type: ignore[method-assign]
    task.draw(test, tmp_path / "none.png")
    sizes = [size_of(tmp_path / name) for name in ("mistakes.png", "none.png")]
    assert sizes[0][1] > sizes[1][1]


def test_the_most_confused_classes_are_shown() -> None:
    matrix = np.diag([50] * 30)
    matrix[3, 17] = 40  # 44 % of class 3
    matrix[8, 2] = 10
    matrix[21, 5] = 1
    assert most_confused(matrix, 4).tolist() == [2, 3, 8, 17]
    assert most_confused(matrix, 6).tolist() == [2, 3, 5, 8, 17, 21]
    # A class without images is confused with none.
    matrix[9] = 0
    assert 9 not in most_confused(matrix, 6)


def test_images_stay_normalised_as_the_encoder_knows_them(tmp_path: Path, pack: Pack) -> None:
    """A dataset of other colours is shown to an encoder by those that it was trained with."""
    downstream(classify_row(optim={**TUNE, "epochs": 0.5}), pack, tmp_path / "first", 0, 1e-3, None, True)
    weights, said = checkpoint.read_weights(tmp_path / "first" / "model.safetensors")
    changed = {**said, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    checkpoint.write_weights(tmp_path / "elsewhere.safetensors", weights, changed)
    row = classify_row(encoder=None, init="elsewhere", optim={**TUNE, "epochs": 0.5})
    result = downstream(row, pack, tmp_path / "second", 0, 1e-3, tmp_path / "elsewhere.safetensors", True)
    after, about = checkpoint.read_weights(tmp_path / "second" / "model.safetensors")
    assert (about["mean"], about["std"]) == (changed["mean"], changed["std"])
    task = Classify(
        encoder_of(), Facts((16, 16), 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ["0", "1", "2", "3"], [], []), CPU
    )
    task.model.load_state_dict(after)
    assert task.evaluate(pack.split("test"))["cross_entropy"] == pytest.approx(result["test_cross_entropy"], rel=1e-5)
    assert said["mean"] == pytest.approx(pack.mean)
