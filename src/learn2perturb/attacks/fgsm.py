"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.query import Query


@final
@dataclass(frozen=True)
class FGSM(Attack):
    """One steepest step of length ``eps``, ``clip(x + eps sign(grad L))`` for linf, without random start.

    Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015, https://arxiv.org/abs/1412.6572.
    """

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return ``x`` moved by ``eps``; costs ``eot`` forward and backward passes."""
        return self.ball.step(query.gradient(x, y), self.eps).add_(x)
