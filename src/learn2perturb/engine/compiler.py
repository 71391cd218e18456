"""What the work under way has found of the compiler: where it failed, nothing is compiled until that work ends."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import final

from torch import nn


@final
class Findings:
    """What has failed to compile since the outermost work began, and whether noise is being inlined.

    Attributes:
        usable: whether kernels of noise compile, as far as is known.
        failed: the networks whose passes do not.
        inlined: whether noise becomes part of what is compiled now.
        works: how many bodies of :func:`tried_anew` are under way.
    """

    def __init__(self) -> None:
        self.usable, self.inlined, self.works = True, False, 0
        self.failed: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def forget(self) -> None:
        """Let everything be tried again."""
        self.usable = True
        self.failed.clear()


# One object for good, since the compiler looks through attributes and not through context variables, and would compile
# again for another object.
FINDINGS = Findings()


@contextlib.contextmanager
def tried_anew() -> Iterator[None]:
    """Let what fails to compile in the body run uncompiled for the rest of it, and not for longer.

    A body within a body is part of the outer one.
    """
    FINDINGS.works += 1
    try:
        yield
    finally:
        FINDINGS.works -= 1
        if not FINDINGS.works:
            FINDINGS.forget()
