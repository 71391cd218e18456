"""Noise drawn and added in one compiled pass over the features (CPU): the draws are never written to memory.

Number i of a call is ``table[16 bits of mix(mix(i // 2 + a) ^ b)]``: a counter-based generator (two rounds of a 32-bit
avalanche hash, keyed by 64 bits that torch's default generator gives for this call alone) and a table of 65,536
equally likely values. No pool, no rolling: every element of every row, site and pass has its own draw. A backward pass
that needs the draws computes them again from the key, so they cost no memory either.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16
_SCIPY_NAMES = {"gaussian": "norm", "laplace": "laplace", "uniform": "uniform"}
_usable = True
_inlined = False
_tables: dict[str, Tensor] = {}


def quantile_table(distribution: str) -> Tensor:
    """Return 65,536 equally likely values of a distribution, of mean exactly 0 and variance exactly 1 (float32).

    Values are the quantiles of the middle of each of 65,536 equal shares: the Gaussian's largest is 4.3 sigma.
    """
    if distribution not in _tables:
        from scipy import stats  # half a second, and only this path needs it

        values = getattr(stats, _SCIPY_NAMES[distribution]).ppf((np.arange(_LEVELS) + 0.5) / _LEVELS)
        values = values - values.mean()
        _tables[distribution] = torch.tensor(values / values.std(), dtype=torch.float32)
    return _tables[distribution]


def _mix(x: Tensor) -> Tensor:
    """Avalanche 32 bits (the constants are the low-bias pair found by exhaustive search, Wellons 2018)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def draws(rows: int, features: int, key: Tensor, table: Tensor) -> Tensor:
    """Return the (rows, features) draws that ``key`` (2 int32 numbers) stands for."""
    count = rows * features
    bits = _mix(_mix(torch.arange((count + 1) // 2, dtype=torch.int32) + key[0]) ^ key[1])
    halves = [table[(bits & 0xFFFF).long()], table[((bits >> 16) & 0xFFFF).long()]]
    return torch.cat(halves)[:count].view(rows, features)


def draws_in_place(rows: int, features: int, key: Tensor, table: Tensor) -> Tensor:
    """Return the same numbers as :func:`draws`, each computed where it is needed.

    Two hashes for two numbers instead of one, which a loop of its own would notice; but without the concatenation a
    larger compiled graph fuses the noise into the loop that is there anyway.
    """
    count = rows * features
    half = (count + 1) // 2
    index = torch.arange(count, dtype=torch.int32)
    high = index >= half
    bits = _mix(_mix(torch.where(high, index - half, index) + key[0]) ^ key[1])
    return table[(torch.where(high, bits >> 16, bits) & 0xFFFF).long()].view(rows, features)


def _add(h: Tensor, scale: Tensor, key: Tensor, table: Tensor) -> Tensor:
    return (h + scale * draws(h.shape[0], h.shape[1], key, table)).to(h.dtype)


def _pull(gradient: Tensor, key: Tensor, table: Tensor) -> Tensor:
    return (gradient.float() * draws(gradient.shape[0], gradient.shape[1], key, table)).sum(0, keepdim=True)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile at first use: importing the compiler takes seconds, and it warns of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, dynamic=True)


class _AddSharedNoise(torch.autograd.Function):
    """``h + scale * eps`` on (rows, features) with one eps, (1, features), for all rows.

    The gradient of scale sums over rows as a matrix product, which is several times faster than a sum.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(eps)
        return h + (scale * eps).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        (eps,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        return gradient, gradient.new_ones(1, len(gradient)).mm(gradient).float() * eps, None


class _AddNoise(torch.autograd.Function):
    """``h + scale * eps`` on (rows, features), with eps a function of the key."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor, key: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(key, table)
        # Detached: one graph serves with and without gradients, and the compiler does not look at .grad of non-leaves.
        result: Tensor = _compiled(_add)(h.detach(), scale.detach(), key, table)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        key, table = ctx.saved_tensors
        pulled = _compiled(_pull)(gradient.contiguous(), key, table) if ctx.needs_input_grad[1] else None
        return gradient, pulled, None, None


def _is_last(h: Tensor) -> bool:
    return h.dim() == 4 and not h.is_contiguous()


def _flat(tensor: Tensor, h: Tensor) -> Tensor:
    """Return (rows, ...) as (rows, features), in the order in which the features ``h`` lie in memory."""
    tensor = tensor.permute(0, 2, 3, 1) if _is_last(h) else tensor
    return tensor.reshape(tensor.shape[0], -1)


def _unflat(rows: Tensor, h: Tensor) -> Tensor:
    """Return (rows, features) in the shape and layout of ``h``."""
    if not _is_last(h):
        return rows.view(h.shape)
    count, channels, height, width = h.shape
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def can_fuse(h: Tensor) -> bool:
    """Tell whether :func:`add_noise` serves these features: on the CPU, one block of memory, eager, a compiler here."""
    return (
        _usable
        and h.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (h.is_contiguous() or (h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)))
    )


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Let noise in the body become part of what is compiled there, as :func:`add_noise_inlined`."""
    global _inlined
    for distribution in _SCIPY_NAMES:
        quantile_table(distribution)  # the compiler reads tables, it does not make them
    before, _inlined = _inlined, True
    try:
        yield
    finally:
        _inlined = before


def can_inline(h: Tensor) -> bool:
    """Tell whether the compiler is at work on a pass of :func:`inlined` on the CPU."""
    return _inlined and torch.compiler.is_compiling() and h.device.type == "cpu"


def add_noise_inlined(h: Tensor, theta: Tensor, distribution: str, *, shared: bool) -> Tensor:
    """Return ``h + theta * eps`` as operations for a compiler to fuse; ``shared`` draws one eps for all rows."""
    flat, scale = _flat(h, h), _flat(theta.expand(h.shape[1:]).unsqueeze(0), h)
    rows, features = flat.shape
    table = _tables[distribution]
    if shared:
        # Numbers of torch's own, which a compiler writes to memory: fused, a hash would be computed for every row.
        words = (1, features)
        eps = torch.randn(words) if distribution == "gaussian" else table[torch.randint(_LEVELS, words)]
    else:
        key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
        eps = draws_in_place(rows, features, key, table)
    return _unflat((flat + scale * eps).to(h.dtype), h)


def add_shared_noise(h: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
    """Return ``h + theta * eps`` with ``eps`` (1, ...) for all rows of ``h`` (N, ...).

    The scaled map is laid out as the features are: adding it is then nine times as fast.
    """
    scale = theta.expand(h.shape[1:]).unsqueeze(0)
    noisy: Tensor = _AddSharedNoise.apply(_flat(h, h), _flat(scale, h), _flat(eps, h))
    return _unflat(noisy, h)


def add_noise(h: Tensor, theta: Tensor, distribution: str) -> Tensor | None:
    """Return ``h + theta * eps`` with a fresh eps for every element of ``h`` (N, ...), or None where no compiler works.

    ``theta`` broadcasts against one row. The draws are decided by the state of torch's default generator.
    """
    global _usable
    key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
    table = quantile_table(distribution)
    scale = theta.expand(h.shape[1:]).unsqueeze(0)
    try:
        noisy: Tensor = _AddNoise.apply(_flat(h, h), _flat(scale, h), key, table)
    except Exception as error:
        _usable = False
        warnings.warn(
            f"noise cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
            "drawing it uncompiled, which is slower",
            stacklevel=2,
        )
        return None
    return _unflat(noisy, h)
