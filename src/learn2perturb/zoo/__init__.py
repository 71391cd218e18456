"""Trained networks that come with the package: ``NAME.safetensors`` and its model card ``NAME.md``. Knows no torch."""

from __future__ import annotations

import difflib
from pathlib import Path

from learn2perturb.errors import CheckpointError

PREFIX = "zoo:"
FOLDER = Path(__file__).parent
# A package is fetched whole by everyone who installs it.
MOST_BYTES = 3_000_000


def names() -> list[str]:
    """Return the names of the networks that are there, as in ``zoo:NAME``."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def weights(name: str) -> Path:
    """Return the file of the network called ``name``.

    Raises:
        CheckpointError: there is none of that name.
    """
    known = names()
    if name in known:
        return FOLDER / f"{name}.safetensors"
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    there = f"there are {', '.join(known)}" if known else "there is nothing in it yet"
    raise CheckpointError(
        f"no network {name!r} in the zoo: {hint}{there}; train one (learn2perturb train --recipe paper) and give its "
        "run folder"
    )


def card(name: str) -> str:
    """Return the model card of the network called ``name``: what it is, how it was trained, every number measured.

    Raises:
        CheckpointError: there is none of that name.
    """
    path = weights(name).with_suffix(".md")
    if not path.is_file():
        raise CheckpointError(f"the zoo has no card of {name!r}; reinstall learn2perturb")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the card {path} cannot be read ({error}); reinstall learn2perturb") from None
