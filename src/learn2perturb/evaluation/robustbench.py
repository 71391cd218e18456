"""What RobustBench wants to know of a model, filled from the records of a run; what they do not say stays null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from learn2perturb.evaluation.result import CLEAN, Evaluation, Row, format_eps
from learn2perturb.registry import DEFENSES, MODELS

FIELDS = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture"),
    *("eps", "clean_acc", "reported", "autoattack_acc", "external", "footnote", "unreliable"),
)
_AUTOATTACK = "AutoAttack"


def model_info(header: Mapping[str, Any], evaluations: Sequence[Evaluation], *, noise: bool = True) -> dict[str, Any]:
    """Return the fields of a RobustBench model-info file, https://github.com/RobustBench/robustbench (model_info/).

    Args:
        header: that of the run's ``model.safetensors``: its network, defense, data set and config.
        evaluations: records of this model; of several rows of a kind, the one with the most images counts.
        noise: False describes the network without its noise, from the rows with the noise switched off.
    """
    config = header.get("config") or {}
    dataset = header.get("dataset", config.get("dataset"))
    noisy = bool(header.get("noise"))
    predictor = (header.get("predictor") if noise else None) or "single"
    eps = config.get("eps")
    rows = [
        row
        for evaluation in evaluations
        if dataset is None or evaluation.metadata.get("data") in (dataset, None)
        for row in evaluation.rows
        if row.noise == (noise or not noisy) and row.predictor == predictor
    ]
    clean = _largest([row for row in rows if row.attack == CLEAN])
    attacked = [row for row in rows if row.eps is not None and eps is not None and math.isclose(row.eps, eps)]
    auto = _largest([row for row in attacked if row.attack_type == _AUTOATTACK])
    info: dict[str, Any] = dict.fromkeys(FIELDS)
    info |= {
        "additional_data": False if dataset else None,  # a run reads one data set
        "number_forward_passes": (clean.members if clean else 1) if predictor != "single" else 1,
        "dataset": dataset,
        "architecture": _architecture(header.get("registered_name")),
        "eps": format_eps(eps) or None,
        "clean_acc": _percent(clean),
        "autoattack_acc": _percent(auto),
        "footnote": _footnote(header if noise else {}, clean, auto, attacked),
    }
    return info | _paper(header.get("defense", config.get("defense")))


def _largest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.n) if rows else None


def _percent(row: Row | None) -> str | None:
    return None if row is None else f"{100 * row.accuracy:.2f}"


def _architecture(name: str | None) -> str | None:
    return MODELS.entry(name).summary if name is not None and name in MODELS else name


def _paper(defense: str | None) -> dict[str, str | None]:
    """Return title and authors of the defense's paper, registered as ``Authors, title``."""
    if defense is None or defense not in DEFENSES:
        return {"name": defense}
    entry = DEFENSES.entry(defense)
    authors, together, title = entry.paper.partition(" et al., ")
    return {"name": title, "authors": f"{authors} et al."} if together else {"name": entry.paper or entry.summary}


def _footnote(header: Mapping[str, Any], clean: Row | None, auto: Row | None, attacked: Sequence[Row]) -> str | None:
    """Say what the numbers do not: how many images and draws, and what was run instead of AutoAttack."""
    parts = []
    if header.get("noise"):
        parts.append(f"Randomised: noise at {len(header['noise'])} sites, on at test time.")
    if clean is not None:
        draws = f", mean of {clean.draws} draws" if clean.draws > 1 else ""
        parts.append(f"Clean accuracy on {clean.n} images{draws}.")
    if auto is not None:
        parts.append(f"{auto.attack} on {auto.n} images.")
    elif attacked:
        worst = min(attacked, key=lambda row: row.accuracy)
        parts.append(f"AutoAttack was not run; {worst.attack} leaves {100 * worst.accuracy:.2f} % of {worst.n} images.")
    return " ".join(parts) or None
