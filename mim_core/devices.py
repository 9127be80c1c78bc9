"""Devices: where a run computes, in which precision, by which attention.

Measured on AVX-512 BF16 cores: bf16 autocast is 1.4 times fp32; while training in it, explicit matmul, softmax, matmul
is a further 1.55 times the fused kernel, whose bf16 backward is slow on CPU. On a GPU the fused kernel wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mim_core.cores import cores

Precision = Literal["auto", "fp32", "bf16"]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
LONG = 2000
"""Steps from which on a run on a GPU regains the time in which blocks are compiled, and processes that read begin."""


def pays(device: torch.device, steps: int) -> bool:
    """Whether what takes a while to begin pays in a run of so many steps."""
    return device.type == "cuda" and steps >= LONG


@dataclass(frozen=True)
class Compute:
    """A device and the precision of the forward pass (weights and optimiser stay fp32)."""

    device: torch.device
    bf16: bool

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def send(self, values: Tensor) -> Tensor:
        """Bring a batch's tensor from the CPU to the device, beside what the device is doing."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return (values if values.is_cuda else values.pin_memory()).to(self.device, non_blocking=True)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and choose the attention path of timm's blocks for it."""
        explicit = self.device.type == "cpu" and self.bf16
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", not explicit)  # noqa: B010  timm's flag, which nn.Module's types do not know
        return model.to(self.device)


def compile_blocks(model: nn.Module) -> None:
    """Compile timm's blocks one by one: equal ones share the result. What cannot be compiled runs as it is."""
    dynamo: Any = torch._dynamo.config
    dynamo.suppress_errors = True
    # Of a Swin, the blocks of each stage, shifted or not, are compiled apart.
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    for module in model.modules():
        if hasattr(module, "attn") and hasattr(module, "mlp"):
            module.compile(dynamic=False)


def uncompiled(device: torch.device) -> AbstractContextManager[Any]:
    """Have what was compiled run as it was written for a while: for few batches, and of other shapes."""
    return torch.compiler.set_stance("force_eager") if device.type == "cuda" else nullcontext()


def choose(device: str = "auto", precision: Precision = "auto") -> Compute:
    """Pick the device and precision; bf16 where the hardware multiplies in it, else fp32."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if precision == "auto":
        gains = torch.cuda.is_bf16_supported(False) if chosen.type == "cuda" else _cpu_multiplies_bf16()
        return Compute(chosen, gains)
    return Compute(chosen, precision == "bf16")


def _cpu_multiplies_bf16() -> bool:
    # Without these instructions bf16 is emulated and several times slower than fp32.
    cpu: Any = torch.cpu
    probes = [getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in probes if probe)


class _Valueless(TorchFunctionMode):
    """Passes over what only sets values, which nothing on the meta device has: most of the time would go there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SETTERS:
            first = args[0] if args else kwargs["tensor"]
            if first.is_meta:
                return first
        return func(*args, **kwargs)


_SETTERS = frozenset(
    {
        getattr(Tensor, f"{name}_")
        for name in ("add", "clamp", "div", "erfinv", "fill", "mul", "normal", "uniform", "zero")
    }
    | {getattr(nn.init, f"{name}_") for name in ("constant", "kaiming_uniform", "normal", "uniform")}
)


@contextlib.contextmanager
def unreal() -> Iterator[None]:
    """Build where nothing takes memory, on torch's meta device; raises ValueError where no tensor has such a size."""
    try:
        with torch.device("meta"), _Valueless():
            yield
    except (OverflowError, RuntimeError, MemoryError, TypeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"found sizes that no tensor can have ({said}); take smaller ones") from None


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, to be used again.

    By default it gives what is large (from 32 MiB, and what is free at the end of the heap) back to the system, which
    hands it out again page by page, cleared: to normalise 64 images of 224 px took five times as long for that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory, or the machine's, is full."""
    said = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def describe(compute: Compute) -> dict[str, Any]:
    """Say for the manifest what a run computed on."""
    cuda = compute.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(compute.device) if cuda else _cpu_name(),
        "type": compute.device.type,
        "precision": "bf16" if compute.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
