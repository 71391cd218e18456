"""Trained networks that come with the package, each a small run folder with its records and a model card.

::

    NAME/model.safetensors.xz  weights, packed by xz
    NAME/card.md               what it is, every number that was measured, its diagnosis, how to repeat it
    NAME/config.yaml           settings of its training;  metrics.jsonl: a line an epoch
    NAME/evaluation/*.json     records of evaluate and diagnose

Knows no torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from learn2perturb.errors import CheckpointError

PREFIX = "zoo:"
FOLDER = Path(__file__).parent
WEIGHTS, CARD = "model.safetensors.xz", "card.md"
# A package is fetched whole by everyone who installs it.
MOST_BYTES = 1_500_000  # of the weights of a network
MOST_BYTES_IN_ALL = 12_000_000


def names() -> list[str]:
    """Return the names of the networks that are there, as in ``zoo:NAME``."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def folder(name: str) -> Path:
    """Return the folder of the network called ``name``: a run folder, as every verb takes one.

    Raises:
        CheckpointError: there is none of that name.
    """
    known = names()
    if name in known:
        return FOLDER / name
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    there = f"there are {', '.join(known)}" if known else "there is nothing in it yet"
    raise CheckpointError(
        f"no network {name!r} in the zoo: {hint}{there}; train one (learn2perturb train --recipe paper) and give its "
        "run folder"
    )


def weights(name: str) -> Path:
    """Return the file of the network called ``name``.

    Raises:
        CheckpointError: there is none of that name.
    """
    return folder(name) / WEIGHTS


def card(name: str) -> str:
    """Return the model card of the network called ``name``: what it is, how it was trained, every number measured.

    Raises:
        CheckpointError: there is none of that name.
    """
    path = folder(name) / CARD
    if not path.is_file():
        raise CheckpointError(f"the zoo has no card of {name!r}; reinstall learn2perturb")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the card {path} cannot be read ({error}); reinstall learn2perturb") from None


def summary(name: str) -> str:
    """Return the first sentence of the card of the network called ``name``.

    Raises:
        CheckpointError: there is none of that name.
    """
    lines = [line for line in card(name).splitlines() if line and not line.startswith("#")]
    return lines[0] if lines else ""


def path_of(source: str) -> str:
    """Return ``source``, or, of ``zoo:NAME``, the folder that it stands for.

    Raises:
        CheckpointError: there is none of that name.
    """
    return str(folder(source.removeprefix(PREFIX))) if source.startswith(PREFIX) else source
