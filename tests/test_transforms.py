"""Augmentation: what is off draws nothing, what is on follows the sample's generator alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from mim_core.masks import generator
from mim_core.params import DownstreamRow
from mim_core.spec import SpecError, check
from mim_core.transforms import Augment, crop_box, seeded

PLAIN = {"scale": [0.3, 0.9], "flip": 0.5}
ON: dict[str, dict[str, Any]] = {
    "jitter": {"jitter": 0.4},
    "randaugment": {"randaugment": {}},
    "erase": {"erase": 1.0},
    "all": {"jitter": 0.4, "randaugment": {"magnitude": 5, "operations": 3}, "erase": 0.5},
}


def augment(**fields: Any) -> Augment:
    return check(Augment, {**PLAIN, **fields}, "augment")


def picture(channels: int = 3, size: tuple[int, int] = (24, 40)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (channels, *size), np.uint8))


def rng(index: int = 0) -> np.random.Generator:
    return generator(3, 1, index, stream=1)


def test_crop_and_flip_are_drawn_as_before_and_nothing_else_is() -> None:
    image = picture()
    for index in range(8):
        draws = rng(index)
        top, left, h, w = crop_box(draws, 24, 40, (0.3, 0.9), (3 / 4, 4 / 3))
        wanted = TF.resized_crop(image, top, left, h, w, [24, 40], antialias=True)
        wanted = TF.horizontal_flip(wanted) if draws.random() < 0.5 else wanted
        ours = rng(index)
        assert torch.equal(augment()(image, ours), wanted)
        assert ours.random() == draws.random()


@pytest.mark.parametrize("name", ON)
def test_an_image_is_augmented_by_its_own_generator_and_no_other_is_moved(name: str) -> None:
    chosen, image = augment(**ON[name]), picture()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[index]
    first = [chosen(image, rng(index)) for index in range(12)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]
    # Whatever was drawn elsewhere, in whichever order the images come, as in loader workers.
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    again = {index: chosen(image, rng(index)) for index in reversed(range(12))}
    assert all(torch.equal(one, again[index]) for index, one in enumerate(first))
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in first)
    plain = [augment()(image, rng(index)) for index in range(12)]
    assert sum(not torch.equal(one, other) for one, other in zip(first, plain, strict=True)) >= 6
    assert len({one.numpy().tobytes() for one in first}) == 12


def test_what_comes_after_leaves_the_crop_and_flip_as_they_were() -> None:
    for index in range(6):
        erased, plain = augment(erase=1.0)(picture(), rng(index)), augment()(picture(), rng(index))
        changed = (erased != plain).any(0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        # A rectangle of 2 to 33 % (to whole px) has changed, and nothing outside.
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / changed.numel()
        assert 0.015 < area < 0.36
        inside = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
        assert abs(inside.mean().item() - 128) < 30
        assert 35 < inside.std().item() < 80


def test_erasing_happens_as_often_as_it_is_told() -> None:
    whole = augment(scale=[1.0, 1.0], ratio=[40 / 24, 40 / 24], flip=0.0, erase=0.3)
    image = picture()
    share = np.mean([not torch.equal(whole(image, rng(index)), image) for index in range(300)])
    assert share == pytest.approx(0.3, abs=0.08)


def test_jitter_of_grey_stays_grey() -> None:
    grey = picture(1).expand(3, -1, -1).contiguous()
    changed = augment(jitter=0.8)(grey, rng())
    assert (changed[0].int() - changed[1].int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["jitter", "randaugment"])
def test_colours_of_other_channels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"augment\.{name}: found images of 5 channels; .* delete it"):
        augment(**ON[name])(picture(5), rng())
    assert augment(**ON[name])(picture(1), rng()).shape == (1, 24, 40)
    assert augment(erase=1.0)(picture(5), rng()).shape == (5, 24, 40)


@pytest.mark.parametrize("name", ["randaugment", "erase"])
def test_what_annotations_cannot_follow_is_refused_beside_them(name: str) -> None:
    mask = tv_tensors.Mask(torch.ones(24, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"augment\.{name}: found it set; masks and boxes cannot follow it"):
        augment(**ON[name]).jointly(rng(), picture(), mask)
    image, moved = augment(jitter=0.4).jointly(rng(), picture(), mask)
    assert torch.equal(moved, augment().jointly(rng(), picture(), mask)[1])
    assert not torch.equal(image, augment()(picture(), rng()))


def test_seeded_restores_also_after_an_error() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()

    def fail() -> None:
        with seeded(rng()):
            torch.rand(3)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"randaugment": {"magnitude": 30}}, r"row\.augment\.randaugment\.magnitude: found 30; must be less than"),
        ({"randaugment": {"strength": 1}}, r"row\.augment\.randaugment\.strength: unknown key"),
        ({"erase": 1.5}, r"row\.augment\.erase: found 1\.5"),
        ({"jiter": 0.4}, r"did you mean 'jitter'"),
    ],
)
def test_faults_of_a_row_are_told(fields: dict[str, Any], said: str) -> None:
    row = {"task": "classify", "data": "d", "init": "x", "seeds": [0], "augment": {**PLAIN, **fields}}
    with pytest.raises(SpecError, match=said):
        check(DownstreamRow, row, "row")
