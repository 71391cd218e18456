"""How long this process has compiled: shown beside what compiling saves."""

from __future__ import annotations

import contextlib
import time

_started = 0.0
_spent = 0.0


def seconds_spent() -> float:
    """Return the seconds of compilation since :func:`watch` was first called."""
    return _spent


def watch() -> None:
    """Time every compilation of this process from now on; that of a backward pass comes later than its forward pass."""
    with contextlib.suppress(ImportError, AttributeError):  # not promised by torch: without it nothing is shown
        from torch._dynamo.callback import callback_handler

        if _start not in callback_handler.start_callbacks:  # torch._dynamo.reset() drops them
            callback_handler.register_start_callback(_start)
            callback_handler.register_end_callback(_end)


def _start(_: object) -> None:
    global _started
    _started = time.perf_counter()


def _end(_: object) -> None:
    global _spent
    _spent += time.perf_counter() - _started
