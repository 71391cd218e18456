"""Progress of long work: a bar on a terminal, plain lines elsewhere. Knows no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, TextIO, cast, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from learn2perturb.terminal import Steady, level, say, visible

Progress = Callable[[float, float, str], object]  # done, total, of what


def duration(seconds: float) -> str:
    """Return a time as people say it: ``40 s``, ``3.5 min``, ``2.1 h``, ``4.0 days``."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


class _Start(NamedTuple):
    """When work was first heard of, and how much of it was done then."""

    at: float
    done: float
    total: float

    def left(self, now: float, done: float, known: float | None) -> str:
        """Say how long the rest takes: so many seconds where that is known, else if it goes on as before."""
        if done <= self.done or now <= self.at:
            return ""
        rate = (done - self.done) / (now - self.at)
        seconds = (self.total - done) / rate if known is None else known
        return f", {rate:.3g} a second, about {_rest(seconds)} left"


def _rest(seconds: float) -> str:
    """Return the words for what is left."""
    if seconds >= 7200:
        return duration(seconds)
    return f"{max(1, round(seconds / 60))} min" if seconds > 60 else f"{seconds:.0f} s"


@final
class _Left(TimeRemainingColumn):
    """The time that is left, as it was said to be, else by the speed of the last seconds."""

    def render(self, task: Task) -> Text:
        known = task.fields.get("left")
        return super().render(task) if known is None else Text(f"about {_rest(known)} left", "progress.remaining")


@final
class Reporter:
    """One bar and lines above it, on standard error; off a terminal, a line every ``interval`` seconds.

    ``silent`` says nothing at all: for all but one of several processes.
    """

    def __init__(self, enabled: bool = True, interval: float = 30.0, *, silent: bool = False) -> None:
        self.silent = silent or level() < 0
        self.enabled = enabled and not self.silent
        self.interval = interval / (6 if level() > 0 else 1)
        self.unit = ""  # of what is counted, with a blank before it
        self.left: float | None = None  # seconds, where who reports knows better than by what is done so far
        self._console = Console(file=cast(TextIO, Steady(sys.stderr)))
        self._bar: Bar | None = None
        self._task: Any = None
        self._label = ""
        self._spoken = time.monotonic()
        self._start: _Start | None = None

    def __enter__(self) -> Reporter:
        if self.enabled and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                _Left(), console=self._console, transient=True,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._task = None

    def line(self, text: str, *, always: bool = False) -> None:
        """Print one line, above the bar if there is one; ``always`` is for an answer to what the user has just done."""
        if self.silent or not (self.enabled or always):
            return
        if self._bar is not None:
            self._console.print(visible(text), highlight=False, markup=False)
        else:
            say(text)

    def __call__(self, done: float, total: float, label: str) -> None:
        """Show that ``done`` of ``total`` are done of what ``label`` names."""
        if not self.enabled:
            return
        label = visible(label)
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(label, total=total)
            self._bar.update(self._task, completed=done, total=total, description=label, left=self.left)
            return
        now = time.monotonic()
        if self._start is None or total != self._start.total or done < self._start.done:
            self._start = _Start(now, done, total)
        if now - self._spoken > self.interval:
            self._spoken = now
            self.line(f"{label}: {done:.0f}/{total:.0f}{self.unit}{self._start.left(now, done, self.left)}")


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """Give what reports progress for the body: a :class:`Reporter` for True, nothing for False and None."""
    if callable(progress):
        yield progress
        return
    with Reporter(bool(progress)) as reporter:
        yield reporter
