"""Image files of any kind as arrays of 8 bits, and why a file cannot be used as one."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What content is taken for, whatever its name: of other formats Pillow would run a program on it (EPS)."""
Channels = Literal["rgb", "grey", "all"]
"""What a pack's images hold: three colours, one grey (ITU-R 601 luma), or each channel that the files have."""
Planes = UInt8[np.ndarray, "c H W"]


class RefusedError(ValueError):
    """Why a file or an entry cannot be used: it is listed with this reason, and the rest goes on."""


def decode(path: Path, channels: Channels = "rgb", frame: tuple[int, int] | None = None) -> Planes:
    """Decode an image file. `frame` is the (height, width) in px that its annotations are given in.

    Without a frame the image is turned as its EXIF says. With one it is left as it is stored where that has the
    frame's size, as the published readers of annotated datasets do, else turned where that has it, else refused.

    8 bits stay as they are. 16 bits are scaled by their whole range, 0 to 65535, and floats by 0 to 1, never by the
    image's own range, so that images stay comparable; others are refused. `rgb` and `grey` take files of one or three
    channels, lay transparent ones on white, and take the first image of an animation. `all` keeps alpha and CMYK, and
    shows palettes as their colours. A `.npy` file is [H, W], [H, W, c] or [c, H, W]: the shorter of the first and last
    axis counts the channels, the last where they are equal. Pages of a TIFF are channels one after the other.
    Raises RefusedError.
    """
    check_file(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise RefusedError(f"'{path.suffix}' is not one of the image extensions {sorted(EXTENSIONS)}")
    with _refusing():
        if path.suffix.lower() == ".npy":
            return _choose(_read_array(path, frame), channels)
        return _read_picture(path, channels, frame)


def decode_bytes(content: bytes, channels: Channels = "rgb") -> Planes:
    """Decode what is in a file of a picture (not of an array), turned as its EXIF says: see `decode`.

    Raises RefusedError.
    """
    if not content:
        raise RefusedError("the file is empty")
    with _refusing():
        return _read_picture(io.BytesIO(content), channels, None)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except PermissionError as error:
        raise RefusedError(f"the file cannot be read ({error.strerror})") from None
    except UnidentifiedImageError:
        raise RefusedError("the content is no image of a known format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RefusedError(_too_large()) from None
    except Exception as error:  # decoders raise many types, and any of them means the same here
        raise RefusedError(f"the image cannot be decoded ({error})") from None


def check_file(path: Path) -> None:
    """Raise RefusedError where there is no file with content."""
    try:
        status = path.stat()
    except OSError as error:
        raise RefusedError(f"the file cannot be reached ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise RefusedError("not a file with content but a pipe, socket, device or folder")
    if status.st_size == 0:
        raise RefusedError("the file is empty")


def short_side(path: Path) -> int:
    """The shorter of an image's height and width in px, without decoding it."""
    if path.suffix.lower() == ".npy":
        return min(_sides(np.load(path, mmap_mode="r", allow_pickle=False).shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path) as image:
            return min(image.size)


def read_values(path: Path) -> UInt8[np.ndarray, "H W"]:
    """Read an annotation that is an image of one value a pixel: 8 bits of grey, or places in a palette.

    Raises RefusedError.
    """
    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode not in ("L", "P"):
                    raise RefusedError(f"its mode is {image.mode}; it must have one value of 8 bits a pixel")
                return np.array(image, np.uint8)
    except Exception as error:
        reason = str(error) if isinstance(error, RefusedError) else f"it cannot be decoded ({error})"
        raise RefusedError(f"mask {path.parent.name}/{path.name}: {reason}") from None


def _too_large() -> str:
    return f"over Pillow's limit of {Image.MAX_IMAGE_PIXELS} px, meant against files made to fill the memory"


def _read_picture(path: Path | io.BytesIO, channels: Channels, frame: tuple[int, int] | None) -> Planes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # damage in EXIF or tags, beside the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as opened:
            pages = getattr(opened, "n_frames", 1) if opened.format == "TIFF" else 1
            if pages == 1:
                return _planes(_oriented(opened, frame), channels)
            if pages * opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise RefusedError(_too_large())
            stack = [_planes(_oriented(page, frame), "all") for page in ImageSequence.Iterator(opened)]
    if len({page.shape[1:] for page in stack}) > 1:
        raise RefusedError("the pages are of unequal sizes; pages are the channels of one image")
    return _choose(np.concatenate(stack), channels)


def _oriented(image: Image.Image, frame: tuple[int, int] | None) -> Image.Image:
    if frame and (image.height, image.width) == frame:
        return image
    upright = ImageOps.exif_transpose(image)
    if frame and (upright.height, upright.width) != frame:
        raise RefusedError(_other_size((image.height, image.width), frame))
    return upright


def _other_size(found: tuple[int, ...], frame: tuple[int, int]) -> str:
    return f"the image is {found[0]} x {found[1]} px, and its annotations are for {frame[0]} x {frame[1]}"


def _planes(image: Image.Image, channels: Channels) -> Planes:
    """The channels [c, H, W] of an image that is turned right."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if channels == "all":
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        elif image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
            image = image.convert("L" if image.mode == "1" else "LA" if image.mode == "La" else "RGB")
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").convert("RGB" if channels == "rgb" else "L")
    return _channels_first(np.asarray(image))


def _channels_first(pixels: np.ndarray) -> Planes:
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _choose(planes: Planes, channels: Channels) -> Planes:
    """Make what the row asks for of a stack of channels."""
    if channels == "all":
        return planes
    if len(planes) not in (1, 3):
        raise RefusedError(
            f"the image has {len(planes)} channels; '{channels}' takes one or three; set `channels: all`"
        )
    if channels == "rgb":
        return planes if len(planes) == 3 else planes.repeat(3, 0)
    if len(planes) == 1:
        return planes
    return np.asarray(Image.fromarray(planes.transpose(1, 2, 0)).convert("L"))[None]


def _read_array(path: Path, frame: tuple[int, int] | None) -> Planes:
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.ndim not in (2, 3) or not mapped.size:
        raise RefusedError(f"the array's shape is {list(mapped.shape)}; it must be [H, W], [H, W, c] or [c, H, W]")
    if mapped.dtype.kind != "f" and mapped.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise RefusedError(f"the array's type is {mapped.dtype}; save it as uint8, uint16 or float")
    height, width = _sides(mapped.shape)
    if height * width > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise RefusedError(_too_large())
    if frame and (height, width) != frame:
        raise RefusedError(_other_size((height, width), frame))
    pixels = _eight_bits(np.array(mapped))
    return pixels if pixels.ndim == 3 and _channels_lead(pixels.shape) else _channels_first(pixels)


def _channels_lead(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] < shape[2]


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if _channels_lead(shape) else shape[:2]


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    white = 1.0 if pixels.dtype.kind == "f" else 65535.0
    pixels = pixels.astype(np.float64)
    if not (pixels.min() >= 0 and pixels.max() <= white):
        found = f"pixels from {pixels.min():g} to {pixels.max():g}"
        raise RefusedError(f"{found} are not within 0 and {white:g}; save it with 8 or 16 bits a channel")
    return np.asarray((pixels * (255 / white)).round().astype(np.uint8))
