"""Our encoders as timm's models: the call that builds one, its weights, and the proof that its features are ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mim_core.encoders import ENCODERS
from mim_core.published.imported import State
from mim_core.spec import Piece, build

TOLERANCE = 1e-4
"""Largest difference of a feature, times the largest feature where that is above 1, in fp32."""
IMAGES = 2
# Any entry point of timm's class does: every number of its architecture is overridden.
PLAIN, RELATIVE, WINDOWED = "vit_base_patch16_224", "beit_base_patch16_224", "swin_base_patch4_window7_224"


@dataclass(frozen=True)
class Timm:
    """A timm model: `timm.create_model(name, **arguments)` takes `weights` whole."""

    name: str
    arguments: dict[str, Any]
    weights: State


def to_timm(encoder: Piece, weights: State, size: tuple[int, int], channels: int) -> Timm:
    """Say which timm model an encoder is, with its weights under timm's names.

    `size` is (height, width) in px. Raises ValueError where timm has no such architecture.
    """
    params = encoder.params()
    arguments: dict[str, Any] = {"img_size": tuple(size), "in_chans": channels, "num_classes": 0}
    if encoder.name == "swin":
        name = WINDOWED
        arguments |= {
            "patch_size": params["patch_px"],
            "embed_dim": params["width"],
            "depths": tuple(params["depths"]),
            "num_heads": tuple(params["heads"]),
            "window_size": params["window"],
            "mlp_ratio": params["mlp_ratio"],
        }
    elif encoder.name == "vit":
        arguments |= {
            "patch_size": params["patch_px"],
            "embed_dim": params["width"],
            "depth": params["depth"],
            "num_heads": params["heads"],
            "mlp_ratio": params["mlp_ratio"],
            # timm leaves out arguments that are None; 0 is no LayerScale too.
            "init_values": params["layer_scale"] or 0,
            "global_pool": "token",
        }
        name = PLAIN
        if params["positions"].startswith("relative"):
            name = RELATIVE
            shared = params["positions"] == "relative"
            arguments |= {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    else:
        raise ValueError(
            f"encoder: found {encoder.name}; timm has no such architecture; its weights are in encoder.safetensors, "
            "which safetensors reads anywhere"
        )
    return Timm(name, arguments, {name.removeprefix("backbone."): tensor for name, tensor in weights.items()})


def create_call(model: Timm, path: Path | str) -> str:
    """Give the line of Python that builds the model from its file."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in model.arguments.items())
    return f"timm.create_model({model.name!r}, checkpoint_path={str(path)!r}, {arguments})"


def check(encoder: Piece, weights: State, size: tuple[int, int], channels: int, model: Timm, path: Path) -> float:
    """Compare features of random images between our encoder and the timm model built from the file at `path`.

    Gives the largest difference. Raises ValueError where it is above `TOLERANCE`.
    """
    ours = build(ENCODERS, encoder, size, channels)
    ours.load_state_dict(weights)
    theirs = timm.create_model(model.name, checkpoint_path=str(path), **model.arguments)
    images = random_images(channels, size)
    return compare(features(ours, images), _timms(theirs, images), f"{path}: timm's {model.name}")


def random_images(channels: int, size: tuple[int, int]) -> Tensor:
    """The same images at every call, normalised: [b, c, H, W]."""
    return torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(encoder: Any, images: Tensor) -> Tensor:
    """Give an encoder's features with its class tokens in front: [b, p + n, d]."""
    encoder.eval()
    found, summary = encoder.encode(encoder.embed(images))
    return torch.cat([summary, found], dim=1)


def compare(ours: Tensor, theirs: Tensor, where: str) -> float:
    """Give the largest difference; raises ValueError where it is above the tolerance, or a number is not finite."""
    found = (ours - theirs).abs().max().item()
    allowed = TOLERANCE * max(1.0, ours.abs().max().item())
    if not found <= allowed:  # also where it is not a number
        raise ValueError(
            f"{where}: features differ from ours by {found:.2g}; at most {allowed:.2g} is rounding; report this with "
            "the encoder's params"
        )
    return found


@torch.no_grad()
def _timms(model: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = model.eval().forward_features(images)  # type: ignore[operator]
    return out.flatten(1, 2) if out.ndim == 4 else out
