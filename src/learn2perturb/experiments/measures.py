"""The number of a view's value in one record, with its interval, and what it was measured on. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

from learn2perturb.certification.record import Certification
from learn2perturb.diagnosis.record import Diagnosis
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.intervals import Interval, wilson
from learn2perturb.evaluation.result import CLEAN, Evaluation, Row
from learn2perturb.experiments.grid import value_and_number
from learn2perturb.experiments.spec import VALIDATION, Pair
from learn2perturb.records import Saved


@final
@dataclass(frozen=True)
class Measured:
    """Of which images a number is, and how they were scored: numbers that differ in it are not alike."""

    images: str
    n: int
    scoring: str

    def __str__(self) -> str:
        return f"{self.n} images of {self.images}, {self.scoring}"


@final
@dataclass(frozen=True)
class Reading:
    """A number, or words; ``interval`` is over images and draws."""

    value: float | None
    interval: Interval | None
    measured: Measured
    text: str = ""
    note: str = ""


def read(pair: Pair, record: Saved, value: str, noise: bool) -> Reading:
    """Return the number of ``value`` in the record of a pair.

    Raises:
        ConfigError: the record does not hold it.
    """
    found = _reading(pair, record, value, noise)
    if pair.cell.scoring.split != VALIDATION:
        return found
    # Which images a run holds out follows from its seed: each seed has others, and that is no fault of the study's.
    return replace(found, measured=replace(found.measured, images=f"{_data(record)}, held out by each seed"))


def _reading(pair: Pair, record: Saved, value: str, noise: bool) -> Reading:
    name, number = value_and_number(value)
    if isinstance(record, Evaluation):
        return _of_evaluation(record, row_of(record, pair, noise), name, number)
    if isinstance(record, Certification):
        return _of_certification(record, name, number)
    if isinstance(record, Diagnosis):
        return _of_diagnosis(record, name)
    raise ConfigError(f"the record of {pair.title} is a {type(record).__name__}, which no view shows")


def row_of(record: Evaluation, pair: Pair, noise: bool) -> Row:
    """Return the row of an evaluation that answers a pair.

    Raises:
        ConfigError: it holds none, or several.
    """
    attacked = pair.cell.attack is not None
    rows = [row for row in record.rows if (row.attack != CLEAN) == attacked]
    # A network without noise has no rows with its noise off, one whose noise never started has no others.
    rows = [row for row in rows if row.noise == noise] or [row for row in rows if not row.stochastic]
    if len(rows) > 1 and pair.cell.eps is not None:
        eps = pair.cell.eps
        rows = [row for row in rows if row.eps is not None and math.isclose(row.eps, eps, abs_tol=1e-9)]
    if len(rows) > 1:
        rows = [row for row in rows if row.attack == pair.cell.name] or rows
    if len(rows) != 1:
        held = "; ".join(row.label for row in record.rows)
        raise ConfigError(f"the record of {pair.title} holds {len(rows)} rows that answer it ({held}); score it again")
    return rows[0]


def _of_evaluation(record: Evaluation, row: Row, name: str, number: float | None) -> Reading:
    measured = Measured(_images(record.metadata), row.n, _scoring(row))
    if name == "accuracy":
        return Reading(row.accuracy, row.interval, measured, note=row.interval.note)
    if name == "worst_of":
        worst = row.worst_of.get(int(number or 0))
        if worst is None:
            known = ", ".join(map(str, row.worst_of))
            raise ConfigError(f"{row.label} has worst_of {known}, not {number:g}; score with more draws")
        return Reading(worst, None, measured)
    return Reading(row.l2 if name == "l2" else row.linf, None, measured)


def _of_certification(record: Certification, name: str, number: float | None) -> Reading:
    n = len(record.radii)
    measured = Measured(_images(record.metadata), n, f"{record.n} draws certify, alpha {record.alpha:g}, {record.norm}")
    right = record.predictions.unpack() == record.labels.unpack()
    if name == "radius":  # the average certified radius of Zhai et al. 2020: 0 where the class is wrong
        return Reading(float((right * record.radii).mean()), None, measured)
    share = record.abstained if name == "abstained" else record.accuracy_at(record.needed if number is None else number)
    return Reading(share, wilson(round(share * n), n), measured)


def _of_diagnosis(record: Diagnosis, name: str) -> Reading:
    lowest = record.measurement(record.lowest)
    measured = Measured(_images(record.metadata), lowest.n, f"{len(record.checks)} checks")
    if name == "verdict":
        return Reading(None, None, measured, text=record.verdict)
    return Reading(lowest.accuracy, lowest.interval, measured, note=lowest.interval.note)


def _images(metadata: dict[str, Any]) -> str:
    """Name the images: data and split, and a hash that tells a part of them from another."""
    parts = [str(metadata[key]) for key in ("data", "split") if metadata.get(key)]
    told = " ".join(parts) or "unknown data"
    return told + (f" ({str(metadata['images'])[:8]})" if metadata.get("images") else "")


def _data(record: Saved) -> str:
    metadata: dict[str, Any] = getattr(record, "metadata", {})
    return str(metadata.get("data") or "unknown data")


def _scoring(row: Row) -> str:
    if not row.stochastic:
        return "no noise"
    predictor = row.predictor if row.members == 1 else f"{row.predictor.replace('_', ' ')} of {row.members} passes"
    return f"{row.draws} {'draw' if row.draws == 1 else 'draws'}, {predictor}"
