"""What an attack maximises: losses of each example, from logits (N, K) and labels (N,), larger = more wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from learn2perturb.engine.shapes import Labels, Logits, PerImage
from learn2perturb.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """Return ``-log softmax(z)_y`` of each row, shape (N,)."""
    return functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerImage:
    """Return ``max_{j != y} z_j - z_y`` of each row, shape (N,): positive exactly where the prediction is not y."""
    column = y.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf).max(dim=1).values
    return others - logits.gather(1, column).squeeze(1)


def dlr(logits: Logits, y: Labels) -> PerImage:
    """Return the difference-of-logits ratio ``(max_{j != y} z_j - z_y) / (z_(1) - z_(3))`` of each row, shape (N,).

    ``z_(i)`` is the i-th largest logit; the value does not change when the logits are shifted or scaled.
    Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks,
    2020, equation 6.

    Raises:
        InputError: fewer than 3 classes, for which the ratio is not defined.
    """
    if logits.shape[1] < 3:
        raise InputError(f"loss 'dlr' needs at least 3 classes, got {logits.shape[1]}; use loss='margin'")
    largest = logits.topk(3, dim=1).values
    return margin(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_cross_entropy(logits: Logits, y: Labels, target: Labels) -> PerImage:
    """Return ``log softmax(z)_t`` of each row, shape (N,): ``y`` plays no part but that of the class to leave."""
    return -cross_entropy(logits, target)


def targeted_margin(logits: Logits, y: Labels, target: Labels) -> PerImage:
    """Return ``z_t - z_y`` of each row, shape (N,): where it is positive, the prediction is not y."""
    return (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(1)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerImage:
    """Return ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`` of each row, shape (N,): Croce, Hein 2020, equation 7.

    Raises:
        InputError: fewer than 4 classes, for which it is not defined.
    """
    if logits.shape[1] < 4:
        raise InputError(f"loss 'dlr' with targets needs at least 4 classes, got {logits.shape[1]}; use loss='margin'")
    largest = logits.topk(4, dim=1).values
    scale = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2
    return targeted_margin(logits, y, target) / (scale + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
# The same, on the way from class y to a given class t: what an untargeted attack tries for several t in turn.
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "ce": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}


def towards(target: Tensor, name: str) -> Loss:
    """Return the targeted form of the loss ``name``, on the way to the classes ``target`` (N,)."""
    loss = TARGETED_LOSSES[name]
    return lambda logits, y: loss(logits, y, target)
