"""FAB: the nearest image that fools the model, found by steps onto the linearised decision boundary."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import Values
from learn2perturb.attacks.losses import Loss, towards
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import likely_targets, per_image, runs_at_once
from learn2perturb.checks import check_count, check_flag
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError

_ALPHA = 0.1  # the most that a step is drawn towards x
_OVERSHOOT = 1.05  # of the step onto the boundary, to land behind it
_BACK = 0.9  # from a point that fools the model, go on at this share of the way from x to it
_OFF_A_TIE = 1e-4  # norm of a step from a point at which two logits are equal, [0, 1] pixel scale
# Of Newton's method. 3,072 coordinates take 4 to 7; in l2, by the box's corner, 16 fell short by up to 1e-5 of the way.
_PLANE_STEPS = 20
_BISECTIONS = 8  # at the end, between x and the nearest such point
_WIDEST_START = {"linf": 0.3, "l2": 1.0}  # a random start is at most half as far


@final
@dataclass(frozen=True)
class FAB(Attack):
    """Fast adaptive boundary attack: minimises the norm of the perturbation, and so needs no radius.

    A step goes onto the hyperplane where the linearised difference of two logits is zero, in the box, from the current
    point and from ``x``, and mixes the two. Croce, Hein, Minimally distorted adversarial examples with a fast
    adaptive boundary attack, 2020, https://arxiv.org/abs/1907.02044, algorithm 1, in the targeted form that AutoAttack
    uses: one run for each of the most likely wrong classes. Gradients and the test whether a point fools the model
    are averages over ``eot`` draws, the test by the mean margin. Where two logits are equal, so that the step would be
    zero, it goes 1e-4 up the gradient.

    Attributes:
        eps: infinite by default: the norms are the result. Finite: success is success inside the ball.
        steps: gradients in a run.
        targets: wrong classes tried; 0 takes at every step the likeliest one (one run). No part if ``targeted``.
        restarts: runs (for each target), all but the first from a random point nearby.
        early_stop: with a finite ``eps``, images of a deterministic model drop out once broken inside the ball; their
            norms are then not the smallest.
    """

    eps: float = math.inf
    loss: str = field(default="margin", kw_only=True)
    steps: int = field(default=100, kw_only=True)
    targets: int = field(default=9, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    early_stop: bool = field(default=False, kw_only=True)

    minimum_norm: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("targets", self.targets, lowest=0)
        check_count("restarts", self.restarts)
        check_flag("early_stop", self.early_stop)
        if self.early_stop and self.eps == math.inf:
            raise ConfigError("early_stop=True needs a finite eps, within which an image counts as broken; got eps=inf")

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken: not of a mean over draws."""
        return self.early_stop and self.eot == 1

    @property
    def full_precision(self) -> bool:
        """Whether all passes are in full precision: where images may leave, gradients need not be, verdicts are."""
        return not self.drops

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the nearest points found, ``x`` where none is; a step costs 2 forward, 1 backward ``eot``."""
        drop = self.drops and query.deterministic(x)
        best = x.clone()
        # An image that is wrong as it is needs no perturbation.
        norms = torch.where(self._checked(query, x, y).margin > 0, 0.0, torch.inf).to(x.dtype)
        targets = likely_targets(query, x, y, self.targets) if self.targets and not self.targeted else []
        number = 0
        while number < max(len(targets), 1):
            # Targets side by side, as many as fill a pass.
            some = targets[number : number + runs_at_once(x, query.left)] if drop else targets[number : number + 1]
            for restart in range(self.restarts):
                left = (norms > self.eps).nonzero().squeeze(1) if drop else torch.arange(len(x), device=x.device)
                query.left = len(left)
                if not len(left):
                    return best
                aims = torch.cat([target[left] for target in some]) if some else None
                times = max(len(some), 1)
                before = best[left].repeat(times, 1, 1, 1), norms[left].repeat(times)
                points, sizes = self._search(query, x[left], y[left], aims, *before, restart, drop)
                nearest = sizes.view(times, -1).argmin(dim=0) * len(left) + torch.arange(len(left), device=x.device)
                best[left], norms[left] = points[nearest], sizes[nearest]
            number += max(len(some), 1)
        return self._bisected(query, x, y, best)

    def _search(
        self,
        query: Query,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        best: Tensor,
        norms: Tensor,
        restart: int,
        drop: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest points and their norms after one run on each of ``target``, run by run, as ``best`` is.

        With ``drop``, an image leaves all of them once one has found a point within ``eps``.
        """
        rows = torch.arange(len(best), device=x.device)
        owner = rows % len(x)
        x, y = x[owner], y[owner]
        point = x
        loss = None if target is None else towards(target, "margin")
        known = torch.full_like(norms, torch.nan)  # the loss at these points, where it is known in full precision
        if restart:
            widest = norms.clamp_max(min(self.eps, _WIDEST_START[self.norm]))
            point = (x + 0.5 * per_image(widest) * self.ball.random(x, 1.0)).clamp_(0.0, 1.0)
        for _ in range(self.steps):
            with contextlib.nullcontext() if drop else execution.full_precision():
                values, gradient = query.value_and_gradient(point, y, loss=loss)
            # Where the linearised loss is zero: w . (z - point) = -loss.
            normal, offset = gradient.flatten(1), -torch.where(known.isnan(), values.loss.to(x.dtype), known)
            # On the plane already, the step onto it would be none, now and ever after.
            steepest = normal.abs().sum(dim=1) if self.norm == "linf" else normal.norm(dim=1)
            offset = torch.where(offset == 0, _OFF_A_TIE * steepest, offset)
            there = to_plane(point.flatten(1), normal, offset, self.norm, wait=drop).view_as(x)
            away = (normal * (point - x).flatten(1)).sum(dim=1)
            direct = to_plane(x.flatten(1), normal, offset + away, self.norm, wait=drop).view_as(x)
            near, far = self._size(there), self._size(direct)
            share = per_image((near / (near + far).clamp_min(1e-12)).clamp(0.0, _ALPHA))
            point = (1 - share) * (point + _OVERSHOOT * there) + share * (x + _OVERSHOOT * direct)
            point = point.clamp_(0.0, 1.0)
            checked = self._checked(query, point, y, loss)
            fooled = checked.margin > 0
            size = self._size(point - x)
            nearer = fooled & (size < norms[rows])
            best[rows] = torch.where(per_image(nearer), point, best[rows])
            norms[rows] = torch.where(nearer, size, norms[rows])
            point = torch.where(per_image(fooled), x + _BACK * (point - x), point)
            # Draws of its own are no part of what the next gradient is of.
            if drop:
                known = checked.loss.to(x.dtype).masked_fill(fooled, torch.nan)
            if drop and bool((inside := norms[rows] <= self.eps).any()):
                stay = ~torch.isin(owner, owner[inside])
                owner, rows, x, y, point, known = (part[stay] for part in (owner, rows, x, y, point, known))
                if target is not None:
                    target = target[stay]
                    loss = towards(target, "margin")
                query.left = len(owner.unique())
                if not len(rows):
                    break
        return best, norms

    def _bisected(self, query: Query, x: Tensor, y: Tensor, best: Tensor) -> Tensor:
        """Return the points nearest to ``x``, on the way from there to ``best``, that bisection finds to be wrong."""
        low = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        high = torch.ones_like(low)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            fooled = self._checked(query, x + per_image(middle) * (best - x), y).margin > 0
            low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
        return x + per_image(high) * (best - x)

    def _checked(self, query: Query, points: Tensor, y: Tensor, loss: Loss | None = None) -> Values:
        """Return what full precision says of ``points``, which lie so near to the boundary that rounding decides."""
        with execution.full_precision():
            return query.value(points, y, loss=loss)

    def _size(self, delta: Tensor) -> Tensor:
        flat = delta.flatten(1)
        return flat.abs().amax(dim=1) if self.norm == "linf" else flat.norm(dim=1)


def to_plane(x: Tensor, normal: Tensor, offset: Tensor, norm: str, *, wait: bool = True) -> Tensor:
    """Return the smallest ``d`` with ``normal . d = offset`` and ``x + d`` in [0, 1]; all rows (N, D), ``offset`` (N,).

    Coordinate i goes ``min(t u_i, room_i)`` towards the plane, ``u = 1`` for linf and ``|normal|`` for l2: the smallest
    d is of this form. What has been gained by t is concave and piecewise linear, so that Newton's method climbs to the
    wanted t from below and ends there. Where the plane does not meet the box, ``d`` goes to the corner nearest to it.
    With ``wait`` it ends as soon as all rows are there, for which the host waits for the device.
    """
    sign = normal.sign() * offset.sign().unsqueeze(1)
    weight = normal.abs()
    room = torch.where(sign > 0, 1 - x, x).clamp_min(0.0)
    gain = weight if norm == "linf" else weight * weight
    needed = offset.abs()
    limits = torch.finfo(x.dtype)
    time, moved = torch.zeros_like(needed), torch.zeros_like(room)
    for _ in range(_PLANE_STEPS):
        missing = needed - torch.linalg.vecdot(weight, moved)
        slope = torch.linalg.vecdot(gain, (moved < room).to(x.dtype))
        if wait and not bool(((missing > 16 * limits.eps * needed) & (slope > 0)).any()):
            break
        # No slope is left at the corner, to which any larger t belongs.
        time = torch.where(missing > 0, (time + missing / slope).clamp_max(limits.max), time)
        pace = time.unsqueeze(1)
        moved = torch.minimum(pace if norm == "linf" else pace * weight, room)
    return sign * moved  # a coordinate without weight, whose sign is 0, stays where it is
