"""Histograms of margins: which bin, sums of batches, and which rows they can be of."""

from __future__ import annotations

import numpy as np
import pytest

from learn2perturb.evaluation.margins import BINS, Margins


def counts(**bins: int) -> tuple[int, ...]:
    """Return counts by the number of their bin: ``b0=2`` for two answers in the first."""
    return tuple(bins.get(f"b{number}", 0) for number in range(BINS))


def test_a_margin_is_counted_in_its_bin_and_the_largest_in_the_last():
    margins = np.array([[0.0, 0.049, 0.051, 0.999, 1.0], [0.0, -0.051, -0.949, -0.951, -1.0]])
    found = Margins.of(margins, np.array([[True] * 5, [False] * 5]))
    assert BINS == 20
    assert found == Margins(counts(b0=2, b1=1, b19=2), counts(b0=1, b1=1, b18=1, b19=2))


def test_counts_of_batches_add_up():
    one, other = Margins(counts(b0=1), counts(b3=2)), Margins(counts(b0=2, b5=1), counts(b3=4))
    assert Margins.joined([one, other]) == Margins(counts(b0=3, b5=1), counts(b3=6))
    assert Margins.joined(iter([one])) == one and Margins.joined([]) is None


@pytest.mark.parametrize(("right", "wrong", "fits"), [
    (counts(b0=2, b4=1), counts(b1=3), True),
    (counts(b0=2), counts(b1=4), False),  # as many in all, but fewer right
    (counts(b0=3), counts(b1=2), False),  # as many right, but one less in all
    (counts(b0=3), counts(b1=4), False),
    (counts(b0=4), counts(b1=2), False),
    (counts(b0=4, b1=-1), counts(b1=3), False),
    (counts(b0=3)[:-1], counts(b1=3), False),
    (counts(b0=3), counts(b1=3)[:-1], False),
    ((*counts(b0=3), 0), (*counts(b1=3), 0), False),
])  # fmt: skip
def test_margins_are_of_a_row_with_as_many_right_and_wrong_answers(right, wrong, fits):
    assert bool(Margins(right, wrong).fits(np.array([[True, True, False], [False, True, False]]))) is fits
