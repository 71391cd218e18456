"""Who is told of every pass that an attack makes, so that one of minutes can show how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int, int], object]

_LISTENER: ContextVar[Listener | None] = ContextVar("learn2perturb_attack_listener", default=None)


@contextmanager
def passes_told_to(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with the images of every forward pass of attacks in the body, and those still attacked.

    A pass is told of when it has been given to the device, which is not waited for.
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def listener() -> Listener | None:
    """Return who is told here."""
    return _LISTENER.get()
