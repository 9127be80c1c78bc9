"""Models that answer: files of a run's weights and of images in, plain values out.

An image is read, turned by its EXIF, fitted and normalised as those of the pack that the model was judged on. A model
computes in the precision that its row was judged in on this device, so the same image gets the same numbers; another
number of images at once may change their last bits. Encoders compute in fp32, whatever they were trained in.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from mim_core import devices
from mim_core.checkpoint import read_weights
from mim_core.data import images
from mim_core.data.fit import Fit, Placing, place
from mim_core.data.pack import NOT_JUDGED
from mim_core.encoders import ENCODERS
from mim_core.params import EncoderOf
from mim_core.spec import OneOf, Piece, Strict, build, check
from mim_core.tasks import TASKS
from mim_core.tasks.task import Facts
from mim_core.transforms import normalise

Answer = dict[str, Any]
SIDES = ("left", "top", "right", "bottom")


class TaskOf(Strict):
    """The task that a file of weights names in its header."""

    task: Annotated[Piece, OneOf(TASKS)]


@dataclass(frozen=True)
class Read:
    """An image as a model takes it, and where it lies in its file's image of `frame`, (height, width) in px."""

    pixels: UInt8[np.ndarray, "c H W"]
    placing: Placing
    frame: tuple[int, int]

    def restore(self, answer: Answer) -> Answer:
        """Give a task's answer in px of the file's image, turned as its EXIF says.

        `map` is 255 where the model saw nothing; `shares` is put beside it, of what the model saw.
        """
        if "objects" in answer:
            return {**answer, "objects": [{**one, **self._box(one)} for one in answer["objects"]]}
        if "map" in answer:
            return {**answer, "map": self._map(answer["map"])}
        return answer

    def seen(self, values: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "h w"]:
        """The part of a map of the model's size that shows the image, not what fills it up."""
        height, width = self.placing.inner
        return values[:height, :width]

    def _box(self, box: Answer) -> Answer:
        left, top, right, bottom = self.placing.crop
        across, down = (right - left) / self.placing.inner[1], (bottom - top) / self.placing.inner[0]
        ways = {"left": (left, across, 1), "right": (left, across, 1), "top": (top, down, 0), "bottom": (top, down, 0)}
        return {side: min(max(start + box[side] * by, 0.0), self.frame[at]) for side, (start, by, at) in ways.items()}

    def _map(self, values: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "h w"]:
        """Take each pixel of the file's image from where its centre lies in the model's."""
        left, top, right, bottom = self.placing.crop
        inner = self.seen(values)
        rows = (np.arange(self.frame[0]) + 0.5 - top) * (inner.shape[0] / (bottom - top))
        columns = (np.arange(self.frame[1]) + 0.5 - left) * (inner.shape[1] / (right - left))
        inside_rows = (rows >= 0) & (rows < inner.shape[0])
        inside_columns = (columns >= 0) & (columns < inner.shape[1])
        whole = np.full(self.frame, NOT_JUDGED, np.uint8)
        taken = inner[rows[inside_rows].astype(int)][:, columns[inside_columns].astype(int)]
        whole[np.ix_(inside_rows, inside_columns)] = taken
        return whole


@dataclass(frozen=True)
class Reader:
    """How a model's images are read: (height, width) in px, the number of channels and what they are, and the fit."""

    size: tuple[int, int]
    count: int
    channels: images.Channels
    fit: Fit

    @classmethod
    def of(cls, said: Answer) -> Reader:
        """Take it from the header of a file of weights; that of imported weights says no `reading`."""
        reading = {"channels": "rgb", "fit": "cover", **said.get("reading", {})}
        height, width = said["size"]
        return cls((height, width), said["channels"], reading["channels"], reading["fit"])

    def __call__(self, image: Path | bytes) -> Read:
        """Read an image file, or what is in one. Raises images.RefusedError, which says why it cannot be used."""
        planes = images.decode_bytes(image, self.channels) if isinstance(image, bytes) else self.planes(image)
        if len(planes) != self.count:
            raise images.RefusedError(f"the image has {len(planes)} channels; the model takes {self.count}")
        frame = (planes.shape[1], planes.shape[2])
        placing = place(frame, self.size, self.fit)
        return Read(placing.image(planes), placing, frame)

    def planes(self, path: Path) -> images.Planes:
        """Decode an image file in its own size. Raises images.RefusedError."""
        return images.decode(path, self.channels)


@dataclass(frozen=True)
class Model:
    """A row's trained model; `facts` name its classes and segments."""

    name: str
    task: Any
    reader: Reader
    facts: Facts

    def answer(self, reads: Sequence[Read]) -> list[Answer]:
        """Say what images show, in px of their files: see `Task.predict`, `Read.restore` and, of maps, `shares`."""
        if not reads:
            return []
        with torch.inference_mode():
            answers = self.task.predict(_stack(reads))
        return [self._told(read, answer) for read, answer in zip(reads, answers, strict=True)]

    def _told(self, read: Read, answer: Answer) -> Answer:
        if "map" not in answer:
            return read.restore(answer)
        counts = np.bincount(read.seen(answer["map"]).ravel(), minlength=len(self.facts.segments))
        shares = counts[: len(self.facts.segments)] / counts.sum()
        order = [int(at) for at in np.argsort(-shares, kind="stable") if shares[at] > 0]
        told = [{"segment": self.facts.segments[at], "share": float(shares[at])} for at in order]
        return {**read.restore(answer), "shares": told}


@dataclass(frozen=True)
class Embedder:
    """A row's encoder; `width` is that of its features."""

    encoder: Any
    reader: Reader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @property
    def width(self) -> int:
        return int(self.encoder.width)

    def embed(self, reads: Sequence[Read]) -> Float32[np.ndarray, "b d"]:
        """Give the mean patch feature of each image."""
        return self.features(_stack(reads))

    def features(self, pixels: Tensor) -> Float32[np.ndarray, "b d"]:
        """Give the mean patch feature of uint8 images [b, c, H, W] of the encoder's size."""
        with torch.inference_mode():
            inputs = normalise(pixels.to(self.device), self.mean, self.std)
            features = self.encoder(self.encoder.embed(inputs)).mean(1)
        return np.asarray(features.cpu().numpy())


def load_model(file: Path, device: str = "auto") -> Model:
    """Rebuild the model of a downstream run's file of weights.

    Raises ValueError, SpecError where it holds none, and where its task cannot answer from the weights alone.
    """
    weights, said = read_weights(file)
    if "task" not in said:
        raise ValueError(f"{file}: it holds no model of a task; give the model.safetensors of a downstream run")
    piece = check(TaskOf, {"task": said["task"]}, str(file)).task
    if not hasattr(TASKS[piece.name], "predict"):
        raise ValueError(
            f"{file}: found the task '{piece.name}', whose weights alone cannot answer; use a row of another task"
        )
    compute = devices.choose(device, said.get("precision", "auto"))
    facts = Facts(
        tuple(said["size"]),
        said["channels"],
        tuple(said["mean"]),
        tuple(said["std"]),
        said["classes"],
        said["segments"],
        said["annotations"],
    )
    task = build(TASKS, piece, _encoder(file, said), facts, compute)
    compute.prepare(task.model)
    task.model.load_state_dict(weights)
    task.model.eval()
    return Model(piece.name, task, Reader.of(said), facts)


def example(file: Path, planes: UInt8[np.ndarray, "c H W"]) -> dict[str, Any]:
    """Let the model of a file of weights answer of one image, to show what it gives.

    Gives plain values: its `answer`, or `refused`, why the weights alone cannot answer of such images.
    """
    try:
        model = load_model(file)
        read = model.reader(as_file(planes))
    except ValueError as error:
        return {"refused": str(error)}
    (answer,) = model.answer([read])
    return {"answer": plain(answer)}


def load_encoder(file: Path, device: str = "auto") -> Embedder:
    """Rebuild the encoder of a run's file of weights, of pretraining or of a task. Raises ValueError, SpecError."""
    weights, said = read_weights(file)
    if "encoder" not in said or "mean" not in said:
        raise ValueError(f"{file}: its header names no encoder and no images' mean; give the file of a run")
    inner = {name.removeprefix("encoder."): one for name, one in weights.items() if name.startswith("encoder.")}
    encoder, compute = _encoder(file, said), devices.choose(device, "fp32")
    compute.prepare(encoder)
    encoder.load_state_dict(inner or weights)
    encoder.eval()
    reader = Reader.of({**said, "size": _sees(said)})
    return Embedder(encoder, reader, tuple(said["mean"]), tuple(said["std"]), compute.device)


def plain(answer: Answer) -> Answer:
    """Make an answer JSON: a map becomes a PNG file of one value a pixel, in base64."""
    if "map" not in answer:
        return answer
    return {**answer, "map": base64.b64encode(as_file(answer["map"][None])).decode()}


def as_file(planes: UInt8[np.ndarray, "c H W"]) -> bytes:
    """Write planes as an image file that reads back to the same values: PNG, or pages of a TIFF where PNG has no such
    image."""
    content = io.BytesIO()
    if len(planes) == 3:
        Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(content, "PNG")
        return content.getvalue()
    first, *rest = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    if rest:
        first.save(content, "TIFF", save_all=True, append_images=rest)
    else:
        first.save(content, "PNG")
    return content.getvalue()


def _encoder(file: Path, said: Answer) -> Any:
    piece = check(EncoderOf, {"encoder": said["encoder"]}, str(file)).encoder
    return build(ENCODERS, piece, _sees(said), said["channels"])


def _sees(said: Answer) -> tuple[int, int]:
    """What an encoder sees at once, (height, width) in px: a window, or whole images."""
    height, width = said["sees"] if "sees" in said else said["size"]
    return height, width


def _stack(reads: Sequence[Read]) -> Tensor:
    return torch.from_numpy(np.stack([read.pixels for read in reads]))
