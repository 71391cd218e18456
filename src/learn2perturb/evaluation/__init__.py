"""How robust a classifier is, with repeated fresh draws, intervals, and the raw predictions kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.lazy import lazily

if TYPE_CHECKING:
    from learn2perturb.evaluation.arrays import black_box
    from learn2perturb.evaluation.attacked import AttackedImages
    from learn2perturb.evaluation.comparing import Comparison, Difference, compare
    from learn2perturb.evaluation.config import PREDICTORS, EvaluateConfig
    from learn2perturb.evaluation.evaluating import evaluate
    from learn2perturb.evaluation.exact import exact_accuracy
    from learn2perturb.evaluation.image_keeper import ImageKeeper
    from learn2perturb.evaluation.intervals import Estimate, Interval, bootstrap_mean, paired_bootstrap, wilson
    from learn2perturb.evaluation.keeping import Unfinished
    from learn2perturb.evaluation.predictors import Predictor
    from learn2perturb.evaluation.result import Evaluation, PooledScore, Row

__all__ = [
    "PREDICTORS",
    "AttackedImages",
    "Comparison",
    "Difference",
    "Estimate",
    "EvaluateConfig",
    "Evaluation",
    "ImageKeeper",
    "Interval",
    "PooledScore",
    "Predictor",
    "Row",
    "Unfinished",
    "black_box",
    "bootstrap_mean",
    "compare",
    "evaluate",
    "exact_accuracy",
    "paired_bootstrap",
    "wilson",
]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("Estimate", "Interval", "bootstrap_mean", "paired_bootstrap", "wilson"), "intervals"),
        **dict.fromkeys(("Evaluation", "PooledScore", "Row"), "result"),
        "PREDICTORS": "config",
        "EvaluateConfig": "config",
        "Predictor": "predictors",
        "AttackedImages": "attacked",
        "ImageKeeper": "image_keeper",
        "Unfinished": "keeping",
        "black_box": "arrays",
        "evaluate": "evaluating",
        "exact_accuracy": "exact",
        "Comparison": "comparing",
        "Difference": "comparing",
        "compare": "comparing",
    },
)
