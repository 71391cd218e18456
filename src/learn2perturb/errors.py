"""The one family of errors: every message names the value received, what is allowed, and the fix."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from typing import final


def _shortened(text: str) -> str:
    """Return ``text``, without its middle if a value in it is as long as a file."""
    return text if len(text) <= 2000 else f"{text[:1000]} ... {text[-500:]}"


class Learn2PerturbError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits 2."""

    def __str__(self) -> str:
        return _shortened(super().__str__())


class ConfigError(Learn2PerturbError, ValueError):
    """A setting has a value that is not allowed."""


class UnknownNameError(ConfigError, KeyError):
    """A name is in no registry; the message lists the nearest names."""

    def __str__(self) -> str:
        return _shortened(str(self.args[0]))  # KeyError would print the repr, quotes and all

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
        """Build the error for ``name``, unknown among ``known`` things of ``kind``, nearest names first."""
        names = sorted(known)
        shown = names[:24] + ([f"and {len(names) - 24} more"] if len(names) > 24 else [])
        near = difflib.get_close_matches(str(name), names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        return cls(f"unknown {kind} {name!r}: {hint}known: {', '.join(shown)}")


class InputError(Learn2PerturbError, ValueError):
    """Images, labels or logits do not have the type, shape or range that they must have."""


class SiteError(Learn2PerturbError, ValueError):
    """A submodule cannot be perturbed as asked."""


class NoiseError(Learn2PerturbError, RuntimeError):
    """Noise cannot be switched, replayed or removed in this state."""


class DataError(Learn2PerturbError, ValueError):
    """A data set is missing, damaged, or not of the expected layout."""


class CheckpointError(Learn2PerturbError, RuntimeError):
    """A run folder, checkpoint or record cannot be read or does not fit."""


class TrainingError(Learn2PerturbError, RuntimeError):
    """A training cannot go on."""


class MemoryLimitError(TrainingError):
    """Memory ran out, and no smaller part of the work is possible here; the message names the fix."""


class NonFiniteError(TrainingError):
    """A loss or a weight became NaN or infinite; the message names step, batch and the last good checkpoint."""


class ElsewhereError(TrainingError):
    """Another of several processes has failed, hangs or is gone; the message names it."""


class MissingDependencyError(Learn2PerturbError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


@final
class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work; the text says what is saved. ``except Exception`` does not hold it up.

    Args:
        text: what the user is told.
        number: of the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        self.number = number
        super().__init__(text or f"stopped by {signal_name(number)}")

    @classmethod
    def of(cls, stop: KeyboardInterrupt, kept: str) -> Interrupted:
        """Return ``stop`` with what is kept: by which signal it came is kept too, Ctrl-C if nothing else is known."""
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        return cls(f"stopped by {signal_name(number)}; {kept}", number)

    @property
    def exit_code(self) -> int:
        """What a shell gives to a program that the signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


def signal_name(number: int) -> str:
    """Return what a user calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
