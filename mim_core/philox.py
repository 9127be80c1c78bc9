"""numpy's random numbers of many generators at once, on any device.

Philox 4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) as `numpy.random.Philox` runs it:
a generator is a function of its key and a counter, so that a GPU draws what numpy would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

ROUNDS = 10
FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
STRIDES = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
LOW = 0xFFFFFFFF


def draws(keys: Int[Tensor, "b 2"], count: int) -> Int[Tensor, "b count"]:
    """Give the first `count` draws of 53 bits under each key: 2**53 times what numpy's `Generator.random` gives.

    64 bits without a sign are kept in int64, whose sums and products wrap as they have to. On a GPU it is compiled, as
    it is hundreds of operations on few numbers.
    """
    # Given to what is compiled, which would take numbers that it makes itself for ones of 32 bits.
    counters = torch.arange(1, 1 - count // -4, device=keys.device)
    return (_compiled() if keys.is_cuda else _draws)(keys, counters, keys.new_zeros(1, 1))[:, :count]


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_draws, dynamic=False)


def _draws(keys: Tensor, counters: Tensor, zero: Tensor) -> Tensor:
    words = [counters[None], zero, zero, zero]
    one, two = keys[:, :1], keys[:, 1:]
    for turn in range(ROUNDS):
        if turn:
            one, two = one + _signed(STRIDES[0]), two + _signed(STRIDES[1])
        (high, low), (high2, low2) = _product(FACTORS[0], words[0]), _product(FACTORS[1], words[2])
        words = [high2 ^ words[1] ^ one, low2, high ^ words[3] ^ two, low]
    shape = len(keys), len(counters)
    return _right(torch.stack([word.expand(shape) for word in words], dim=-1).flatten(1), 11)


def _product(factor: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 64 bits of a product, by halves of 32."""
    a, b = factor >> 32, factor & LOW
    high, low = _right(values, 32), values & LOW
    first = high * b + _right(low * b, 32)
    second = (first & LOW) + low * a
    return high * a + _right(first, 32) + _right(second, 32), values * _signed(factor)


def _right(values: Tensor, bits: int) -> Tensor:
    """Shift without regard to a sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
