"""Accuracy of models that draw one of finitely many networks: a sum over these, no estimate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learn2perturb.attacks.inputs import check_images
from learn2perturb.checks import check_count
from learn2perturb.engine.finite import check_members, expected_correct, members_of
from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.config import EvaluateConfig

_COMPARED = 4  # images on which the model is compared with its members


def exact_accuracy(model: Any, x: Tensor, y: Tensor, *, batch_size: int = EvaluateConfig.batch_size) -> float:
    """Return the expected accuracy of one draw of ``model``, a finite random ensemble: ``sum_m p_m accuracy(f_m)``.

    Args:
        model: has ``members`` and ``probabilities``, as ``learn2perturb.models.RandomEnsemble``.
        x: images (N, C, H, W) in [0, 1], as they are or adversarial.
        y: labels (N,).
        batch_size: images in a pass.

    Raises:
        ConfigError: the model has no members and probabilities.
        InputError: images, labels or probabilities are not as said, or the model is more than a choice of a member.
    """
    check_images(model, x, y)
    check_count("batch_size", batch_size)
    members = members_of(model)
    if members is None:
        raise ConfigError(
            f"model is a {type(model).__name__} without members and probabilities, so that its accuracy is an "
            "estimate: use evaluate"
        )
    with own_modes(), in_mode(model, False):
        check_members(model, members, x[:_COMPARED])
        parts = [
            expected_correct(members, images, labels)
            for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
        ]
    return float(torch.cat(parts).mean())
