"""What a terminal is shown: streams that a closed pipe or a full disk cannot break, text without control characters.

Names of classes, models and settings come from files of strangers; printed as they are, an escape sequence in one could
recolour, clear or retitle the terminal.  Knows no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast, final

# Control characters but for tab and line end, marks that turn the direction of text, halves of characters (which stand
# for the bytes of a file name that is no UTF-8).
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# What torchrun tells a process that it starts as one of several.
CALLED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def number_among() -> tuple[int, int]:
    """Return which of several processes this one was started as, and how many they are: (0, 1) where it is alone."""
    values = [os.environ.get(name, "") for name in CALLED]
    if not all(values) or not (values[0].isdecimal() and values[1].isdecimal()):
        return 0, 1
    return int(values[0]), int(values[1])


_level = 0  # of what is said of progress: below 0 nothing, above 0 more often


def level() -> int:
    """Return how much is said of progress: below 0 nothing but results, above 0 more than usual."""
    return _level


@contextlib.contextmanager
def verbosity(amount: int) -> Iterator[None]:
    """Say less (below 0) or more (above 0) of progress for the body."""
    global _level
    before, _level = _level, amount
    try:
        yield
    finally:
        _level = before


def visible(text: object) -> str:
    """Return ``text`` with every control character written out, as ESC is in ``repr``; tab and line end stay."""
    return _HIDDEN.sub(lambda found: ascii(found.group())[1:-1], str(text))


def one_line(text: object) -> str:
    """Return ``text`` visible and on one line."""
    return visible(" ".join(str(text).split()))


def markdown_row(cells: Iterable[object]) -> str:
    """Return a row of a Markdown table, each cell on one line; nothing in it ends it or starts markup of its own."""
    return "| " + " | ".join(re.sub(r"([\\|`<])", r"\\\1", one_line(cell)) for cell in cells) + " |"


@final
class Steady:
    """A text stream that never fails: what cannot be written is dropped, and ``lost`` says why.

    Work of hours must not end because nobody reads what it prints.

    Args:
        stream: where text goes; None, which Python has where the descriptor was closed, takes nothing.
        clean: write control characters out.
    """

    def __init__(self, stream: TextIO | None, *, clean: bool = False) -> None:
        self.inner: TextIO = io.StringIO() if stream is None else stream
        self.clean = clean
        self.lost: Exception | None = OSError(errno.EBADF, os.strerror(errno.EBADF)) if stream is None else None

    def write(self, text: str) -> int:
        """Write ``text``; characters that the encoding lacks are written out."""
        shown = visible(text) if self.clean else text
        if not isinstance(self.lost, BrokenPipeError):
            try:
                self._write(shown)
            # ValueError: closed by someone. RuntimeError: a signal's handler writes while a write is under way.
            except (OSError, ValueError, RuntimeError) as error:
                self.lost = error
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.inner.write(text)
        except UnicodeEncodeError as error:
            self.inner.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def flush(self) -> None:
        """Hand on what is buffered."""
        if not isinstance(self.lost, BrokenPipeError):
            try:
                self.inner.flush()
            except (OSError, ValueError, RuntimeError) as error:
                self.lost = error

    def settle(self) -> Exception | None:
        """Flush; return why text was lost, if it was. Python's own flush at its end then finds nothing to fail on."""
        self.flush()
        if self.lost is not None:
            # A stream that is none of the system's is not flushed at the end.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.inner.fileno())
        return self.lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def trusted(stream: TextIO) -> TextIO:
    """Return ``stream`` for text that is clean already and carries colours of our own."""
    return cast(TextIO, Steady(stream.inner)) if isinstance(stream, Steady) else stream


def say(text: object) -> None:
    """Print one line on standard error, whatever has become of it."""
    stream = Steady(sys.stderr)
    stream.write(visible(text) + "\n")
    stream.flush()


@contextlib.contextmanager
def steady_streams() -> Iterator[Steady]:
    """Make the standard streams steady for the body; give standard output, which tells whether it was all written."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number, and what is printed would go into it
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Steady(sys.stdout, clean=True), Steady(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.settle()
        err.settle()
        sys.stdout, sys.stderr = before
