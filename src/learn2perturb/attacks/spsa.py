"""Gradient-free descent: PGD along a gradient that is estimated from values of the model only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import values_of
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import per_image
from learn2perturb.checks import check_choice, check_count, check_size, check_step, fitting_step
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import ConfigError

SAMPLINGS = ("signs", "gaussian")
_ROWS = 256  # of one pass, where directions of few images share it


@final
@dataclass(frozen=True)
class SPSA(Attack):
    """PGD from ``x`` along ``g = mean_u u (L(x + s u) - L(x - s u)) / 2s``: values of the model, no gradient.

    The directions ``u`` are random signs (simultaneous perturbation, Spall 1992; against masked gradients Uesato et
    al., Adversarial risk and the dangers of evaluating against weak attacks, 2018, https://arxiv.org/abs/1802.05666),
    or Gaussian in antithetic pairs (natural evolution strategies: Ilyas et al., Black-box adversarial attacks with
    limited queries and information, 2018, https://arxiv.org/abs/1804.08598). Steps follow the running mean of ``g``,
    so that each profits from the directions of those before. Points asked about are clipped to [0, 1].

    A stochastic model answers both sides of a difference with the same draws, and the next with fresh ones. Images of a
    deterministic one drop out once broken, for which a pass a step looks; else the last iterate is returned.

    Attributes:
        steps: estimates and steps.
        directions: of one estimate; it costs ``2 directions eot`` passes.
        step_size: length of a step, [0, 1] pixel scale, at most ``2 eps``; NaN, the default, is a tenth of ``eps``.
        size: s, the change of a pixel on either side, [0, 1] pixel scale. None is a quarter of ``eps``, for l2 spread
            over all pixels: it looks across steps of a quantised model, which a smaller one would not see.
        momentum: weight of what was known in the running mean, in [0, 1).
        sampling: ``"signs"`` or ``"gaussian"``.
    """

    loss: str = field(default="margin", kw_only=True)
    step_size: float = field(default=math.nan, kw_only=True)
    steps: int = field(default=100, kw_only=True)
    directions: int = field(default=32, kw_only=True)
    size: float | None = field(default=None, kw_only=True)
    momentum: float = field(default=0.9, kw_only=True)
    sampling: Literal["signs", "gaussian"] = field(default="signs", kw_only=True)

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.step_size, float) and math.isnan(self.step_size):
            object.__setattr__(self, "step_size", self.eps / 10 if self.eps else 1 / 255)
        check_step("step_size", self.step_size, self.eps, norm=self.norm)
        check_count("steps", self.steps)
        check_count("directions", self.directions)
        if self.size is not None:
            check_size("size", self.size)
        weight = self.momentum
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1:
            raise ConfigError(f"momentum must be a number in [0, 1), got {weight!r}; 0 follows each estimate alone")
        check_choice("sampling", self.sampling, SAMPLINGS)

    def resized(self, eps: float) -> SPSA:
        """Return the same attack with another radius; a step that would exceed it shrinks in proportion."""
        check_size("eps", eps, norm=self.norm, zero=True)
        return replace(self, eps=eps, step_size=fitting_step(self.step_size, self.eps, eps))

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken."""
        return True

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return what fools a deterministic model, else the last iterates.

        Costs ``2 steps directions eot`` forward passes, and on a deterministic model one a step more; no backward.
        """
        with torch.no_grad():
            fixed = query.deterministic(x)
            found, index = x.clone(), torch.arange(len(x), device=x.device)
            x_adv, mean = x, torch.zeros_like(x)
            for step in range(self.steps + fixed):
                if fixed:
                    gone = query.broken(x_adv, y, query.score(x_adv, y, 1))
                    found[index[gone]] = x_adv[gone]
                    index, x, y, x_adv, mean = (part[~gone] for part in (index, x, y, x_adv, mean))
                    query.left = len(y)
                    if step == self.steps or not len(index):
                        break
                mean = torch.lerp(self._estimate(query, x_adv, y, packed=fixed), mean, self.momentum)
                moved = x_adv + self.ball.step(mean, self.step_size)
                x_adv = self.ball.project(moved, x, self.eps).clamp_(0.0, 1.0)
            found[index] = x_adv
        return found

    def _estimate(self, query: Query, x: Tensor, y: Tensor, *, packed: bool) -> Tensor:
        """Return the direction (N, C, H, W) of the attack's aim, estimated; ``packed`` asks several in one pass."""
        size = self._reach(x)
        total = torch.zeros_like(x)
        left = self.directions
        while left:
            count = min(left, max(1, _ROWS // len(x))) if packed else 1
            left -= count
            shape = (count, *x.shape)
            u = torch.randn(shape, dtype=x.dtype, device=x.device)
            u = u.sign() if self.sampling == "signs" else u
            up, down = ((x + side * size * u).clamp_(0.0, 1.0).flatten(0, 1) for side in (1, -1))
            slope = self._difference(query, up, down, y.repeat(count)) / (2 * size)
            total += (u * per_image(slope.to(x.dtype)).view(count, -1, 1, 1, 1)).sum(dim=0)
        return total / self.directions

    def _difference(self, query: Query, up: Tensor, down: Tensor, y: Tensor) -> Tensor:
        """Return how much nearer to the aim the loss is at ``up`` than at ``down``, (M,), by the same draws."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for _ in range(self.eot):
            with isolated_rng():
                sides[0].append(query.logits(up.clone()))
            sides[1].append(query.logits(down.clone()))
        above, below = (values_of(draws, LOSSES[self.loss], y, self.eot_average).loss for draws in sides)
        return below - above if self.targeted else above - below

    def _reach(self, x: Tensor) -> float:
        if self.size is not None:
            return self.size
        return self.eps / 4 / (1.0 if self.norm == "linf" else math.sqrt(x[0].numel()))
