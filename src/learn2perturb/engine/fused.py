"""Noise drawn and added in one compiled pass over the features (CPU): the draws are never written to memory.

Number i of a call is ``table[16 bits of mix(mix(i + a) ^ b)]``: a counter-based generator (two rounds of a 32-bit
avalanche hash, keyed by 64 bits that torch's default generator gives for this call alone) and a table of 65,536
equally likely values. No pool, no rolling: every element of every row, site and pass has its own draw. A backward pass
that needs the draws computes them again from the key, so they cost no memory either.

The same draws serve a kernel of their own (``add_noise``) and the graph of a compiled network (``add_noise_inlined``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from learn2perturb.engine import compile_time, ranks
from learn2perturb.engine.compiler import FINDINGS

_LEVELS = 1 << 16
_SCIPY_NAMES = {"gaussian": "norm", "laplace": "laplace", "uniform": "uniform"}
Options = dict[str, str | int | bool | Callable[..., Any]]
# Noise is some thirty operations: without this the compiler writes it to memory, and what adds it reads it from there.
FUSING: Options = {"realize_opcount_threshold": 200}
# For the kernels of this file alone, where every index has 16 bits; a network's own indices are to be checked.
_UNCHECKED: Options = FUSING | {"assert_indirect_indexing": False}

_tables: dict[str, Tensor] = {}


def quantile_table(distribution: str) -> Tensor:
    """Return 65,536 equally likely values of a distribution, of mean exactly 0 and variance exactly 1 (float32).

    Values are the quantiles of the middle of each of 65,536 equal shares: the Gaussian's largest is 4.3 sigma.
    """
    if distribution not in _tables:
        from scipy import stats  # half a second, and only this path needs it

        values = getattr(stats, _SCIPY_NAMES[distribution]).ppf((np.arange(_LEVELS) + 0.5) / _LEVELS)
        register_quantiles(distribution, values)
    return _tables[distribution]


def register_quantiles(distribution: str, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Keep the 65,536 quantiles of a distribution as its table, shifted and scaled to mean 0 and variance 1."""
    values = values - values.mean()
    _tables[distribution] = torch.tensor(values / values.std(), dtype=torch.float32)


def _mix(x: Tensor) -> Tensor:
    """Avalanche 32 bits (the constants are the low-bias pair found by exhaustive search, Wellons 2018)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def _fresh_key() -> Tensor:
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)


def draws(rows: int, features: int, key: Tensor, table: Tensor, start: int = 0) -> Tensor:
    """Return the (rows, features) draws that ``key`` (2 int32 numbers) stands for; of a batch, those from ``start``."""
    index = torch.arange(start * features, (start + rows) * features, dtype=torch.int32)
    bits = _mix(_mix(index + key[0]) ^ key[1])
    # An embedding, since an index could be negative for all a compiler knows, and is looked at for that.
    return nn.functional.embedding(bits & (_LEVELS - 1), table.unsqueeze(1)).view(rows, features)


def _add(h: Tensor, scale: Tensor, key: Tensor, table: Tensor, start: int) -> Tensor:
    return (h + scale * draws(h.shape[0], h.shape[1], key, table, start)).to(h.dtype)


def _pull(gradient: Tensor, key: Tensor, table: Tensor, start: int) -> Tensor:
    return (gradient.float() * draws(gradient.shape[0], gradient.shape[1], key, table, start)).sum(0, keepdim=True)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile at first use: importing the compiler takes seconds, and it warns of its own deprecations."""
    compile_time.watch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, dynamic=True, options=_UNCHECKED)


@final
class _Repeat(torch.autograd.Function):
    """(1, features) for each of some rows; its gradient sums over rows as a matrix product, which is faster."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, rows: int) -> Tensor:
        return row.expand(rows, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.new_ones(1, len(gradient)).mm(gradient), None


@final
class _AddNoise(torch.autograd.Function):
    """``h + scale * eps`` on (rows, features), with eps a function of the key."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor, key: Tensor, table: Tensor, start: int) -> Tensor:
        ctx.save_for_backward(key, table)
        ctx.start = start
        # Detached: one graph serves with and without gradients, and the compiler does not look at .grad of non-leaves.
        result: Tensor = _compiled(_add)(h.detach(), scale.detach(), key, table, start)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (gradient,) = gradients
        key, table = ctx.saved_tensors
        pulled = _compiled(_pull)(gradient.contiguous(), key, table, ctx.start) if ctx.needs_input_grad[1] else None
        return gradient, pulled, None, None, None


def _is_last(h: Tensor) -> bool:
    return h.dim() == 4 and not h.is_contiguous()


def _flat(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return (rows, ...) as (rows, features), in the order in which features of this layout lie in memory."""
    tensor = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    return tensor.reshape(tensor.shape[0], -1)


def _unflat(rows: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Return (rows, features) as (rows, *shape) in this layout."""
    if not channels_last:
        return rows.view(-1, *shape)
    channels, height, width = shape
    return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


def _map(theta: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Return theta for every feature, (1, features), in the order in which features of this layout lie in memory."""
    return _flat(theta.expand(shape).unsqueeze(0), channels_last)


def can_fuse(h: Tensor) -> bool:
    """Tell whether :func:`add_noise` serves these features: on the CPU, one block of memory, eager, a compiler here."""
    return (
        FINDINGS.usable
        and h.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (h.is_contiguous() or (h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)))
    )


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Let noise in the body become part of what is compiled there, as :func:`add_noise_inlined`."""
    for distribution in _SCIPY_NAMES:
        quantile_table(distribution)  # the compiler reads tables, it does not make them
    before, FINDINGS.inlined = FINDINGS.inlined, True
    try:
        yield
    finally:
        FINDINGS.inlined = before


def can_inline(h: Tensor) -> bool:
    """Tell whether the compiler is at work on a pass of :func:`inlined` on the CPU."""
    return FINDINGS.inlined and torch.compiler.is_compiling() and h.device.type == "cpu"


# Operations of their own, because a compiler computes again for every row what it can look into: it would gather a
# channels_first theta for every image, and draw the key for every few numbers.
_operation = functools.partial(
    torch.library.custom_op, mutates_args=(), device_types="cpu", tags=(torch.Tag.nondeterministic_seeded,)
)


@_operation("learn2perturb::noise_inputs")
def _noise_inputs(theta: Tensor, shape: list[int], channels_last: bool) -> tuple[Tensor, Tensor]:
    """Return theta laid out as features (rows, *shape) are, (1, features), and a fresh key."""
    # A copy even where none is needed: an operation must not return what it was given.
    return _map(theta, shape, channels_last).clone(), _fresh_key()


@_operation("learn2perturb::shared_noise")
def _shared_noise(
    theta: Tensor, shape: list[int], channels_last: bool, distribution: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``theta * eps`` and eps, one for all rows, (1, features), laid out as features (rows, *shape) are."""
    scale = _map(theta, shape, channels_last)
    if distribution == "gaussian":
        eps = torch.randn_like(scale)
    else:
        eps = quantile_table(distribution)[torch.randint(_LEVELS, scale.shape)]
    return (scale * eps).to(dtype), eps


@_noise_inputs.register_fake
def _(theta: Tensor, shape: list[int], channels_last: bool) -> tuple[Tensor, Tensor]:
    return theta.new_empty(1, math.prod(shape)), theta.new_empty(2, dtype=torch.int32)


@_shared_noise.register_fake
def _(
    theta: Tensor, shape: list[int], channels_last: bool, distribution: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return theta.new_empty(1, math.prod(shape), dtype=dtype), theta.new_empty(1, math.prod(shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.theta_shape, ctx.shape, ctx.channels_last = inputs[0].shape, *inputs[1:3]
    ctx.save_for_backward(output[1])


def _pull_scale(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _unflat(gradient, ctx.shape, ctx.channels_last)[0].sum_to_size(ctx.theta_shape), None, None


def _pull_shared(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    (eps,) = ctx.saved_tensors
    return *_pull_scale(ctx, gradient.float() * eps, eps), None, None


_noise_inputs.register_autograd(_pull_scale, setup_context=_keep)
_shared_noise.register_autograd(_pull_shared, setup_context=_keep)


def add_noise_inlined(h: Tensor, theta: Tensor, distribution: str, *, shared: bool) -> Tensor:
    """Return ``h + theta * eps`` as operations for a compiler to fuse; ``shared`` draws one eps for all rows."""
    shape, last = list(h.shape[1:]), _is_last(h)
    if shared:
        noise, _ = _shared_noise(theta, shape, last, distribution, h.dtype)
        return h + _unflat(_Repeat.apply(noise, len(h)), shape, last)
    scale, key = _noise_inputs(theta, shape, last)
    noise = scale * draws(len(h), scale.shape[1], key, _tables[distribution])
    return (h + _unflat(noise, shape, last)).to(h.dtype)


def add_shared_noise(h: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
    """Return ``h + theta * eps`` with ``eps`` (1, ...) for all rows of ``h`` (N, ...).

    The scaled map is laid out as the features are: adding it is then nine times as fast.
    """
    last = _is_last(h)
    noise = (_map(theta, h.shape[1:], last) * _flat(eps, last)).to(h.dtype)
    return _unflat(_flat(h, last) + _Repeat.apply(noise, len(h)), h.shape[1:], last)


def add_noise(h: Tensor, theta: Tensor, distribution: str) -> Tensor | None:
    """Return ``h + theta * eps`` with a fresh eps for every element of ``h`` (N, ...), or None where no compiler works.

    ``theta`` broadcasts against one row. The draws are decided by the state of torch's default generator.
    """
    share = ranks.current_share()
    with ranks.plain_calls():
        key, table, last = _fresh_key(), quantile_table(distribution), _is_last(h)
    start = 0 if share is None else share.start
    try:
        with ranks.plain_calls():
            noisy: Tensor = _AddNoise.apply(_flat(h, last), _map(theta, h.shape[1:], last), key, table, start)
    except Exception as error:
        FINDINGS.usable = False
        warnings.warn(
            f"noise cannot be compiled here ({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
            "drawing it uncompiled, which is slower",
            stacklevel=2,
        )
        return None
    return _unflat(noisy, h.shape[1:], last)
