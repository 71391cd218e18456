"""What an evaluation found: rows of accuracies with intervals, and the raw predictions they follow from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from learn2perturb import records
from learn2perturb.brief import brief
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.evaluation.intervals import (
    Interval,
    Scores,
    accuracy_interval,
    follows,
    majority,
    mean_and_std,
    worst_of,
)
from learn2perturb.evaluation.margins import Margins
from learn2perturb.records import PackedBits, PackedIntegers
from learn2perturb.tables import aligned

CLEAN = "clean"
WORST_OF = (1, 10, 100)
MOST_CLASSES = 1_000_000
POOLED_NOTE = "of the same adversarial examples, which were crafted against the single draw"


@final
@dataclass(frozen=True)
class PooledScore:
    """Accuracy of an ensemble over all draws of a single-draw row, on that row's own images.

    ``note`` says what it is not: the examples were crafted against the single draw, so this is no accuracy under an
    attack on the ensemble.  For that, evaluate with ``predictor="vote"`` or ``"mean_probability"``.
    """

    predictor: str
    members: int
    accuracy: float
    interval: Interval
    predictions: PackedIntegers
    note: str = POOLED_NOTE


@final
@dataclass(frozen=True)
class Row:
    """One attack at one size against one predictor, scored ``draws`` times on ``n`` images.

    ``attack`` is the caller's name, ``"clean"`` for none; ``attack_type`` and ``parameters`` say what was run, as
    it was run (the seed of each batch follows from the evaluation's).  ``eps`` is in [0, 1] pixel scale.
    ``noise`` is False on the noise-off rows; ``stochastic`` says whether two scorings of this row can differ at all.
    A scoring of a predictor other than ``"single"`` is made of ``members`` passes.
    ``accuracy`` is the mean over scorings, ``std`` its deviation over scorings (ddof = 1; None for one scoring),
    ``interval`` is over images and draws.  ``worst_of[n]`` is the accuracy against an adversary who needs one wrong
    answer in n scorings.  ``linf`` and ``l2`` are mean sizes of the perturbation; passes are image passes of the attack
    per image.
    ``correct`` (draws, n) and ``predictions`` (draws, n) are what all accuracies follow from.
    ``zero_gradients`` counts the images whose gradient was exactly zero at the attack's first step (None: it has none).
    ``margins`` (None in older records): how sure the right and the wrong answers were.
    ``c_rising`` and ``loss_falling`` count the images on which the search of C&W had not converged (``AttackResult``).
    """

    __repr__ = brief

    attack: str
    attack_type: str | None
    parameters: dict[str, Any]
    eps: float | None
    noise: bool
    stochastic: bool
    predictor: str
    members: int
    n: int
    draws: int
    accuracy: float
    std: float | None
    interval: Interval
    worst_of: dict[int, float]
    linf: float
    l2: float
    forward_passes: float
    backward_passes: float
    seconds: float
    correct: PackedBits
    predictions: PackedIntegers
    pooled: tuple[PooledScore, ...] = ()
    zero_gradients: int | None = None
    c_rising: int | None = None
    loss_falling: int | None = None
    margins: Margins | None = None

    @property
    def label(self) -> str:
        """Short description, such as ``pgd 8/255, noise off``."""
        parts = [" ".join(part for part in (self.attack, self.eps_text) if part)]
        if not self.noise:
            parts.append("noise off")
        if self.predictor != "single":
            parts.append(self.predictor)
        return ", ".join(parts)

    @property
    def eps_text(self) -> str:
        """``eps`` as k/255 when it is one, with the norm when it is not l_inf."""
        norm = self.parameters.get("norm", "linf")
        return format_eps(self.eps) + ("" if norm == "linf" or self.eps is None else f" {norm}")


@final
@dataclass(frozen=True)
class Evaluation(records.Saved):
    """The rows of one evaluation, the labels of its images, and how, where and when it was made.

    ``batches`` are the numbers of images in each pass, in order: these may share draws. None: not known.
    """

    __repr__ = brief

    FORMAT: ClassVar[str] = "learn2perturb.evaluation"
    VERSION: ClassVar[int] = 2  # 1: intervals over images only, by ``resamples`` of a bootstrap

    rows: tuple[Row, ...]
    labels: PackedIntegers
    num_classes: int
    seed: int
    confidence: float = 0.95
    resamples: int = 0
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    batches: PackedIntegers | None = None

    def scores(self, row: Row) -> Scores:
        """Return which images were right in each scoring of ``row``, and which of them shared a pass."""
        return Scores(row.correct.unpack(), self._passes(), row.stochastic)

    def _passes(self) -> tuple[int, ...]:
        return () if self.batches is None else tuple(self.batches.unpack().tolist())

    def row(self, attack: str, eps: float | None = None, noise: bool = True, predictor: str = "single") -> Row:
        """Return the one row of ``attack`` (``"clean"`` for none); ``eps`` is needed where several were evaluated.

        Raises:
            UnknownNameError: no row of that attack.
            ConfigError: no row, or several, with that eps, noise and predictor.
        """
        named = [row for row in self.rows if row.attack == attack]
        if not named:
            raise UnknownNameError.of("attack in this evaluation", attack, {row.attack for row in self.rows})
        found = [row for row in named if row.noise == noise and row.predictor == predictor]
        if eps is not None:
            found = [row for row in found if row.eps is not None and math.isclose(row.eps, eps, abs_tol=1e-9)]
        if len(found) != 1:
            wanted = f"row {attack!r} with eps={eps}, noise={noise}, predictor={predictor!r}"
            known = "; ".join(f"eps={row.eps}, noise={row.noise}, predictor={row.predictor!r}" for row in named)
            raise ConfigError(f"{len(found)} rows match {wanted}; choose one of: {known}")
        return found[0]

    def recomputed(self) -> Evaluation:
        """Return the same evaluation with every accuracy computed anew from the raw predictions and labels."""
        labels = self.labels.unpack()
        rows = []
        for row in self.rows:
            predictions = row.predictions.unpack()
            pooled = {score.predictor: score.predictions.unpack() for score in row.pooled}
            if "vote" in pooled:
                pooled["vote"] = majority(predictions, self.num_classes)
            rows.append(
                dataclasses.replace(
                    row,
                    **statistics(
                        predictions,
                        labels,
                        pooled,
                        stochastic=row.stochastic,
                        batches=self._passes(),
                        confidence=self.confidence,
                    ),
                )
            )
        return dataclasses.replace(self, rows=tuple(rows))

    def _checked(self) -> Evaluation:
        """Check that bits agree with predictions and labels, and every number with the bits; return what these give.

        The intervals of version 1, over images only, are replaced.
        """
        labels = self.labels.unpack()
        self._check_classes(labels, *(row.predictions.unpack() for row in self.rows))
        for row in self.rows:
            predictions, correct = row.predictions.unpack(), row.correct.unpack()
            for score in row.pooled:
                if score.predictions.unpack().shape != labels.shape:
                    raise CheckpointError(f"row {row.label!r} has a {score.predictor} of another size; evaluate again")
            if predictions.shape != (row.draws, len(labels)) or not np.array_equal(predictions == labels, correct):
                raise CheckpointError(f"row {row.label!r} does not fit its predictions and labels; evaluate again")
            if row.margins is not None and not row.margins.fits(correct):
                raise CheckpointError(f"row {row.label!r} has margins of other answers than its bits; evaluate again")
        recomputed = self.recomputed()
        for row, true in zip(self.rows, recomputed.rows, strict=True):
            if follows(row.interval, self.scores(row), seed=self.seed):
                row = dataclasses.replace(row, interval=true.interval)
            name = next((name for name in _FOLLOWING if not _agree(getattr(row, name), getattr(true, name))), None)
            if name is not None:
                raise CheckpointError(
                    f"row {row.label!r} has {name} {_shown(getattr(row, name))}, but its bits give "
                    f"{_shown(getattr(true, name))}; restore the file or evaluate again"
                )
        return recomputed

    def _check_classes(self, *parts: NDArray[np.int64]) -> None:
        """Check that there are as many classes as a network may tell, and no label or answer beyond them."""
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise CheckpointError(f"num_classes is {self.num_classes}, must be 1 to {MOST_CLASSES:,}; restore the file")
        for part in parts:
            if part.size and not 0 <= part.min() <= part.max() < self.num_classes:
                raise CheckpointError(
                    f"there are classes from {part.min()} to {part.max()}, where num_classes is {self.num_classes}; "
                    "restore the file or evaluate again"
                )

    def __str__(self) -> str:
        return format_table(self)


# What follows from the bits of a row; ``correct`` and ``predictions`` are checked before.
_FOLLOWING = ("n", "draws", "accuracy", "std", "interval", "worst_of", "pooled")


def _agree(one: Any, other: Any) -> bool:
    """Tell whether two values are the same up to rounding: a sum may be taken in another order elsewhere."""
    if isinstance(one, Interval) and isinstance(other, Interval):
        return one.agrees(other)
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(_agree(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_agree, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=1e-9)
    return bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, Interval):
        return f"[{value.low:.6g}, {value.high:.6g}]"
    if isinstance(value, tuple):
        return ", ".join(f"{score.predictor} {score.accuracy:.6g}" for score in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def statistics(
    predictions: NDArray[np.int64],
    labels: NDArray[np.int64],
    pooled: Mapping[str, NDArray[np.int64]],
    *,
    stochastic: bool,
    batches: tuple[int, ...],
    confidence: float,
) -> dict[str, Any]:
    """Return the fields of a row that follow from ``predictions`` (S, N), ``labels`` (N) and ensembles of its draws.

    ``batches``: images in each pass, empty where it is not known.
    """
    correct = predictions == labels
    scorings = len(correct)
    mean, std = mean_and_std(correct)
    return {
        "n": len(labels),
        "draws": scorings,
        "accuracy": mean,
        "std": std,
        "interval": accuracy_interval(Scores(correct, batches, stochastic), confidence=confidence),
        # Without noise every draw is the same, so the worst of any number of them is the accuracy.
        "worst_of": (
            {n: worst_of(correct, n) for n in WORST_OF if n <= scorings}
            if stochastic
            else dict.fromkeys(WORST_OF, mean)
        ),
        "correct": PackedBits.pack(correct),
        "predictions": PackedIntegers.pack(predictions),
        "pooled": tuple(
            PooledScore(
                predictor=name,
                members=scorings,
                accuracy=float((ensemble == labels).mean()),
                interval=accuracy_interval(
                    Scores((ensemble == labels)[None], batches, stochastic), confidence=confidence
                ),
                predictions=PackedIntegers.pack(ensemble),
            )
            for name, ensemble in pooled.items()
        ),
    }


def format_eps(eps: float | None) -> str:
    """``8/255`` for 8/255, ``0.031`` for .031, nothing for None."""
    if eps is None:
        return ""
    if math.isnan(eps):
        return "nan"
    if math.isinf(eps):
        return "least"  # a minimum-norm attack without a bound
    steps = eps * 255
    if 0 < round(steps) < 255 and abs(steps - round(steps)) < 1e-6:
        return f"{round(steps)}/255"
    return f"{eps:.6g}"


def format_table(evaluation: Evaluation) -> str:
    """Plain-text table of the rows, and below it what the ensembles of the same draws give."""
    head = ("attack", "eps", "noise", "predictor", "accuracy %", "interval", "worst of 10", "n")
    right = (False, True, False, False, False, False, True, True)
    lines = aligned([head, *(_cells(row) for row in evaluation.rows)], right=right)
    lines.append("")
    lines.append(_legend(evaluation))
    pooled = [(row, score) for row in evaluation.rows for score in row.pooled if row.attack != CLEAN]
    if pooled:
        lines.append(f"Ensembles of the draws above, {POOLED_NOTE}:")
        lines.extend(
            f"  {row.label}: {score.predictor.replace('_', ' ')} of {score.members} draws {100 * score.accuracy:.2f} %"
            for row, score in pooled
        )
    lines.extend(f"NOTE: {finding}." for finding in evaluation.metadata.get("findings", ()))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    accuracy = f"{100 * row.accuracy:6.2f}" + ("" if row.std is None else f" +- {100 * row.std:.2f}")
    worst = row.worst_of.get(10)
    return (
        row.attack,
        row.eps_text,
        ("on" if row.stochastic else "none") if row.noise else "off",
        row.predictor if row.members == 1 else f"{row.predictor} of {row.members}",
        accuracy,
        f"[{100 * row.interval.low:.2f}, {100 * row.interval.high:.2f}]",
        "" if worst is None else f"{100 * worst:.2f}",
        str(row.n),
    )


def _legend(evaluation: Evaluation) -> str:
    draws = sorted({row.draws for row in evaluation.rows if row.draws > 1})
    over = f"mean +- std over {'/'.join(map(str, draws))} fresh draws; " if draws else ""
    notes = sorted({row.interval.note for row in evaluation.rows} - {""})
    legend = f"Accuracy: {over}interval: {100 * evaluation.confidence:g} %, over images and draws."
    return "\n".join([legend, *(f"NOTE: interval {note}." for note in notes)])
