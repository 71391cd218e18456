"""Experiments: studies by one file, and the tables and figures of the paper, beside the numbers that were published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.study_file import read_study

if TYPE_CHECKING:
    from learn2perturb.experiments.studying import Placing, StudyRun, study

__all__ = ["Placing", "Study", "StudyRun", "read_study", "study"]

# What needs torch is imported when it is first asked for: the command line reads a study without it.
_LAZY = ("Placing", "StudyRun", "study")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from learn2perturb.experiments import studying

    value = getattr(studying, name)
    globals()[name] = value
    return value
