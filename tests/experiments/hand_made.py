"""Evaluations whose every bit is chosen by hand, and results of studies made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from learn2perturb.evaluation.result import Evaluation, Row, statistics
from learn2perturb.experiments.results import Answer, Results
from learn2perturb.experiments.spec import Pair, Study
from learn2perturb.experiments.study_file import build_study
from learn2perturb.records import PackedIntegers, Saved


def evaluation(*right: int, n: int = 100, noise: bool = True, images: str = "a" * 16, **row: Any) -> Evaluation:
    """Return an evaluation of ``n`` images: in each scoring the first so many are ``right``; clean images all are."""
    labels = np.zeros(n, dtype=np.int64)
    stochastic = len(right) > 1
    attacked = np.stack([(np.arange(n) >= number).astype(np.int64) for number in right])
    rows = [
        _row(name, predictions, labels, stochastic=stochastic, noise=noise, **(row if name != "clean" else {}))
        for name, predictions in (("clean", np.zeros_like(attacked)), ("attacked", attacked))
    ]
    metadata = {"data": "cifar10", "split": "test", "images": images}
    return Evaluation(tuple(rows), PackedIntegers.pack(labels), 10, 0, metadata=metadata)


def _row(name: str, predictions: Any, labels: Any, *, stochastic: bool, noise: bool, **changed: Any) -> Row:
    found = statistics(predictions, labels, {}, stochastic=stochastic, batches=(), confidence=0.95)
    settings: dict[str, Any] = {
        "attack": name, "attack_type": None if name == "clean" else "PGD", "parameters": {}, "noise": noise,
        "eps": None if name == "clean" else 8 / 255, "stochastic": stochastic, "predictor": "single", "members": 1,
        "linf": 0.03, "l2": 1.5, "forward_passes": 1.0, "backward_passes": 1.0, "seconds": 0.0,
    }  # fmt: skip
    return Row(**(settings | found | changed))


def study(view: dict[str, Any] | None = None, /, **changed: Any) -> Study:
    """Return a study of two defenses under one attack, and its table; ``changed`` replaces parts of its file."""
    source = {
        "title": "By hand",
        "runs": {"runs": {"defense": ["pgd_at", "pni"]}},
        "cells": {"pgd": {"attack": "pgd20"}},
        "views": {"table": {"rows": ["defense"], "columns": ["cell"], **(view or {})}},
    }
    return build_study("hand", source | changed)


def results(of: Study, answer: Callable[[Pair], Saved | None], **more: Any) -> Results:
    """Return what ``answer`` gives for each pair."""
    return Results(of, tuple(Answer(pair, answer(pair)) for pair in of.all_pairs()), **more)
