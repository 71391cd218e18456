"""What a view holds: its numbers, differences to a baseline, and what agrees with the paper. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from learn2perturb import records
from learn2perturb.experiments.facts import Published

# Units of what is shown; all else is a share, shown in %.
UNITS = {"l2": "l2, [0, 1] pixel scale", "linf": "l_inf, [0, 1] pixel scale", "radius": "radius, [0, 1] pixel scale"}


@final
@dataclass(frozen=True)
class Bounds:
    """Ends of a 95 % interval."""

    low: float
    high: float


@final
@dataclass(frozen=True)
class ViewCell:
    """One number of a view.

    Attributes:
        row, column: labels of its place; a curve has no column, a history has ``schedule`` beside what is learned.
        x: where on the axis of a curve, or the epoch of a history.
        value: mean over seeds; None where no record is there, or where they are of unlike images.
        text: words in place of a number, such as a verdict.
        interval: over images and draws, of these very seeds.
        seeds, wanted: how many seeds are in it, and how many the study has.
        std, over_seeds: deviation over seeds, and Student's interval of the mean over seeds.
        n: images.
        measured: of which images, and how they were scored.
        paper: what the paper has there.
        records: names of the files that it was read from.
    """

    row: tuple[str, ...]
    column: tuple[str, ...] = ()
    x: float | None = None
    value: float | None = None
    text: str = ""
    interval: Bounds | None = None
    seeds: int = 0
    wanted: int = 1
    std: float | None = None
    over_seeds: Bounds | None = None
    n: int | None = None
    measured: str = ""
    paper: Published | None = None
    records: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class ViewDifference:
    """Accuracy less that of the baseline, paired over images and seeds, as a share of 1.

    Attributes:
        baseline: name of the run it is compared with.
        interval: over images and draws, of these very seeds.
        over_seeds: Student's interval over the differences of the seeds.
        p_value, p_holm: two-sided; after Holm's correction over all differences of the view.
    """

    row: tuple[str, ...]
    column: tuple[str, ...]
    x: float | None
    baseline: str
    difference: float
    interval: Bounds
    seeds: int
    over_seeds: Bounds | None
    p_value: float
    p_holm: float = 1.0

    @property
    def sentence(self) -> str:
        """What may be said."""
        if self.p_holm >= 0.05 or self.interval.low <= 0 <= self.interval.high:
            return "not shown to differ"
        said = "better" if self.difference > 0 else "worse"
        if self.over_seeds is None:
            return f"{said}, of one seed"
        over = not self.over_seeds.low <= 0 <= self.over_seeds.high
        return said if over else f"{said} for these seeds, not shown for others"


@final
@dataclass(frozen=True)
class PaperCheck:
    """Our number beside the paper's.

    Attributes:
        difference: ours less the paper's.
        allowed: how far they may lie apart: our interval on that side, with that over seeds, and the paper's deviation.
        verdict: ``suspect`` where nobody should rely on the paper's number.
        reasons: why they differ, as far as it is known.
    """

    row: tuple[str, ...]
    column: tuple[str, ...]
    x: float | None
    ours: float
    paper: Published
    difference: float
    allowed: float
    verdict: Literal["agrees", "differs", "suspect"]
    reasons: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Statement:
    """What the paper says in words of a figure, and whether our numbers say so: at ``holds`` of ``points`` places."""

    text: str
    holds: int
    points: int


@final
@dataclass(frozen=True)
class View(records.Saved):
    """A table or a figure of a study, with all it rests on.

    Attributes:
        rows, columns: names of the labels; of a curve and a history ``rows`` are those of a line.
        column_labels: the columns of a table in their order.
        x: label of the axis, empty for a table.
        value: what is shown; ``unit`` of it, ``%`` for shares.
        missing: pairs without a record.
    """

    FORMAT: ClassVar[str] = "learn2perturb.view"
    VERSION: ClassVar[int] = 1

    name: str
    kind: Literal["table", "curve", "history"]
    title: str
    study: str
    level: str | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    x: str
    value: str
    unit: str
    cells: tuple[ViewCell, ...]
    column_labels: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[ViewDifference, ...] = ()
    paper_checks: tuple[PaperCheck, ...] = ()
    statements: tuple[Statement, ...] = ()
    missing: int = 0

    @property
    def scale(self) -> float:
        """What a value is multiplied with to be shown."""
        return 100.0 if self.unit == "%" else 1.0

    def cell(self, row: tuple[str, ...], column: tuple[str, ...] = (), x: float | None = None) -> ViewCell | None:
        """Return the number at a place; None where the study has none."""
        return next((cell for cell in self.cells if (cell.row, cell.column, cell.x) == (row, column, x)), None)

    def __str__(self) -> str:
        from learn2perturb.experiments.rendering import markdown

        return markdown(self)
