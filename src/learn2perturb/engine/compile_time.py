"""How long this process has compiled: shown beside what compiling saves."""

from __future__ import annotations

import contextlib
import functools
import time

_started = 0.0
_spent = 0.0


def seconds_spent() -> float:
    """Return the seconds of compilation since :func:`watch` was first called."""
    return _spent


@functools.cache
def watch() -> None:
    """Time every compilation of this process from now on; that of a backward pass comes later than its forward pass."""
    with contextlib.suppress(ImportError):  # a part of torch that is not promised: without it nothing is shown
        from torch._dynamo.callback import on_compile_end, on_compile_start

        on_compile_start(_start)
        on_compile_end(_end)


def _start(_: object) -> None:
    global _started
    _started = time.perf_counter()


def _end(_: object) -> None:
    global _spent
    _spent += time.perf_counter() - _started
