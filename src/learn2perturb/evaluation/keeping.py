"""What is finished of the work on a record, kept on disk until that is written, so that a kill loses little."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, final

from learn2perturb import __version__, records
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation.attacked import AttackedImages
from learn2perturb.evaluation.pieces import NOTHING, Pieces, key_of
from learn2perturb.evaluation.result import Evaluation, Row
from learn2perturb.progress import duration
from learn2perturb.terminal import number_among, say


@final
@dataclass(frozen=True)
class PartialEvaluation(records.Saved):
    """The first rows of an evaluation that was not finished; ``key`` says of which."""

    FORMAT: ClassVar[str] = "learn2perturb.unfinished"
    VERSION: ClassVar[int] = 1

    key: str
    found: Evaluation

    def _check(self) -> None:
        self.found._checked()


@final
class Unfinished:
    """A folder for what is finished of a record; leaving the ``with`` block without an error removes it.

    ::

        with Unfinished("runs/digits/evaluation") as keep:
            evaluate(model, data, attacks, keep=keep).save("runs/digits/evaluation/mine.json")

    So for ``diagnose`` and ``certify``. What is kept is named after a hash of weights, images, all settings and
    versions, so that nothing of anything else is ever taken up.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path: Path | None = None
        self._key = ""
        self._pieces = NOTHING

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.clear()

    def clear(self) -> None:
        """Remove what is kept: the record has been written."""
        self._pieces.clear()
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self._images(self.path).unlink(missing_ok=True)

    def _place(self, identity: Any) -> Path:
        """Return the place of what is kept of this work, by this version of the package."""
        self._key = key_of((__version__, identity))
        return self.folder / f"unfinished-{self._key[:16]}.partial"

    def pieces(self, identity: Any, reason: str | None = None) -> Pieces:
        """Return the finished pieces of the work on what ``identity`` says; say what is there.

        ``reason``: why this work cannot be kept, which is said.
        """
        if reason:
            if not number_among()[0]:  # of several processes one speaks
                say(f"nothing is kept on the way, so a kill loses all: {reason}")
            return NOTHING
        self._pieces = Pieces(self._place(identity))
        if before := self._pieces.waiting:
            say(f"going on: {duration(before)} of work finished before, in {self._pieces.folder}")
        return self._pieces

    @staticmethod
    def _images(path: Path) -> Path:
        return path.with_suffix(".images.npz")

    def open(self, identity: Any, expected: int) -> tuple[Row, ...]:
        """Return the rows that an evaluation of ``identity``, of ``expected`` rows, has finished before; say so."""
        self.path = self._place(identity)
        if not self.path.exists():
            return ()
        try:
            kept = PartialEvaluation.load(self.path)
        except CheckpointError as error:
            warnings.warn(f"finished rows are computed again: {error}", stacklevel=3)
            return ()
        if kept.key != self._key:
            return ()
        rows = kept.found.rows
        say(f"going on: {len(rows)} of {expected} rows were finished before, in {self.path}")
        return rows

    def images(self) -> AttackedImages | None:
        """Return the images of the rows that :meth:`open` gave; None where they are lost."""
        if self.path is None:
            return None
        try:
            return AttackedImages.load(self._images(self.path))
        except CheckpointError:
            return None

    def keep(self, found: Evaluation, images: AttackedImages | None = None) -> None:
        """Keep the rows so far, and their images; where that fails, say so and go on."""
        if self.path is None:
            return
        try:
            if images is not None:
                images.save(self._images(self.path))
            PartialEvaluation(self._key, found).save(self.path)
        except CheckpointError as error:
            warnings.warn(f"finished rows are not kept: {error}", stacklevel=3)
            self.path = None


def taken(rows: Sequence[Row], counts: Sequence[int]) -> list[tuple[Row, ...]]:
    """Return finished ``rows`` run by run, each run having so many; a run of which some are missing is none."""
    found, start = [], 0
    for count in counts:
        if start + count > len(rows):
            break
        found.append(tuple(rows[start : start + count]))
        start += count
    return found
