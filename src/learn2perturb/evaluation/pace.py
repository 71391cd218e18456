"""How far an attack is and how long the rest takes: guessed first, then from the passes and seconds that it took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

from learn2perturb.attacks import BPDA, SPSA, Attack, Surrogate, Transfer
from learn2perturb.progress import Progress, Reporter, duration

_LONG = 60.0  # seconds from which on it is said how long the work takes
_FAR_LESS = 2.0  # times as long as for single draws, from which on these are named
_INTERVAL = 0.5  # seconds between two reports
_ALMOST = 0.99  # an attack that makes more passes than expected stands here until it ends
# Settings that multiply the passes of an attack, where it has them.
_FACTORS = ("steps", "search_steps", "queries", "population", "generations", "eot", "restarts", "targets", "directions")


@final
class Pace:
    """The passes of one attack: a guess from its settings for the first batch, then those that the last batch took."""

    def __init__(self, attack: Attack, stochastic: bool = False) -> None:
        self._attack, self._stochastic, self.expected = attack, stochastic, 0.0
        self._spoken, self._seen = time.monotonic(), False

    def listener(self, images: int, tell: Callable[[float], object]) -> Callable[[int, int], None]:
        """Return what counts the passes of a batch of so many ``images`` and calls ``tell`` with the share done.

        In the first batch those that are still attacked are expected to stay until the end, and no others.
        """
        done, passes, share = 0, 0.0, 0.0
        self.expected = self.expected or guessed_passes(self._attack, images, stochastic=self._stochastic)

        def told(rows: int, left: int) -> None:
            nonlocal done, passes, share
            done += rows
            passes += rows / max(left, 1)  # of an image that has not left
            now = time.monotonic()
            if now - self._spoken >= _INTERVAL:
                self._spoken = now
                rest = self.expected * images - done if self._seen else (self.expected - passes) * left
                share = min(max(share, done / (done + max(rest, 0.0))), _ALMOST)
                tell(share)

        return told

    def took(self, passes: float) -> None:
        """Take the passes of an image in the batch that has ended as those of the next."""
        self.expected, self._seen = max(passes, 1.0), True


@final
class Rest:
    """How long the rest of several rows takes: as each was seen to go on, before it begins by a guess.

    Args:
        images: of each row.
        guesses: row -> seconds of one of its images.
    """

    def __init__(self, images: int, guesses: Mapping[Any, float]) -> None:
        self._images, self._each = images, dict(guesses)
        self._spent, self._done = dict.fromkeys(guesses, 0.0), dict.fromkeys(guesses, 0.0)
        self._since = 0.0

    def begin(self) -> None:
        """Take the time at which a batch is begun."""
        self._since = time.monotonic()

    def end(self, row: object) -> None:
        """Add the time that this batch of ``row`` has taken."""
        self._spent[row] += time.monotonic() - self._since

    def leave_out(self, rows: Iterable[object]) -> None:
        """Expect nothing of rows that were finished before."""
        self._done |= dict.fromkeys(rows, self._images)

    def seconds(self, row: object, done: float) -> float:
        """Return how many are left, of all rows, when ``done`` images of ``row`` are done."""
        spent = self._spent[row] + time.monotonic() - self._since
        if done and spent:
            self._each[row] = spent / done
        self._done[row] = done
        return sum((self._images - self._done[one]) * each for one, each in self._each.items())


def guessed_passes(attack: Attack, images: int = 1, *, stochastic: bool = False) -> float:
    """Return about how many forward passes ``attack`` makes of each image, in batches of so many ``images``.

    Of a deterministic model it may be far fewer: images leave an attack that ``drops`` them.
    """
    return guessed_seconds(attack, images, forward=1.0, both=1.0, stochastic=stochastic)


def guessed_seconds(attack: Attack, images: int, *, forward: float, both: float, stochastic: bool = False) -> float:
    """Return about how long ``attack`` takes for each image, by the same guess.

    Args:
        attack: what is run.
        images: in a batch.
        forward: seconds of a forward pass of an image.
        both: of a forward and backward pass.
        stochastic: whether passes of the model differ, so that some attacks judge what they find by more of them.
    """
    parts = _made_of(attack)
    found = sum(_passes(part, images) * _each(part, forward, both) for part in parts)
    return found + (forward * sum(part.judging for part in parts) if stochastic else 0.0)


def _each(attack: Attack, forward: float, both: float) -> float:
    if not attack.needs_gradient:
        return forward
    return forward + both if _asks_first(attack) else both


def _asks_first(attack: Attack) -> bool:
    """Tell whether a gradient of a mean over draws asks for that mean before, by as many forward passes."""
    return attack.needs_gradient and attack.eot > 1 and attack.eot_average != "loss"


def _made_of(attack: Attack) -> list[Attack]:
    """Return the attacks by which ``attack`` makes its passes: its parts, that which it wraps, or itself."""
    parts = getattr(attack, "parts", None)
    if callable(parts):
        return [inner for part in parts(10).values() for inner in _made_of(part)]
    if isinstance(attack, BPDA | Transfer) and attack.attack is not None:
        return _made_of(attack.attack)
    return [attack]


def _passes(attack: Attack, images: int) -> float:
    if isinstance(attack, Surrogate):  # its queries are those of a whole batch
        return attack.queries * attack.eot / images
    sides = 2 if isinstance(attack, SPSA) else 1  # of every difference
    factors = (getattr(attack, name, 1) for name in _FACTORS)
    return float(sides * math.prod(factor for factor in factors if isinstance(factor, int) and factor > 0))


def tell_seconds(
    told: Progress,
    seconds: Mapping[str, float],
    what: str = "rows",
    *,
    early: Sequence[str] = (),
    single: float = math.inf,
) -> None:
    """Say about how long rows take, from one pass that was timed, where that is more than a minute.

    ``single``: how many seconds it would be for single draws, which is said where it is far less.
    """
    total = sum(seconds.values())
    if total >= _LONG and isinstance(told, Reporter):
        told.line(said_of(seconds, what, early=early))
        if total >= _FAR_LESS * single:
            told.line(
                "each step of an attack, and each score, is of all the passes that the predictor takes; predictor "
                f"'single' (--predictor single) is about {duration(single)}, fewer --members take less in proportion"
            )


def said_of(seconds: Mapping[str, float], what: str, *, early: Sequence[str] = ()) -> str:
    """Return the words for about how long rows, or ``what`` else, take; at most, where images may leave some early.

    ``early``: the rows that images may leave, by their names.
    """
    longest = max(seconds, key=lambda label: seconds[label])
    most = "" if len(seconds) == 1 else f", {longest} alone {duration(seconds[longest])}"
    total = duration(sum(seconds.values()))
    # Which images leave, and when, shows in the first batch and no sooner.
    bound, why = "about", ""
    if longest in early:
        bound, why = "up to", "; images that are broken leave early, so it may be far less"
    return f"{bound} {total} for {len(seconds)} {what}{most}: a guess from one pass of the network{why}"
