"""What a study has found so far: for each pair of run and cell its record, where there is one. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

from learn2perturb.experiments.spec import Pair, RunPlan, Study, matches
from learn2perturb.records import Saved


@final
@dataclass(frozen=True)
class Answer:
    """The record of a pair: an Evaluation, a Certification or a Diagnosis; None where it is not computed yet."""

    pair: Pair
    record: Saved | None
    path: Path | None = None


@final
@dataclass(frozen=True)
class Results:
    """The answers of a study in its order, the metrics of its trainings, one dictionary an epoch, and their folders."""

    study: Study
    answers: tuple[Answer, ...]
    history: Callable[[RunPlan], list[dict[str, Any]]] = field(default=lambda run: [])
    folder: Callable[[RunPlan], Path | None] = field(default=lambda run: None)

    def where(self, labels: Mapping[str, Any]) -> Iterator[Answer]:
        """Give the answers whose pair has these labels."""
        return (answer for answer in self.answers if matches(answer.pair, labels))

    def record(self, pair: Pair) -> Saved | None:
        """Return the record of a pair; None where there is none yet."""
        found = self.answer(pair)
        return None if found is None else found.record

    def answer(self, pair: Pair) -> Answer | None:
        """Return the answer of a pair of the study."""
        return self._by_key.get(pair.key)

    @cached_property
    def _by_key(self) -> dict[tuple[str, ...], Answer]:
        return {answer.pair.key: answer for answer in self.answers}

    @property
    def missing(self) -> int:
        """How many pairs have no record yet."""
        return sum(answer.record is None for answer in self.answers)
