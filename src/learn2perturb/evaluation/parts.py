"""An attack on a batch that does not fit into memory: run in parts, its results joined."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack, AttackResult
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.random import derive_seed
from learn2perturb.engine.shapes import Images, Labels
from learn2perturb.evaluation.passes import Model


def attacked(attack: Attack, model: Model, x: Images, y: Labels, fits: Halving) -> AttackResult:
    """Run ``attack``, in parts of the batch if memory runs out; the first part draws as the whole batch would."""

    def part(rows: slice) -> AttackResult:
        own = attack if rows.start == 0 else dataclasses.replace(attack, seed=derive_seed(attack.seed or 0, rows.start))
        return own.run(model, x[rows], y[rows])

    return _joined(fits.run(part, len(x)))


def _joined(parts: list[AttackResult]) -> AttackResult:
    """Return the results of parts of a batch as one: rows joined, passes an image on average, time and counts added."""
    shares = [len(part.x_adv) / sum(len(one.x_adv) for one in parts) for part in parts]
    joined: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(AttackResult)):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[name] = torch.cat(values)
        elif name.endswith("_passes"):
            joined[name] = sum(value * share for value, share in zip(values, shares, strict=True))
        elif all(isinstance(value, (int, float)) for value in values):
            joined[name] = sum(values)
    return dataclasses.replace(parts[0], **joined)
