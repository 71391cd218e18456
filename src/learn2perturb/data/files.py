"""Whole files of a data set, read within bounds; one line of a reason from whatever went wrong."""

from __future__ import annotations

from pathlib import Path

# Three times the largest file of CIFAR, some 155 MB.
MOST_BYTES = 2**29


def read_whole(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, or larger than any file of these sets.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size} bytes, more than the {MOST_BYTES} that any file of these sets has")
    return path.read_bytes()


def reason_of(error: BaseException) -> str:
    """Return what an error says as one short line."""
    text = " ".join(str(error).split())
    return text[:200] if text.isprintable() and text else type(error).__name__
