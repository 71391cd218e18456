"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack, Query, check_step
from learn2perturb.checks import check_count, check_flag


@final
@dataclass(frozen=True)
class PGD(Attack):
    """``x <- clip(project(x + step(grad L)))``, ``steps`` times, from a random point of the ball; the last iterate.

    The step is ``step_size sign(g)`` for linf and ``step_size g / |g|`` for l2. Of several ``restarts`` each image
    keeps the one with the largest margin, averaged over ``eot`` fresh draws.
    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, https://arxiv.org/abs/1706.06083.

    Attributes:
        step_size: length of a step, [0, 1] pixel scale.
        steps, restarts: at least 1.
        random_start: start at a random point of the ball, else at ``x``.
    """

    step_size: float = 0.01
    steps: int = 7
    random_start: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step("step_size", self.step_size)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_flag("random_start", self.random_start)

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the best restart; costs ``restarts * steps * eot`` gradients and ``eot`` draws to judge a restart."""
        best = self._descend(query, x, y)
        if self.restarts == 1:
            return best
        best_score = query.score(best, y, self.eot)
        for _ in range(self.restarts - 1):
            candidate = self._descend(query, x, y)
            score = query.score(candidate, y, self.eot)
            better = score > best_score
            best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
            best_score = torch.where(better, score, best_score)
        return best

    def _descend(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        x_adv = (x + self.ball.random(x, self.eps)).clamp_(0.0, 1.0) if self.random_start else x
        for _ in range(self.steps):
            moved = self.ball.step(query.gradient(x_adv, y), self.step_size).add_(x_adv)
            x_adv = self.ball.project(moved, x, self.eps).clamp_(0.0, 1.0)
        return x_adv
