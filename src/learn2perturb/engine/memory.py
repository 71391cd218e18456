"""Freed memory kept by the process (glibc), so that the tensors of the next pass need not be given fresh pages.

By default glibc gives large blocks back to the system as they are freed, and the system clears every page that it hands
out again: on two cores a sixth of the time of a training step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import threading
from collections.abc import Callable, Iterator
from typing import final

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
_KEEPING = {_TRIM: 2_000_000_000, _TOP_PAD: 64 << 20, _MMAP: 32 << 20}
# What glibc's own adjustment arrives at in a program with large tensors; it cannot be handed back the adjusting itself.
_USUAL = {_TRIM: 64 << 20, _TOP_PAD: 128 << 10, _MMAP: 32 << 20}


@final
class _Keeping:
    """How many bodies keep memory now. The heap is the process's, so what they set ends with the last of them."""

    def __init__(self) -> None:
        self.bodies, self.lock = 0, threading.Lock()

    def count(self, change: int, mallopt: Callable[[int, int], int]) -> None:
        """Let a body begin (1) or end (-1); the first and the last of them tell glibc."""
        with self.lock:
            outermost = self.bodies == 0 or self.bodies + change == 0
            self.bodies += change
            for parameter, value in (_KEEPING if change > 0 else _USUAL).items() if outermost else ():
                mallopt(parameter, value)


_keeping = _Keeping()


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
    return function


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep what is freed in the body, and while other bodies still run. Without glibc this does nothing."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    _keeping.count(1, mallopt)
    try:
        yield
    finally:
        _keeping.count(-1, mallopt)
