"""The gradient of a loss with respect to images, averaged over the draws of a stochastic model (EOT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from learn2perturb.attacks.losses import Loss, margin
from learn2perturb.engine.shapes import Labels, Logits
from learn2perturb.errors import InputError

Average = Literal["loss", "probability", "logits"]
AVERAGES: tuple[Average, ...] = ("loss", "probability", "logits")

_LARGEST_WEIGHT = 1e30  # of one draw against the mean probability; only keeps inf * 0 out of the gradient


@final
@dataclass(frozen=True, eq=False)
class Values:
    """What the draws of one EOT average say of N images.

    Attributes:
        loss: (N,) the mean loss over the draws, or the loss of their mean probability or logits.
        margin: (N,) the same of the margin, ``max_{j != y} z_j - z_y``.
        logits: (N, K) the mean logits; for ``"probability"`` the log of the mean softmax.
    """

    loss: Tensor
    margin: Tensor
    logits: Tensor


def values_of(draws: Sequence[Logits], loss: Loss, y: Labels, average: Average) -> Values:
    """Return loss, margin and logits averaged over ``draws``, each the logits (N, K) of one forward pass."""
    mean = _mean(draws, average)
    if average == "loss" and len(draws) > 1:
        each = torch.stack([loss(logits, y) for logits in draws]).mean(dim=0)
        return Values(each, torch.stack([margin(logits, y) for logits in draws]).mean(dim=0), mean)
    return Values(loss(mean, y), margin(mean, y), mean)


def value_and_gradient(
    logits_of: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor, *, eot: int = 1, average: Average = "loss"
) -> tuple[Values, Tensor]:
    """Return what :func:`input_gradient` returns and, from the same draws, the averages: no pass is made twice.

    Of each draw only its logits are kept, which are small; its graph is freed before the next.
    """
    draws: list[Tensor] = []

    def remembered(images: Tensor) -> Tensor:
        logits = logits_of(images)
        draws.append(logits.detach())
        return logits

    gradient = input_gradient(remembered, loss, x, y, eot=eot, average=average)
    with torch.no_grad():
        return values_of(draws, loss, y, average), gradient


def input_gradient(
    logits_of: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor, *, eot: int = 1, average: Average = "loss"
) -> Tensor:
    """Return the gradient with respect to ``x`` (N, C, H, W) of the expected loss, estimated from ``eot`` draws.

    ``average`` says what is averaged over the K draws: the loss, ``(1/K) sum_k grad L(f_k(x), y)``; or the
    probabilities or the logits, ``grad L((1/K) sum_k a_k(x), y)`` with ``a = softmax f`` (given to the loss as
    log-probabilities) or ``a = f``, which attacks a predictor that averages so. These cost K forward passes more:
    K draws give the mean and ``v = dL/d mean``, then K *further* draws give ``(1/K) sum_k J_k^T v``. Every draw is a
    forward pass of its own whose graph is freed before the next: memory does not grow with K. With ``eot=1`` the three
    are the same.

    Gradients must be enabled. Athalye et al., Obfuscated gradients give a false sense of security, 2018.

    Raises:
        InputError: the logits do not depend on ``x`` through differentiable operations.
    """
    if eot == 1:
        return _one_draw(lambda logits: loss(logits, y).sum(), logits_of, x)
    objective = _objective(logits_of, loss, x, y, eot, average)
    total = torch.zeros_like(x)
    for _ in range(eot):
        total.add_(_one_draw(objective, logits_of, x))
    return total.div_(eot)


def _one_draw(objective: Callable[[Tensor], Tensor], logits_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return slope(objective(logits_of(leaf)), leaf)


def slope(value: Tensor, leaf: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Return the gradient of the number ``value`` with respect to images ``leaf``.

    Raises:
        InputError: it does not depend on them through differentiable operations.
    """
    gradient = None
    if value.requires_grad:
        gradient = torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=keep_graph)[0]
    if gradient is None:
        raise InputError(
            "the logits have no gradient with respect to x: the model must not use no_grad, detach, numpy or argmax on "
            "the way from x to its logits; use an attack that needs no gradient if it must"
        )
    return gradient


def _objective(
    logits_of: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor, eot: int, average: Average
) -> Callable[[Tensor], Tensor]:
    """Return the scalar function of one draw's logits whose mean gradient over draws is the wanted one."""
    if average == "loss":
        return lambda logits: loss(logits, y).sum()
    with torch.no_grad():
        mean = mean_logits(logits_of, x, eot, average)
    mean.requires_grad_()
    (sensitivity,) = torch.autograd.grad(loss(mean, y).sum(), mean)
    mean = mean.detach()
    if average == "logits":
        return lambda logits: (sensitivity * logits).sum()

    def probability(logits: Tensor) -> Tensor:
        # d log(mean p) = sum_k (p_k / mean p) d log p_k / K. Written with log p, since p itself underflows where a
        # confident model is wrong, and there its gradient would vanish.
        log_p = torch.log_softmax(logits, dim=1)
        weight = (log_p.detach() - mean).exp().clamp_max(_LARGEST_WEIGHT)
        return (sensitivity * weight * log_p).sum()

    return probability


def mean_logits(logits_of: Callable[[Tensor], Tensor], x: Tensor, draws: int, average: Average) -> Tensor:
    """Return the logits averaged over ``draws`` forward passes; for ``"probability"``, the log of the mean softmax."""
    return _mean([logits_of(x.clone()) for _ in range(draws)], average)  # the model may work in place


def _mean(draws: Sequence[Tensor], average: Average) -> Tensor:
    if len(draws) == 1:
        return draws[0]
    stacked = torch.stack(list(draws))
    if average == "probability":
        return torch.log_softmax(stacked, dim=2).logsumexp(dim=0) - math.log(len(draws))
    return stacked.mean(dim=0)
