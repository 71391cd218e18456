"""One training at a time in a run folder: a lock that goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from learn2perturb.errors import ConfigError

NAME = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Hold the file ``path``, made if it is not there, for the body; False if another process has it.

    Where the file system has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno not in _TAKEN
            return
        os.ftruncate(descriptor, 0)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {date}\n".encode())
        try:
            yield True
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the existing folder ``run`` for the body. Where the file system has no locks, nothing is held.

    Raises:
        ConfigError: another training holds it.
    """
    with taken(run / NAME) as mine:
        if not mine:
            raise ConfigError(
                f"another training is at work in {run} ({_holder(run / NAME)}); wait for it, stop it, or give another "
                "--out"
            )
        yield


def _holder(path: Path) -> str:
    with open(path, "rb") as file:
        text = file.read(300).decode(errors="replace")
    return " ".join("".join(mark if mark.isprintable() else " " for mark in text).split()) or "process unknown"
