"""Read published weights without running the code that a file may carry.

A pickle is a program: it may name any function and have it called. Here nothing of it is ever imported or called but
what is listed below: tensors are rebuilt, containers are real, and every other name becomes a placeholder that keeps
the state it is given. So whole pickled modules (DALL-E's encoder.pkl) give up their weights without their package.
"""

from __future__ import annotations

import builtins
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WRAPPERS = ("model", "state_dict", "module", "model_state", "model_state_dict")
MOST_REPEATED = 2**28
"""Bytes that a tensor may have beyond those stored of it."""
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
CONTAINERS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "bytes")
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name: safetensors, or what `torch.save` wrote (state dict, checkpoint, whole module).

    A state dict inside a checkpoint is found under its usual keys, and the prefix `module.` of parallel training is
    dropped. Raises ValueError where the file is neither kind or holds no tensors.
    """
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
    else:
        found = _unpickle(path)
    return unwrap(found, str(path))


def unwrap(found: Any, where: str) -> dict[str, Tensor]:
    """Find the state dict in what a file held; raises ValueError where there is none."""
    while isinstance(found, Mapping):
        inside = [key for key in WRAPPERS if isinstance(found.get(key), (Mapping, Placeholder))]
        if not inside:
            break
        found = found[inside[0]]
    try:
        state = dict(_tensors(found, "", frozenset()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; fetch the file again") from None
    if not state:
        held = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"{where}: found {held}, no tensors by name; it must be a state dict, a checkpoint with one under "
            f"{list(WRAPPERS)}, or a pickled module; save the model's state_dict()"
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


class Placeholder:
    """What stands for an object of a class that is not imported: it keeps its state and does nothing."""

    state: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **named: Any) -> Placeholder:
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        # A pair is the state in __dict__ and that in slots.
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}
        object.__setattr__(self, "state", state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _tensors(found: Any, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    """Walk mappings and placeholders of modules; a module's own tables do not count in a tensor's name."""
    if id(found) in above:
        return
    state = found.state if isinstance(found, Placeholder) else found
    if not isinstance(state, Mapping):
        return
    transient = state.get("_non_persistent_buffers_set") or ()
    for key, value in state.items():
        name = prefix + str(key)
        if isinstance(value, Tensor):
            # A view that shows few numbers many times takes memory where it is computed with.
            if value.nbytes > max(value.untyped_storage().nbytes(), MOST_REPEATED):
                raise ValueError(f"{name} of shape {list(value.shape)} is larger than what the file holds of it")
            yield name, value.detach()
        elif key in ("_parameters", "_buffers", "_modules") and isinstance(value, Mapping):
            kept = {inner: one for inner, one in value.items() if inner not in transient}
            yield from _tensors(kept, prefix, above | {id(found)})
        elif isinstance(value, Placeholder):
            yield from _tensors(value, f"{name}.", above | {id(found)})


def _unpickle(path: Path) -> Any:
    if packed := _packed(path):
        raise ValueError(f"{path}: found {packed} compressed; torch.save compresses nothing; fetch the file again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as refused:
        # Also RuntimeError: torch says so of the layouts that it no longer reads.
        try:
            with path.open("rb") as file:
                return _zipped(file) if zipfile.is_zipfile(file) else _sequence(file)
        except Exception as error:
            raise ValueError(
                f"{path}: found {error or type(error).__name__}; it must be a safetensors file or one that torch.save "
                f"wrote (torch itself: {str(refused).splitlines()[0] if str(refused) else refused!r}); fetch it again, "
                "or save the model's state_dict() anew"
            ) from None


def _packed(path: Path) -> str:
    """Name a record of a zip file that is compressed, and so may be without end; empty where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry.filename for entry in archive.infolist() if entry.file_size > entry.compress_size]
    except Exception:  # no zip file, or a broken one, which is told where it is read
        return ""
    return found[0] if found else ""


class _Unpickler(pickle.Unpickler):
    """An unpickler whose names are inert; `storage` gives the flat tensor of a storage's key, dtype and length."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, torch.dtype, int], Tensor] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if module in ("builtins", "__builtin__") and name in CONTAINERS:
            return getattr(builtins, name)
        return REAL.get((module, name)) or type(name, (Placeholder,), {})

    def persistent_load(self, key: Any) -> Any:
        kind, *rest = key
        if kind == "module":  # a class with its source, in whole modules of old files
            return rest[0]
        if kind != "storage" or self.storage is None:
            raise ValueError(f"a stored object of kind {kind!r}")
        dtype, name, _, length, *view = rest
        flat = self.storage(str(name), dtype, int(length))
        if view and view[0] is not None:
            _, offset, size = view[0]
            flat = flat[offset : offset + size]
        return flat


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _zipped(file: IO[bytes]) -> Any:
    """Read the zip layout: a pickle `<folder>/data.pkl` and a record `<folder>/data/<key>` for each storage."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file that torch.save did not write")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("a file of a machine with the other byte order")
        cache: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, length: int) -> Tensor:
            if key not in cache:
                content = bytearray(archive.read(f"{folder}data/{key}"))
                cache[key] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
            return cache[key].view(dtype)[:length] if len(cache[key]) else torch.empty(0, dtype=dtype)

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _sequence(file: IO[bytes]) -> Any:
    """Read the layout before torch 1.6: pickles one after another, then the storages' lengths and bytes."""
    whole = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != PROTOCOL:
        raise ValueError("a pickle that torch.save did not write")
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("a file of a machine with the other byte order")
    flats: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, length: int) -> Tensor:
        if length * dtype.itemsize > whole:
            raise ValueError("a storage longer than the file")
        return flats.setdefault(key, torch.empty(length, dtype=dtype))

    found = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        flat = flats[str(key)]
        (length,) = struct.unpack("<q", file.read(8))
        if length != len(flat):
            raise ValueError("a storage of another length than its tensors say")
        if length:
            content = bytearray(file.read(flat.nbytes))
            if len(content) < flat.nbytes:
                raise EOFError("a file that ends too early")
            flat.copy_(torch.frombuffer(content, dtype=flat.dtype))
    return found
