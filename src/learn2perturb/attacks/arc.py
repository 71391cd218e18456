"""ARC: steps towards the boundaries of a finite ensemble's members, kept where the exact expected accuracy falls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import slope
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import per_image
from learn2perturb.checks import check_count, check_flag, check_step
from learn2perturb.engine.finite import Members, answers_right, expectation

_BEYOND = 0.05  # of eps: how far a step goes beyond the boundary


@final
@dataclass(frozen=True)
class ARC(Attack):
    """Attack on randomised ensembles: for member after member, likeliest first, a step to its nearest boundary.

    The mean gradient of an ensemble can be zero, or lead nowhere, where a point that fools several members exists. In
    each of ``steps`` rounds a local step of length ``step_size`` is put together: each member, in order of falling
    probability, adds the way to its nearest boundary, in the linear approximation, of a length at which the sum crosses
    that boundary. What counts is the expected accuracy, which for finitely many members is a sum: the point where it is
    lowest is returned.
    Dbouk, Shanbhag, Adversarial Vulnerability of Randomized Ensembles, 2022, https://arxiv.org/abs/2206.06737,
    algorithm 2. There a step is kept if the expected accuracy does not rise, so that members undo each other's steps
    and a rare one, fooled first, holds the others. Here a step must keep the members before its own fooled, one that is
    fooled already is pushed on instead of back to its boundary, and each member leads the order once.

    The model has ``members`` and ``probabilities``, as :class:`learn2perturb.models.RandomEnsemble`; one without noise
    counts as an ensemble of one. Nothing is drawn from the model: ``eot`` plays no part.

    Attributes:
        step_size: length of a local step, [0, 1] pixel scale; NaN, the default, is ``eps / 4``.
        steps: rounds for each leading member.
        targets: classes whose boundaries are looked at, likeliest first.
        random_start: start at a random point of the ball, else at ``x``.
        restarts: an image keeps the point of lowest expected accuracy, which is exact: the choice is by no luck.
    """

    loss: str = field(default="margin", kw_only=True)
    step_size: float = field(default=math.nan, kw_only=True)
    steps: int = field(default=20, kw_only=True)
    targets: int = field(default=3, kw_only=True)
    random_start: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)

    on_boundary: ClassVar[bool] = True
    can_target: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.step_size, float) and math.isnan(self.step_size):
            object.__setattr__(self, "step_size", self.eps / 4 or 1.0)
        check_step("step_size", self.step_size, self.eps, norm=self.norm)
        check_count("steps", self.steps)
        check_count("targets", self.targets)
        check_count("restarts", self.restarts)
        check_flag("random_start", self.random_start)

    def resized(self, eps: float) -> ARC:
        """Return the same attack with another radius and, in proportion, another step."""
        share = self.step_size / self.eps if self.eps else 1 / 4
        return replace(self, eps=eps, step_size=share * eps or 1.0)

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the best point seen; each of M leaders costs ``steps M (1 + M)`` forward passes in a restart.

        And ``steps M targets`` backward ones.
        """
        ensemble = _Ensemble(query, query.members(x), y)
        best = x, ensemble.expected(ensemble.right(x))
        for _ in range(self.restarts):
            for lead in range(len(ensemble.members.networks)):
                best = self._descend(_Ensemble(query, ensemble.members.led_by(lead), y), x, best)
        return best[0]

    def _descend(self, ensemble: _Ensemble, x: Tensor, best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the best point, that of before among them, and the expected accuracy there."""
        point = (x + self.ball.random(x, self.eps)).clamp_(0.0, 1.0) if self.random_start else x
        best = _lower(*best, point, ensemble.expected(ensemble.right(point)))
        for _ in range(self.steps):
            centre, local = point, torch.zeros_like(x)
            for rank in range(len(ensemble.members.networks)):
                candidate, fooled = self._local_step(ensemble, rank, centre, local, x)
                found = self.ball.project(centre + candidate, x, self.eps).clamp_(0.0, 1.0)
                right = ensemble.right(found)
                best = _lower(*best, found, ensemble.expected(right))
                # A step must keep those fooled that come before: members in turn would undo each other's steps.
                allowed = ~right[:rank].any(dim=0)
                local = torch.where(per_image(allowed), candidate, local)
                # A member that is fooled already moves nothing, but makes room for those after it.
                point = torch.where(per_image(allowed & ~fooled), found, point)
        return best

    def _local_step(
        self, ensemble: _Ensemble, rank: int, centre: Tensor, local: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``local`` with the way over the nearest boundary of a member, of length ``step_size``.

        And which images (n, bool) fool that member already: these are pushed on.
        """
        at = self.ball.project(centre + local, x, self.eps).clamp_(0.0, 1.0)
        distance, uphill = self._boundary(ensemble, rank, at)
        # Of a step d from the centre, <uphill, d> of the distance is gone; the boundary is so far from the centre:
        whole = distance + (uphill * local).flatten(1).sum(dim=1)
        size = self.step_size
        stretch = size / (size - whole).clamp_min(1e-3 * size)
        length = torch.where(whole < size, stretch * distance.clamp_min(0.0) + _BEYOND * self.eps, size)
        moved = local + per_image(length) * self.ball.step(uphill, 1.0)
        norm = self.ball.distance(moved, torch.zeros_like(moved)).to(x.dtype)
        return moved * per_image(size / norm.clamp_min(torch.finfo(x.dtype).tiny)), distance < 0

    def _boundary(self, ensemble: _Ensemble, rank: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance (n,) to the nearest boundary of a member, below 0 beyond it, and its gradient downwards.

        The gradient is scaled so that a step d shortens the distance by ``<gradient, d>``.
        """
        nearest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        gradient = torch.zeros_like(x)
        for lead, uphill in ensemble.leads(self, rank, x):
            dual = self._dual(uphill).clamp_min(torch.finfo(x.dtype).tiny)
            distance = (-lead / dual).to(x.dtype)
            nearer = distance < nearest
            nearest = torch.where(nearer, distance, nearest)
            gradient = torch.where(per_image(nearer), uphill / per_image(dual), gradient)
        return nearest, gradient

    def _dual(self, gradient: Tensor) -> Tensor:
        """Return the largest ``<gradient, d>`` over all d of norm 1, (n,)."""
        return (gradient * self.ball.step(gradient, 1.0)).flatten(1).sum(dim=1)


def _lower(point: Tensor, left: Tensor, found: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each image the point of lower expected accuracy, and that accuracy."""
    lower = value < left
    return torch.where(per_image(lower), found, point), torch.where(lower, value, left)


@final
@dataclass(frozen=True, eq=False)
class _Ensemble:
    """What the attack asks of the members, in their order, with labels ``y``; counts the passes."""

    query: Query
    members: Members
    y: Tensor

    def right(self, x: Tensor) -> Tensor:
        """Return which member is right about which image, (M, N)."""
        self.query.forwards += len(x) * len(self.members.networks)
        return answers_right(self.members, x, self.y)

    def expected(self, right: Tensor) -> Tensor:
        """Return the expected accuracy of each image, (N,)."""
        return expectation(self.members, right)

    def leads(self, attack: ARC, rank: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each of the likeliest wrong classes ``z_j - z_y`` (N,) of a member, and its gradient."""
        with self.query.part(attack, self.members.networks[rank]) as part:
            leaf = x.detach().requires_grad_()
            logits = part.logits(leaf)
            column = self.y.unsqueeze(1)
            others = logits.scatter(1, column, -torch.inf)
            top = others.topk(min(attack.targets, logits.shape[1] - 1), dim=1).values
            for lead in (top - logits.gather(1, column)).unbind(dim=1):
                gradient = slope(lead.sum(), leaf, keep_graph=True)
                part.backwards += len(x)
                part.watch.gradient(gradient, reached=lead > 0)
                yield lead.detach(), gradient
