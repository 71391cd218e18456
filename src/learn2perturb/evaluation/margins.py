"""How sure the answers of a row were: a histogram of margins, for the right and the wrong ones. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

BINS = 20  # of equal width, over the sizes of margins, [0, 1]


@final
@dataclass(frozen=True)
class Margins:
    """Counts of answers, over all scorings and images, by the size of their margin.

    A margin is the probability of the true class less the largest of the others: positive for ``right`` answers,
    negative for ``wrong`` ones. Bin i of ``BINS`` holds sizes from i / BINS to (i + 1) / BINS.
    """

    right: tuple[int, ...]
    wrong: tuple[int, ...]

    @classmethod
    def of(cls, margins: NDArray[np.float64], correct: NDArray[np.bool_]) -> Margins:
        """Count ``margins`` in [-1, 1], of answers of which ``correct`` were right; a tie is as it was answered."""
        bins = np.minimum((np.abs(margins) * BINS).astype(np.int64), BINS - 1)
        right, wrong = (np.bincount(bins[those], minlength=BINS).tolist() for those in (correct, ~correct))
        return cls(tuple(right), tuple(wrong))

    @classmethod
    def joined(cls, parts: Iterable[Margins]) -> Margins | None:
        """Return the counts of several batches; None of none."""
        parts = list(parts)
        if not parts:
            return None
        sums = [[sum(counts) for counts in zip(*side, strict=True)] for side in _sides(parts)]
        return cls(tuple(sums[0]), tuple(sums[1]))

    def fits(self, correct: NDArray[Any]) -> bool:
        """Tell whether as many answers were right and wrong as the bits of a row say."""
        counts = (*self.right, *self.wrong)
        whole = len(self.right) == len(self.wrong) == BINS and min(counts) >= 0
        return whole and sum(self.right) == correct.sum() and sum(counts) == correct.size


def _sides(parts: list[Margins]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [one.right for one in parts], [one.wrong for one in parts]
