"""How robust a classifier is, with repeated fresh draws, intervals, and the raw predictions kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learn2perturb.evaluation.intervals import Estimate, Interval, bootstrap_mean, paired_bootstrap, wilson
from learn2perturb.evaluation.result import Evaluation, PooledScore, Row

if TYPE_CHECKING:
    from learn2perturb.evaluation.accuracy import PREDICTORS, evaluate

__all__ = [
    "PREDICTORS",
    "Estimate",
    "Evaluation",
    "Interval",
    "PooledScore",
    "Row",
    "bootstrap_mean",
    "evaluate",
    "paired_bootstrap",
    "wilson",
]


def __getattr__(name: str) -> Any:
    # Lazy: a record is read and printed without importing torch.
    if name in ("PREDICTORS", "evaluate"):
        from learn2perturb.evaluation import accuracy

        return getattr(accuracy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
