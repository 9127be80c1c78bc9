"""Time reading of training images: ours beside ImageFolder, `datasets` and `webdataset`, in turns, on one core.

    python benchmarks/loader.py [--rounds 5]

Every pipeline gives batches under the same augmentation: a crop of 20 to 100 % of the area at an aspect of 3/4 to 4/3,
resized, flipped half of the time. Peers decode JPEG each time, at 64 px of 64 x 64 files and at 224 px of 500 x 375
files; ours has decoded them once into a pack (short side 224, centre), and the time of that is given too. `ours with
masks` draws one for each image as well, as pretraining on a CPU does and no peer here. `ours to uint8` is what a long
run on a GPU takes: images, and the crop and flip that are drawn for each; the GPU does these, and draws the masks.
`ours to uint8, as it is` draws no crop either. Images are drawn: a slope, shapes and noise. Peers that are not
installed are left out: `pip install datasets webdataset` in an environment of your own.

Writes benchmarks/loader.json and the table benchmarks/loader.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import described, table
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import io as tv_io
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mim_core.data.fit import place
from mim_core.data.order import Order, loader
from mim_core.data.pack import Pack, Sample, Source, open_pack, write
from mim_core.devices import keep_freed_memory
from mim_core.grid import Grid
from mim_core.masks import random as random_mask
from mim_core.pretext import MaskedFetch
from mim_core.transforms import Augment, normalise

BATCH = 64
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = {64: (64, 64), 224: (500, 375)}
COUNTS = {64: 1024, 224: 256}

Pipeline = Callable[[], Iterable[Any]]
"""One pass over the images, in batches."""


def drawn(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture with something of a photograph's smoothness, edges and grain: JPEG decodes it no faster."""
    width, height = size
    corners = rng.integers(0, 256, (2, 2, 3), np.uint8)
    picture = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(4, max(5, width // 3)), rng.integers(4, max(5, height // 3))
        draw.ellipse([int(x), int(y), int(x + w), int(y + h)], fill=tuple(map(int, rng.integers(0, 256, 3))))
    grain = np.asarray(picture, np.int16) + rng.normal(0, 8, (height, width, 1)).astype(np.int16)
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def files(folder: Path, size: int, count: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(SHAPES[size], rng).save(path, quality=90)


def image_folder(folder: Path, size: int, transform: Any, **options: Any) -> Pipeline:
    found = DataLoader(ImageFolder(str(folder), transform, **options), BATCH, shuffle=True)
    return lambda: (images for images, _ in found)


def of_version_1(size: int) -> Any:
    crop = v1.RandomResizedCrop(size, SCALE, RATIO)
    return v1.Compose([crop, v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)])


def of_version_2(size: int) -> Any:
    crop = v2.RandomResizedCrop(size, SCALE, RATIO, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), to_float, v2.Normalize(MEAN, STD)])


def of_version_2_pil(size: int) -> Any:
    crop = v2.RandomResizedCrop(size, SCALE, RATIO, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage(), to_float, v2.Normalize(MEAN, STD)])


def hf_datasets(folder: Path, size: int, temporary: Path) -> Pipeline:
    from datasets import Dataset, Features, disable_progress_bars
    from datasets import Image as ImageFeature

    disable_progress_bars()
    paths = [{"path": str(path), "bytes": path.read_bytes()} for path in sorted(folder.glob("*/*.jpg"))]
    dataset = Dataset.from_dict({"image": paths}, features=Features({"image": ImageFeature()}))
    transform = of_version_1(size)

    def transformed(batch: Any) -> Any:
        return {"image": [transform(image.convert("RGB")) for image in batch["image"]]}

    found: Any = DataLoader(dataset.with_transform(transformed), BATCH, shuffle=True)  # type: ignore[arg-type]
    return lambda: (batch["image"] for batch in found)


def web_dataset(folder: Path, size: int, temporary: Path) -> Pipeline:
    import webdataset

    shard = temporary / f"shard_{size}.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.glob("*/*.jpg")):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    transform = of_version_1(size)

    def one_pass() -> Iterator[Any]:
        dataset = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        images = dataset.shuffle(256).decode("pil").to_tuple("jpg").map_tuple(transform)
        return (batch[0] for batch in DataLoader(images, BATCH))

    return one_pass


def pack_of(folder: Path, size: int, out: Path) -> tuple[Pack, float]:
    """The pack of a folder, and the CPU-seconds that it took to make."""
    paths = sorted(folder.glob("*/*.jpg"))

    def samples(split: str) -> Iterator[Sample]:
        for path in paths if split == "train" else []:
            picture = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
            yield Sample(place(picture.shape[1:], (size, size), "cover").image(picture))

    begun = time.process_time()
    write(Source([], {"train": len(paths), "validation": 0, "test": 0}, samples), out, {})
    return open_pack(out), time.process_time() - begun


def ours(pack: Pack, size: int, augment: Augment | None, *, on_device: bool = False, masks: bool = False) -> Pipeline:
    """The product's loader: of what a pretraining step takes."""
    images, passes = pack.split("train"), itertools.count()
    fetch = MaskedFetch(images, Grid(size, size, 16), random_mask if masks else None, augment, 0, on_device)

    def one_pass() -> Iterator[Any]:
        per = len(images) // BATCH
        start = next(passes) * per
        for batch in loader(fetch, Order(np.arange(len(images)), BATCH, 0, start, start + per)):
            yield batch.images if on_device else normalise(batch.images, MEAN, STD)

    return one_pass


def pipelines(folder: Path, size: int, temporary: Path) -> tuple[dict[str, Pipeline], float]:
    pack, seconds = pack_of(folder, size, temporary / f"pack_{size}")
    augment = Augment(scale=SCALE, ratio=RATIO, flip=0.5)
    found: dict[str, Pipeline] = {
        "ours": ours(pack, size, augment),
        "ours with masks": ours(pack, size, augment, masks=True),
        "ours to uint8": ours(pack, size, augment, on_device=True),
        "ours to uint8, as it is": ours(pack, size, None, on_device=True),
        "ImageFolder, v1": image_folder(folder, size, of_version_1(size)),
        "ImageFolder, v2 on PIL": image_folder(folder, size, of_version_2_pil(size)),
        "decode_image, v2 on tensors": image_folder(
            folder, size, of_version_2(size), loader=lambda path: tv_io.decode_image(path, tv_io.ImageReadMode.RGB)
        ),
    }
    for name, make in {"datasets": hf_datasets, "webdataset": web_dataset}.items():
        try:
            found[name] = make(folder, size, temporary)
        except ImportError:
            print(f"{name} is not installed and left out: pip install {name}", flush=True)
    return found, seconds


def rate(pipeline: Pipeline) -> float:
    """Images a CPU-second of one pass."""
    begun, count = time.process_time(), 0
    for images in pipeline():
        count += len(images)
    return count / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a job does; the peers gain by it as well
    said: dict[str, Any] = {"machine": described(torch.device("cpu")), "sizes": {}}
    rows = []
    for size, count in COUNTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "images"
            files(folder, size, count)
            found, seconds = pipelines(folder, size, Path(temporary))
            rates: dict[str, list[float]] = {name: [] for name in found}
            for turn in range(given.rounds + 1):
                for name in list(found)[:: -1 if turn % 2 else 1]:
                    value = rate(found[name])
                    if turn:  # the first round warms caches
                        rates[name].append(value)
        base = rates["ImageFolder, v1"]
        result: dict[str, Any] = {"pack_images_per_s": count / seconds}
        for name, one in rates.items():
            ratios = [a / b for a, b in zip(one, base, strict=True)]
            result[name] = {
                "images_per_s": statistics.median(one),
                "ratio": statistics.median(ratios),
                "rounds": ratios,
            }
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            rows.append([f"{size} px", name, f"{statistics.median(one):,.0f}", spread])
        rows.append([f"{size} px", "making the pack, once", f"{count / seconds:,.0f}", ""])
        said["sizes"][str(size)] = result
        (given.out / "loader.json").write_text(json.dumps(said, indent=1) + "\n")
    text = table(["images", "pipeline", "images/CPU-s", "over ImageFolder, v1 (spread)"], rows)
    (given.out / "loader.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
