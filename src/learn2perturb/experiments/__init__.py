"""Experiments: studies by one file, and the tables and figures of the paper, beside the numbers that were published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.study_file import read_study
from learn2perturb.lazy import lazily

if TYPE_CHECKING:
    from learn2perturb.experiments.studying import Placing, StudyRun, study

__all__ = ["Placing", "Study", "StudyRun", "read_study", "study"]

__getattr__ = lazily(__name__, dict.fromkeys(("Placing", "StudyRun", "study"), "studying"))
