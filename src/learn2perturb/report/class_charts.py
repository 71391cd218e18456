"""Charts of single classes: how accurate each is, and what it is taken for; of many classes the worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from learn2perturb.evaluation import Evaluation, Row
from learn2perturb.report.charts import Spec, chart, percent

MOST_CLASSES, MOST_CONFUSED = 40, 20  # that a chart has room for


def per_class(evaluation: Evaluation, row: Row, names: Sequence[str], attack: str) -> Spec:
    """Return the accuracy of each class in ``row``, whose ``attack`` is said in the title; the lowest of many."""
    labels, correct = evaluation.labels.unpack(), row.correct.unpack()
    values: list[dict[str, Any]] = [
        {"class": names[label], "accuracy": 100 * float(correct[:, own].mean()), "n": int(own.sum())}
        for label in np.unique(labels).tolist()
        for own in (labels == label,)
    ]
    every = len(values)
    if every > MOST_CLASSES:
        values = sorted(values, key=lambda value: value["accuracy"])[:MOST_CLASSES]
    title = f"Accuracy of {'each class' if every <= MOST_CLASSES else f'the lowest {MOST_CLASSES} of {every} classes'}"
    told = ", ".join(f"{value['class']}: {value['accuracy']:.0f} %" for value in values)
    return chart(
        f"{title}, {attack}", told, data={"values": values}, mark="bar",
        encoding={
            "x": {"field": "class", "type": "nominal", "title": None, "sort": None},
            "y": {"field": "accuracy", **percent("accuracy, %")},
            "tooltip": [{"field": "class"}, {"field": "accuracy", "format": ".1f"}, {"field": "n"}],
        },
    )  # fmt: skip


def confusion(evaluation: Evaluation, row: Row, names: Sequence[str], attack: str) -> Spec:
    """Return how often each class is taken for each, in shares of the true class, over all draws.

    Of many classes these are the ones with most wrong answers, as true classes and as answers.
    """
    labels, predictions = evaluation.labels.unpack(), row.predictions.unpack()
    shown, title = np.arange(evaluation.num_classes), "What each class is taken for"
    if evaluation.num_classes > MOST_CONFUSED:
        wrong = predictions != labels
        both = np.concatenate([np.broadcast_to(labels, wrong.shape)[wrong], predictions[wrong]])
        counts = np.bincount(both, minlength=evaluation.num_classes)
        shown = np.sort(np.argsort(-counts, kind="stable")[:MOST_CONFUSED])
        title = f"What classes are taken for, of {evaluation.num_classes} the {MOST_CONFUSED} most confused"
    answers = {true: own for true in shown.tolist() if (own := predictions[:, labels == true]).size}
    values: list[dict[str, Any]] = [
        {"true": names[true], "taken for": names[guess], "share": 100 * float((own == guess).mean())}
        for true, own in answers.items()  # a class without images has no shares
        for guess in shown.tolist()
    ]
    wrong_ones = [value for value in values if value["true"] != value["taken for"] and value["share"]]
    most = max(wrong_ones, key=lambda value: float(value["share"])) if wrong_ones else None
    told = f"most often {most['true']} is taken for {most['taken for']}, {most['share']:.0f} %" if most else "no class"
    told += "" if most else " is taken for another"
    axis = {"type": "nominal", "sort": None}
    return chart(
        f"{title}, {attack}", told, data={"values": values}, mark="rect",
        encoding={
            "x": {"field": "taken for", **axis}, "y": {"field": "true", **axis},
            "color": {"field": "share", "type": "quantitative", "title": "%", "scale": {"scheme": "blues"}},
            "tooltip": [{"field": "true"}, {"field": "taken for"}, {"field": "share", "format": ".1f"}],
        },
    )  # fmt: skip
