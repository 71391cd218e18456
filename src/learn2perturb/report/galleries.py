"""Galleries: what an attack has made of images, with the votes of the draws, as far as a page has room for them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from learn2perturb.evaluation import AttackedImages, Evaluation
from learn2perturb.evaluation.attacked import Numbers, broken_and_held, eight_bits
from learn2perturb.evaluation.pictures import amplification, difference, png
from learn2perturb.report.naming import label
from learn2perturb.report.section import Gallery, Shot

ROOM = 1_500_000  # characters of images on one page
KINDS = ("broken", "held")
MOST_SHOTS = 16  # of each kind in one gallery


def of(
    images: AttackedImages, evaluation: Evaluation, classes: Sequence[str], names: Mapping[str, str], room: int
) -> tuple[Gallery | None, int]:
    """Return the images under the kept row that leaves least, and how much room is left after them.

    The noise-off rows come last. None where no image of any row is kept.
    """
    rows = [(own, row) for row in images.rows if (own := images.row_of(evaluation, row)) is not None and len(row.index)]
    if not rows:
        return None, room
    own, row = min(rows, key=lambda pair: (not pair[0].noise, pair[0].accuracy))
    labels = images.labels[images.places(row)]
    clean = images.clean[images.places(row)]
    times = amplification(clean, row.adversarial)
    kinds = broken_and_held(row.predictions, labels, row.clean_predictions)
    shots: list[Shot] = []
    wanted = [(kind, at) for kind, those in zip(KINDS, kinds, strict=True) for at in np.flatnonzero(those)[:MOST_SHOTS]]
    # Of both kinds as many, should the room end: one of each in turn.
    for kind, at in sorted(wanted, key=lambda pair: [one for one in wanted if one[0] == pair[0]].index(pair)):
        pictures = (
            eight_bits(clean[at]),
            eight_bits(row.adversarial[at]),
            difference(clean[at], row.adversarial[at], times),
        )
        plain, attacked, added = coded = [_uri(png(picture)) for picture in pictures]
        if sum(map(len, coded)) > room:
            break
        room -= sum(map(len, coded))
        votes = row.predictions[:, at], None if row.clean_predictions is None else row.clean_predictions[:, at]
        shots.append(
            Shot(
                int(row.index[at]),
                classes[int(labels[at])],
                kind,
                plain,
                attacked,
                added,
                *(_votes(one, classes) for one in votes),
            )
        )
    said = label(own, names)
    shots.sort(key=lambda shot: (KINDS.index(shot.kind), shot.index))
    return Gallery(said, _told(images, said, times, len(shots), len(wanted)), times, tuple(shots)), room


def _told(images: AttackedImages, said: str, times: int, shown: int, kept: int) -> str:
    told = (
        f"Under {said}: {images.about.get('rule')}. Each as it is, attacked, and the difference {times} times "
        "amplified on grey, which is no difference; all rounded to 8 bits to be shown, while answers are to the exact "
        "images."
    )
    return told if shown == kept else f"{told} {shown} of {kept} are shown: the page has no more room."


def _uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _votes(predictions: Numbers | None, classes: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return class -> votes, most first, none left out."""
    if predictions is None:
        return ()
    numbers, counts = np.unique(predictions, return_counts=True)
    pairs = sorted(zip(numbers.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple((classes[number], count) for number, count in pairs)


def as_data(galleries: Iterable[Gallery]) -> list[dict[str, Any]]:
    """Return the numbers of galleries; the images themselves are on the page once."""
    return [
        {
            "row": gallery.row, "times": gallery.times,
            "shots": [
                {
                    "index": shot.index, "label": shot.label, "kind": shot.kind, "votes": dict(shot.votes),
                    "clean_votes": dict(shot.clean_votes),
                }
                for shot in gallery.shots
            ],
        }
        for gallery in galleries
    ]  # fmt: skip
