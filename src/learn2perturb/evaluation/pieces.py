"""Finished pieces of work of hours, kept on disk until its record is written, so that a kill loses little of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

import torch

from learn2perturb.engine.ranks import ALONE, Ranks
from learn2perturb.engine.shared_work import each
from learn2perturb.errors import CheckpointError
from learn2perturb.records import atomic_write, plain

T = TypeVar("T")
_MOST = 2**31  # bytes that a file may unfold into
_SUFFIX = ".piece"


def key_of(identity: object) -> str:
    """Return 32 hexadecimal digits for whatever work follows from, as plain values."""
    text = json.dumps(plain(identity), sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@final
class Pieces:
    """Numbered pieces of work, those that were finished before taken from files of one folder.

    What a piece gives follows from its number, and from the ``key`` of its work: all that the work of a folder does not
    have in common. Each file holds pieces of one work, so that only those are read that are asked for.

    Args:
        folder: of the files; None keeps nothing.
    """

    # Seconds of work that are worth a file: at the end of numbered pieces, and between two of them.
    WORTH: ClassVar[float] = 0.5
    INTERVAL: ClassVar[float] = 10.0

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seconds = 0.0  # that the pieces have taken which were not computed again

    @property
    def waiting(self) -> float:
        """Seconds of work in the files."""
        return sum(_seconds(path) for path in self._files("*"))

    def each(
        self, work: Callable[[int], T], count: int, key: object, device: torch.device, ranks: Ranks = ALONE
    ) -> list[T]:
        """Return what ``work`` gives for each number below ``count``.

        Where ``key`` is None, nobody knows what it follows from, and nothing is kept; nor is it of several processes,
        which share the numbers, see ``shared_work``.
        """
        if self.folder is None or key is None or not ranks.alone:
            return each(work, count, ranks, device)
        return [value for value, _ in self.run(work, count, key, device)]

    def run(self, work: Callable[[int], T], count: int, key: object, device: torch.device) -> Iterator[tuple[T, bool]]:
        """Yield what ``work`` gives for each number in turn, and whether it is from before."""
        name = key_of(key)
        found = self._read(name, device)
        fresh: dict[int, T] = {}
        spent = 0.0
        try:
            for number in range(count):
                if number in found:
                    yield found.pop(number), True
                    continue
                started = time.perf_counter()
                fresh[number] = value = work(number)
                spent += time.perf_counter() - started
                if spent >= self.INTERVAL:
                    self._write(name, fresh, spent)
                    fresh, spent = {}, 0.0
                yield value, False
        finally:  # also where it was stopped: what is finished stays finished
            if fresh and spent >= self.WORTH:
                self._write(name, fresh, spent)

    def clear(self) -> None:
        """Remove all files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self, name: str) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(f"{name}-*{_SUFFIX}"))

    def _read(self, name: str, device: torch.device) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for path in self._files(name):
            try:
                found |= _unpacked(path.read_bytes(), name, device)
            except Exception as error:  # whatever has become of the file
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                warnings.warn(f"finished work is done again: {path} is damaged: {reason}", stacklevel=4)
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                self.seconds += _seconds(path)
        return found

    def _write(self, name: str, values: dict[int, Any], spent: float) -> None:
        """Keep pieces in a file of their own; where that fails, say so and keep no more."""
        if self.folder is None:
            return
        # No two files have one name, so that two who do the same work at once are not in each other's way.
        own = f"{name}-{round(1000 * spent)}-{os.urandom(4).hex()}{_SUFFIX}"
        try:
            atomic_write(self.folder / own, _packed(name, values))
        except CheckpointError as error:
            warnings.warn(f"finished work is not kept: {error}", stacklevel=4)
            self.folder = None


NOTHING = Pieces()


def _seconds(path: Path) -> float:
    """Return the seconds of work that the name of a file tells."""
    words = path.name.split("-")
    return int(words[1]) / 1000 if len(words) == 3 and words[1].isdecimal() else 0.0


def _packed(name: str, values: dict[int, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"key": name, "pieces": values}, buffer)
    return zlib.compress(buffer.getvalue(), 1)


def _unpacked(content: bytes, name: str, device: torch.device) -> dict[int, Any]:
    unfolding = zlib.decompressobj()
    raw = unfolding.decompress(content, _MOST)
    if not unfolding.eof:
        raise ValueError("it ends too early")
    kept = torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
    if kept["key"] != name:
        raise ValueError("it is of other work")
    pieces: dict[int, Any] = kept["pieces"]
    return pieces
