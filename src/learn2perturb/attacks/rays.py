"""RayS: an attack that is told labels only. It searches for the ray of signs on which the label changes soonest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import best_of, per_image
from learn2perturb.checks import check_count

_OUTSIDE = 1.05  # of the radius of the ball, where a second decision does not agree


@final
@dataclass(frozen=True)
class RayS(Attack):
    """Flip the signs of ever smaller blocks of a ray; keep a flip if the label still changes at the radius so far.

    Chen, Gu, RayS: A Ray Searching Method for Hard-label Adversarial Attack, 2020, https://arxiv.org/abs/2006.12792.
    Points are ``clip(x + r d)``, ``d`` of signs; the radius ``r`` of a better ray is bisected in every
    other query. Whether the attack has its way is all that is read of an answer: of a stochastic model, in most of
    ``eot`` fresh passes, again and again. Images of a deterministic one drop out once broken.

    Attributes:
        queries: decisions asked for each image, in all.
    """

    loss: str = field(default="margin", kw_only=True)
    queries: int = field(default=5000, kw_only=True)

    needs_gradient: ClassVar[bool] = False
    on_boundary: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    losses: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken: not of a mean over draws."""
        return self.eot == 1

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the point of the best ray at ``eps``; costs up to ``queries * eot`` forward passes, no backward."""
        drop = self.drops and query.deterministic(x)

        def run(left: Tensor, _: range) -> tuple[Tensor, Tensor]:
            return self._search(query, x[left], y[left], drop)

        return best_of(query, x, y, run, 1, drop=drop, draws=self.eot)

    def _search(self, query: Query, x: Tensor, y: Tensor, drop: bool) -> tuple[Tensor, Tensor]:
        """Return the points found, and which images (bool) are broken; all False unless these drop out.

        In turn a flip is tried at the radius so far, and the radius is bisected: first at ``eps``, all that counts.
        """
        found, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        index = torch.arange(len(x), device=x.device)
        rays, flips = torch.ones_like(x), _flips(x[0].numel())
        low, high = torch.zeros_like(x[:, 0, 0, 0]), torch.ones_like(x[:, 0, 0, 0])
        for number in range(self.queries):
            if number % 2:
                radius = torch.where(low < self.eps, self.eps, (low + high) / 2)
                changed = self._changed(query, x, y, rays, radius)
                low = torch.where(changed, low, radius)
                # Above the radius where the label does not change after all: an earlier draw was a lucky one.
                high = torch.where(changed, radius, high.clamp_min(_OUTSIDE * self.eps))
            else:
                start, end = next(flips)
                trial = rays.flatten(1).clone()
                trial[:, start:end] *= -1
                trial = trial.view_as(x)
                changed = self._changed(query, x, y, trial, high)
                rays, low = torch.where(per_image(changed), trial, rays), low.masked_fill(changed, 0.0)
            if drop and number % 2:
                gone = high <= self.eps
                if bool(gone.any()):
                    found[index[gone]] = _at(x, rays, high)[gone]
                    broken[index[gone]] = True
                    index, x, y, rays, low, high = (part[~gone] for part in (index, x, y, rays, low, high))
                    query.left = len(y)
                    if not len(y):
                        break
        found[index] = _at(x, rays, high.clamp(max=self.eps))
        return found, broken

    def _changed(self, query: Query, x: Tensor, y: Tensor, rays: Tensor, radius: Tensor) -> Tensor:
        return query.success(_at(x, rays, radius), y, self.eot)[0] > 0.5


def _at(x: Tensor, rays: Tensor, radius: Tensor) -> Tensor:
    return (x + per_image(radius) * rays).clamp_(0.0, 1.0)


def _flips(size: int) -> Iterator[tuple[int, int]]:
    """Yield where blocks start and end: the whole, its halves, their halves, to single numbers, and again."""
    while True:
        length = size
        while True:
            yield from ((start, start + length) for start in range(0, size, length))
            if length == 1:
                break
            length = -(-length // 2)
