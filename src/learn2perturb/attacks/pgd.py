"""Projected gradient descent."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.query import Query
from learn2perturb.checks import check_choice, check_count, check_flag, check_size, check_step, fitting_step
from learn2perturb.sizes import usual_step

EOT_DRAWS = ("fresh", "held")


@final
@dataclass(frozen=True)
class PGD(Attack):
    """``x <- clip(project(x + step(grad L)))``, ``steps`` times, from a random point of the ball; the last iterate.

    The step is ``step_size sign(g)`` for linf and ``step_size g / |g|`` for l2. Of several ``restarts`` each image
    keeps the one with the largest margin, averaged over ``eot`` fresh draws.
    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, https://arxiv.org/abs/1706.06083.

    Attributes:
        step_size: length of a step, [0, 1] pixel scale, at most ``2 eps``. NaN, the default, is 0.01, and where that is
            more than ``eps``, or in l2, as large a share of it as 0.01 is of 8/255.
        steps, restarts: at least 1.
        random_start: start at a random point of the ball, else at ``x``.
        eot_draws: ``"fresh"`` draws anew in each step; ``"held"`` keeps the ``eot`` draws of a restart through all its
            steps, which descends one fixed function: stronger where noise stalls the steps, and where draws are few.
    """

    step_size: float = math.nan
    steps: int = 7
    random_start: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    eot_draws: str = field(default="fresh", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.step_size, float) and math.isnan(self.step_size):
            object.__setattr__(self, "step_size", usual_step(self.norm, self.eps))
        check_step("step_size", self.step_size, self.eps, norm=self.norm)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_flag("random_start", self.random_start)
        check_choice("eot_draws", self.eot_draws, EOT_DRAWS)

    def resized(self, eps: float) -> PGD:
        """Return the same attack with another radius; a step that would exceed it shrinks in proportion."""
        check_size("eps", eps, norm=self.norm, zero=True)
        return replace(self, eps=eps, step_size=fitting_step(self.step_size, self.eps, eps))

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
        with query.held() if self.eot_draws == "held" else contextlib.nullcontext():
            for _ in range(self.steps):
                moved = self.ball.step(query.gradient(x_adv, y), self.step_size).add_(x_adv)
                x_adv = self.ball.project(moved, x, self.eps).clamp_(0.0, 1.0)
        return x_adv
