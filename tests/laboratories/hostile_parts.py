"""What hostile files are made with, and how they are put before the command line."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from tests.laboratories import runs

Build = Callable[[pathlib.Path], list[str]]  # gets the folder that holds a run, returns the command
TOUCH = "touch canary"
SMALL = ("--limit=2", "--device=cpu", "--attacks=none", "--draws=1")


class Runs:
    """A pickle that calls something when it is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def train_words(out: str) -> list[str]:
    """Return the command of a tiny training into ``out``."""
    return [*runs.TRAIN, f"--out={out}"]


def file_of(name: str, content: bytes, words: list[str]) -> Build:
    """Write a file, then say ``words``."""

    def build(folder: pathlib.Path) -> list[str]:
        (folder / name).write_bytes(content)
        return words

    return build


def in_run(name: str, content: bytes) -> Build:
    """Put a file into the run, into its newest checkpoint if it belongs there, and train on."""

    def build(folder: pathlib.Path) -> list[str]:
        sorted((folder / "run").rglob(name))[-1].write_bytes(content)
        return [*train_words("run"), "--epochs=1"]

    return build


def doubling(depth: int, *, key: bool = False) -> bytes:
    """Return a pickle of tuples that hold the one before twice: 2**depth items in a few bytes."""
    parts = [b"\x80\x02", b"}" if key else b"", b")q\x00"]
    parts += [b"h" + bytes([at]) + b"\x86q" + bytes([at + 1]) for at in range(depth)]
    return b"".join([*parts, b"K\x01s." if key else b"."])
