"""How far an attack is in its batch, from the passes that it has made and those that it is expected to make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import final

from learn2perturb.attacks import BPDA, SPSA, Attack, Surrogate, Transfer
from learn2perturb.progress import Progress, Reporter, duration

_LONG = 60.0  # seconds from which on it is said how long the work takes
_INTERVAL = 0.5  # seconds between two reports
_ALMOST = 0.99  # an attack that makes more passes than expected stands here until it ends
# Settings that multiply the passes of an attack, where it has them.
_FACTORS = ("steps", "search_steps", "queries", "population", "generations", "eot", "restarts", "targets", "directions")


@final
class Pace:
    """The passes of one attack: a guess from its settings for the first batch, then those that the last batch took."""

    def __init__(self, attack: Attack) -> None:
        self._attack, self.expected = attack, 0.0
        self._spoken = time.monotonic()

    def listener(self, images: int, tell: Callable[[float], object]) -> Callable[[int], None]:
        """Return what counts the passes of a batch of so many ``images`` and calls ``tell`` with the share done."""
        done = 0
        self.expected = self.expected or guessed_passes(self._attack, images)

        def told(rows: int) -> None:
            nonlocal done
            done += rows
            now = time.monotonic()
            if now - self._spoken >= _INTERVAL:
                self._spoken = now
                tell(min(done / (self.expected * images), _ALMOST))

        return told

    def took(self, passes: float) -> None:
        """Take the passes of an image in the batch that has ended as those of the next."""
        self.expected = max(passes, 1.0)


def guessed_passes(attack: Attack, images: int = 1) -> float:
    """Return about how many forward passes ``attack`` makes of each image, in batches of so many ``images``."""
    parts = getattr(attack, "parts", None)
    if callable(parts):
        return sum(guessed_passes(part, images) for part in parts(10).values())
    if isinstance(attack, BPDA | Transfer) and attack.attack is not None:
        return guessed_passes(attack.attack, images)
    if isinstance(attack, Surrogate):  # its queries are those of a whole batch
        return attack.queries * attack.eot / images
    sides = 2 if isinstance(attack, SPSA) else 1  # of every difference
    factors = (getattr(attack, name, 1) for name in _FACTORS)
    return float(sides * math.prod(factor for factor in factors if isinstance(factor, int) and factor > 0))


def tell_seconds(told: Progress, seconds: Mapping[str, float], what: str = "rows") -> None:
    """Say about how long rows take, from one pass that was timed, where that is more than a minute."""
    if sum(seconds.values()) >= _LONG and isinstance(told, Reporter):
        told.line(said_of(seconds, what))


def said_of(seconds: Mapping[str, float], what: str) -> str:
    """Return the words for about how long rows, or ``what`` else, take."""
    longest = max(seconds, key=lambda label: seconds[label])
    most = "" if len(seconds) == 1 else f", {longest} alone {duration(seconds[longest])}"
    total = duration(sum(seconds.values()))
    return f"about {total} for {len(seconds)} {what}{most}: a guess from one pass of the network"
