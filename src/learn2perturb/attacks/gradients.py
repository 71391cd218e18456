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


def fresh_values(
    logits_of: Callable[[Tensor], Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    eot: int = 1,
    average: Average = "loss",
    at_once: int = 1,
) -> Values:
    """Return what ``eot`` fresh draws say of images ``x``; ``at_once`` as of :func:`input_gradient`."""
    return values_of(each_draw(logits_of, x, eot, at_once), loss, y, average)


def value_and_gradient(
    logits_of: Callable[[Tensor], Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    eot: int = 1,
    average: Average = "loss",
    at_once: int = 1,
) -> tuple[Values, Tensor]:
    """Return what :func:`input_gradient` returns and, from the same draws, the averages: no pass is made twice.

    Of each draw only its logits are kept, which are small; its graph is freed before the next.
    """
    draws: list[Tensor] = []

    def remembered(images: Tensor) -> Tensor:
        logits = logits_of(images)
        draws.extend(logits.detach().split(len(x)))
        return logits

    gradient = input_gradient(remembered, loss, x, y, eot=eot, average=average, at_once=at_once)
    with torch.no_grad():
        return values_of(draws, loss, y, average), gradient


def input_gradient(
    logits_of: Callable[[Tensor], Tensor],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    eot: int = 1,
    average: Average = "loss",
    at_once: int = 1,
) -> Tensor:
    """Return the gradient with respect to ``x`` (N, C, H, W) of the expected loss, estimated from ``eot`` draws.

    ``average`` says what is averaged over the K draws: the loss, ``(1/K) sum_k grad L(f_k(x), y)``; or the
    probabilities or the logits, ``grad L((1/K) sum_k a_k(x), y)`` with ``a = softmax f`` (given to the loss as
    log-probabilities) or ``a = f``, which attacks a predictor that averages so. These cost K forward passes more:
    K draws give the mean and ``v = dL/d mean``, then K *further* draws give ``(1/K) sum_k J_k^T v``. Every draw is a
    forward pass of its own whose graph is freed before the next: memory does not grow with K. With ``eot=1`` the three
    are the same.

    ``at_once`` draws, at most, are one pass over so many copies of ``x``, for models whose rows have draws of their own
    (see ``engine.by_row``; others would have one draw, counted several times); memory then grows with that number.

    Gradients must be enabled. Athalye et al., Obfuscated gradients give a false sense of security, 2018.

    Raises:
        InputError: the logits do not depend on ``x`` through differentiable operations.
    """
    if eot == 1:
        return _one_pass(lambda logits: loss(logits, y).sum(), logits_of, x, 1)
    objective = _objective(logits_of, loss, x, y, eot, average, at_once)
    total = torch.zeros_like(x)
    for copies in _passes(eot, at_once):
        total.add_(_one_pass(objective, logits_of, x, copies))
    return total.div_(eot)


def _one_pass(
    objective: Callable[[Tensor], Tensor], logits_of: Callable[[Tensor], Tensor], x: Tensor, copies: int
) -> Tensor:
    leaf = x.detach().requires_grad_()
    if copies == 1:
        return slope(objective(logits_of(leaf)), leaf)
    draws = logits_of(torch.cat([leaf] * copies)).split(len(x))
    return slope(torch.stack([objective(logits) for logits in draws]).sum(), leaf)


def _passes(draws: int, at_once: int) -> list[int]:
    """Return how many of the ``draws`` each pass makes: as even as may be, ``at_once`` at most."""
    passes = math.ceil(draws / at_once)
    return [draws // passes + (number < draws % passes) for number in range(passes)]


def each_draw(logits_of: Callable[[Tensor], Tensor], x: Tensor, draws: int, at_once: int = 1) -> list[Tensor]:
    """Return the logits (N, K) of each of so many ``draws``, ``at_once`` of them in a pass, at most."""
    found: list[Tensor] = []
    for copies in _passes(draws, at_once):
        if copies == 1:  # a copy, too: the model may work in place; and not split, which no exported program could be
            found.append(logits_of(x.clone()))
        else:
            found.extend(logits_of(torch.cat([x] * copies)).split(len(x)))
    return found


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
    logits_of: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor, eot: int, average: Average, at_once: int
) -> Callable[[Tensor], Tensor]:
    """Return the scalar function of one draw's logits whose mean gradient over draws is the wanted one."""
    if average == "loss":
        return lambda logits: loss(logits, y).sum()
    with torch.no_grad():
        mean = _mean(each_draw(logits_of, x, eot, at_once), average)
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
    return _mean(each_draw(logits_of, x, draws), average)


def _mean(draws: Sequence[Tensor], average: Average) -> Tensor:
    if len(draws) == 1:
        return draws[0]
    stacked = torch.stack(list(draws))
    if average == "probability":
        return torch.log_softmax(stacked, dim=2).logsumexp(dim=0) - math.log(len(draws))
    return stacked.mean(dim=0)
