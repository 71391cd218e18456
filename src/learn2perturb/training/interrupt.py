"""Ctrl-C, SIGTERM and SIGHUP stop a training between two steps, so that its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from learn2perturb.engine.ranks import ALONE, Ranks
from learn2perturb.errors import Interrupted, signal_name

_TWICE = 5.0  # seconds
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@final
class Interrupt:
    """Turns signals into a flag that is read between steps; a second signal stops at once.

    Args:
        say: tells the user what the first signal does.
        saves: whether there is a folder to save to.
        ranks: the processes that stop together, where one of them has a signal.
    """

    def __init__(self, say: Callable[[str], object], *, saves: bool, ranks: Ranks = ALONE) -> None:
        self.received: int | None = None
        self._ranks, self._elsewhere, self._at = ranks, 0, 0.0
        self.after = "this step"  # what is finished before the training stops
        self._say, self._saves, self._owner = say, saves, os.getpid()

    def asked(self) -> bool:
        """Tell whether a signal was received, here or by another process; all must ask at once."""
        self._elsewhere = self._ranks.largest(self.received or 0)
        return self._elsewhere > 0

    def check(self) -> None:
        """Stop if a signal was received.

        Raises:
            Interrupted: one was.
        """
        number = self._elsewhere if not self._ranks.alone else self.received
        if number:
            self._ranks.largest(0)  # all are here: what the first saves is saved
            raise Interrupted(number=number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals for the length of the body; one that the body has not acted on stops the caller behind it.

        Off the main thread, which alone receives signals, this does nothing.

        Raises:
            Interrupted: a second signal came, or one came too late for the body.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            # Ignored by whoever started this, such as nohup: stays so. Not Ctrl-C, which shells ignore for any "&".
            if handler is not signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: a handler that is not Python's, which Python cannot put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.asked()
        self.check()

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:
            return  # a worker that was forked to load data: its parent ends it
        if self.received is not None:
            # A launcher hands on the Ctrl-C that its processes have had from the terminal already.
            if not self._ranks.alone and time.monotonic() - self._at < _TWICE:
                return
            raise Interrupted(number=number)
        self.received, self._at = number, time.monotonic()
        then = "saving" if self._saves else "ending; nothing is saved, as no folder was given"
        again = "again" if number == signal.SIGINT else "or Ctrl-C"
        self._say(f"{signal_name(number)}: finishing {self.after}, then {then}; {again} to stop at once")
