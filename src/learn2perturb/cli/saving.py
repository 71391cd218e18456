"""Saving what hours of work found: what cannot be written is still printed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from learn2perturb.errors import CheckpointError
from learn2perturb.terminal import number_among, one_line, say

SUCCESS, FAILURE = 0, 1


def saved(save: Callable[[], Path], lost: str = "the record is not saved, its table follows") -> Path | None:
    """Return where ``save`` has put a record; None, after one line of the reason, where it could not be written.

    Of several processes the first writes it.
    """
    if number_among()[0]:
        return Path(os.devnull)
    try:
        return save()
    except (CheckpointError, OSError) as error:
        say(f"learn2perturb: error: {one_line(error)}; {lost}")
        return None


def place_of(record: Path | None) -> str | None:
    """Return what ``--json`` says of the place of a record."""
    return None if record is None else str(record)
