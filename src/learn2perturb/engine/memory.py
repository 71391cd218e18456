"""Freed memory kept by the process (glibc), so that the tensors of the next pass need not be given fresh pages.

By default glibc gives large blocks back to the system as they are freed, and the system clears every page that it hands
out again: on two cores a sixth of the time of a training step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Iterator

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
_KEEPING = {_TRIM: 2_000_000_000, _TOP_PAD: 64 << 20, _MMAP: 32 << 20}
# What glibc's own adjustment arrives at in a program with large tensors; it cannot be handed back the adjusting itself.
_USUAL = {_TRIM: 64 << 20, _TOP_PAD: 128 << 10, _MMAP: 32 << 20}

_kept = False


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
    """Keep what is freed in the body; a body within a body changes nothing. Without glibc this does nothing."""
    global _kept
    mallopt = _mallopt()
    if _kept or mallopt is None:
        yield
        return
    _kept = True
    for parameter, value in _KEEPING.items():
        mallopt(parameter, value)
    try:
        yield
    finally:
        _kept = False
        for parameter, value in _USUAL.items():
            mallopt(parameter, value)
