"""The forward pass of a network under attack, compiled: element-wise work and noise join into few loops (CPU).

Like folding, this holds for the length of a context and replaces nothing: the network answers with another forward
function. The compiler keeps what it made between contexts, and checks that flags, modes, hooks and shapes are those it
compiled for.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from learn2perturb.engine import compile_time, fused
from learn2perturb.engine.compiler import FINDINGS

Forward = Callable[..., Any]
_CPU = torch.device("cpu")

# On a card the casts of all weights join into a few launches.
_OPTIONS: dict[str, fused.Options] = {"cpu": fused.FUSING, "cuda": {"combo_kernels": True}}

_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Forward]] = weakref.WeakKeyDictionary()


def _compile(forward: Forward, device: torch.device) -> Forward:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing the compiler warns of its own deprecations
        return torch.compile(forward, dynamic=False, options=_OPTIONS.get(device.type))


def _once(network: nn.Module, forward: Forward, fast: Forward, x: Tensor) -> Any:
    """Call the compiled forward; a network that cannot be compiled goes on uncompiled, which is said once."""
    import torch._dynamo

    # Hooks are part of what is compiled: noise inserted or removed later must be noticed.
    settings = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64)
    try:
        with settings, fused.inlined(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fast(x)
    except Exception as error:
        FINDINGS.failed.add(network)
        result = forward(x)  # a fault of the network's own shows here, as it would have without a compiler
        warnings.warn(
            f"{type(network).__name__} cannot be compiled here ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}); attacks on it run uncompiled, which is slower",
            stacklevel=2,
        )
        return result


def compiles(network: nn.Module) -> bool:
    """Tell whether passes of ``network`` in :func:`compiled` are compiled, one around this call included."""
    return getattr(network.__dict__.get("forward"), "compiles", False) or _can_compile(network)


def _can_compile(network: nn.Module) -> bool:
    """Tell whether a forward function is there to compile, and weights that are the same in every pass."""
    return not (
        network in FINDINGS.failed
        or "forward" in network.__dict__
        or "_orig_mod" in network._modules
        or any(parametrize.is_parametrized(module) for module in network.modules())
    )


@contextlib.contextmanager
def compiled(network: nn.Module, rows: int) -> Iterator[None]:
    """Run the differentiated passes of ``rows`` images compiled for the body; all others run as they are.

    One number of rows, because every other would be compiled anew: the last, smaller batch of an epoch runs uncompiled.
    """
    if not rows or not _can_compile(network):
        yield
        return
    compile_time.watch()
    forward: Forward = network.forward
    kept = _known.setdefault(network, {})
    if rows not in kept:
        # The class's function, not the bound method: what is kept must not keep the network alive.
        kept[rows] = _compile(type(network).forward, next((p.device for p in network.parameters()), _CPU))
    fast = kept[rows]

    def dispatch(x: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or len(x) != rows or not torch.is_grad_enabled() or network in FINDINGS.failed:
            return forward(x, *rest, **named)
        return _once(network, forward, lambda z: fast(network, z), x)

    dispatch.compiles = True  # type: ignore[attr-defined]
    network.forward = dispatch
    try:
        yield
    finally:
        del network.forward
