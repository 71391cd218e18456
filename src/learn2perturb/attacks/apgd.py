"""Auto-PGD: projected gradient ascent with momentum that halves its step where the loss no longer rises."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.attacks.balls import Ball
from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import Values
from learn2perturb.attacks.losses import towards
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import best_of, likely_targets, per_image
from learn2perturb.checks import check_count, check_flag
from learn2perturb.errors import ConfigError

_MOMENTUM = 0.75  # weight of the new step; the rest goes on along the last one
_RHO = 0.75  # share of the steps since the last checkpoint that must raise the loss, or the step is halved


@final
@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD, parameter-free: step ``2 eps``, halved image by image at checkpoints, going on from the best point.

    Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks, 2020,
    https://arxiv.org/abs/2003.01690, algorithm 1. Step-size control, best point and success read the loss and
    margin averaged over the very ``eot`` draws whose gradients are averaged: one pass gives all three.

    Attributes:
        steps: gradients in a run.
        targets: 0 raises ``loss``; k runs once for each of the k most likely wrong classes, raising the targeted form
            of ``loss`` (``APGD(loss="dlr", targets=9)`` is APGD-T); at most as many as there are.
        restarts: runs (for each target); an image keeps the point that fools the model in most of ``eot`` fresh draws,
            then by their mean margin.
        random_start: start at a random point of the ball, else at ``x``.
        early_stop: images of a deterministic model drop out once broken. Those of a stochastic one never do: one lucky
            draw proves nothing. ``False`` for points as wrong as can be, to be tried on other models.
    """

    steps: int = 100
    targets: int = field(default=0, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    random_start: bool = field(default=True, kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("targets", self.targets, lowest=0)
        check_count("restarts", self.restarts)
        check_flag("random_start", self.random_start)
        check_flag("early_stop", self.early_stop)
        if self.targets and self.targeted:
            raise ConfigError(
                f"targets={self.targets} tries wrong classes in turn, targeted=True asks for one; leave one of them out"
            )

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken: not of a mean over draws."""
        return self.early_stop and self.eot == 1

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the best point of all runs; a run costs ``steps * eot`` gradients, ``eot`` draws to judge its end."""
        drop = self.drops and query.deterministic(x)
        targets = likely_targets(query, x, y, self.targets) if self.targets else [None]
        runs = [target for target in targets for _ in range(self.restarts)]

        def run(left: Tensor, some: range) -> tuple[Tensor, Tensor]:
            aims = [target[left] for number in some if (target := runs[number]) is not None]
            return self._ascend(query, x[left], y[left], torch.cat(aims) if aims else None, drop, len(some))

        return best_of(query, x, y, run, len(runs), drop=drop, draws=self.eot, side_by_side=True)

    def _ascend(
        self, query: Query, x: Tensor, y: Tensor, target: Tensor | None, drop: bool, times: int
    ) -> tuple[Tensor, Tensor]:
        """Return, of so many ``times`` runs side by side, the best points and which (bool) break their image.

        None do unless broken images drop out, from all runs at once. All rows are run by run, those of ``target``, too.
        """
        owner = torch.arange(len(x), device=x.device).repeat(times)
        x, y = x[owner], y[owner]
        found, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        start = (x + self.ball.random(x, self.eps)).clamp_(0.0, 1.0) if self.random_start else x
        now = _State.at(start, x, y, owner, target, 2 * self.eps)
        checkpoint = window = max(int(0.22 * self.steps), 1)
        for step in range(self.steps + 1):
            loss = None if now.target is None else towards(now.target, self.loss)
            if step < self.steps:
                values, gradient = query.value_and_gradient(now.point, now.y, loss=loss)
            else:
                values, gradient = query.value(now.point, now.y, loss=loss), now.gradient
            now.see(values, gradient)
            if drop:
                hit = query.broken(now.point, now.y, values.margin)
                if bool(hit.any()):
                    found[now.index[hit]] = now.point[hit]
                    broken[now.index[hit]] = True
                    now = now.without(torch.isin(now.owner, now.owner[hit]))
                    query.left = len(now.owner.unique())
                    if not len(now.y):
                        return found, broken
            if step == checkpoint:
                now.check(window)
                window = max(window - max(int(0.03 * self.steps), 1), int(0.06 * self.steps), 1)
                checkpoint += window
            if step < self.steps:
                now.move(self.ball, self.eps, _MOMENTUM if step else 1.0)
        found[now.index] = now.found
        return found, broken


@final
@dataclass
class _State:
    """Where each image of a run stands; every field has one row for each run of an image, whose number is ``owner``.

    ``found`` is the point to give back, wrong before right and then by loss; ``best`` is the point of largest loss, to
    which the step-size control returns. They differ where the largest loss is no wrong answer.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    owner: Tensor
    target: Tensor | None
    size: Tensor
    point: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    found: Tensor
    found_wrong: Tensor
    found_loss: Tensor
    rises: Tensor
    checked_loss: Tensor
    was_halved: Tensor

    @classmethod
    def at(cls, start: Tensor, x: Tensor, y: Tensor, owner: Tensor, target: Tensor | None, size: float) -> _State:
        def row(value: float) -> Tensor:
            return torch.full((len(x),), value, dtype=x.dtype, device=x.device)

        no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        index = torch.arange(len(x), device=x.device)
        lowest = -torch.inf
        return cls(
            index=index, x=x, y=y, owner=owner, target=target, size=per_image(row(size)), point=start, before=start,
            gradient=start, loss=row(torch.inf), best=start, best_gradient=start, best_loss=row(lowest), found=start,
            found_wrong=no, found_loss=row(lowest), rises=row(0.0), checked_loss=row(lowest), was_halved=~no,
        )  # fmt: skip

    def without(self, gone: Tensor) -> _State:
        """Return the state of the other images."""
        rows = (~gone).nonzero().squeeze(1)
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name, value in values.items():
            values[name] = None if value is None else value[rows]
        return _State(**values)

    def see(self, values: Values, gradient: Tensor) -> None:
        """Take in what the model says of the current points."""
        loss, wrong = values.loss, values.margin > 0
        self.rises = self.rises + (loss > self.loss)
        self.loss, self.gradient = loss, gradient
        better = loss > self.best_loss
        self.best = torch.where(per_image(better), self.point, self.best)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        keep = torch.where(wrong == self.found_wrong, loss > self.found_loss, wrong)
        self.found = torch.where(per_image(keep), self.point, self.found)
        self.found_wrong = self.found_wrong | wrong
        self.found_loss = torch.where(keep, loss, self.found_loss)

    def check(self, window: int) -> None:
        """Halve the step where too few steps raised the loss, or none did since a checkpoint that changed nothing."""
        halve = (self.rises < _RHO * window) | (~self.was_halved & (self.best_loss <= self.checked_loss))
        self.size = torch.where(per_image(halve), self.size / 2, self.size)
        # The last step led away from a point that is left: there is no momentum to keep.
        self.before = torch.where(per_image(halve), self.best, self.before)
        self.point = torch.where(per_image(halve), self.best, self.point)
        self.gradient = torch.where(per_image(halve), self.best_gradient, self.gradient)
        self.loss = torch.where(halve, self.best_loss, self.loss)
        self.rises = torch.zeros_like(self.rises)
        self.checked_loss, self.was_halved = self.best_loss, halve

    def move(self, ball: Ball, eps: float, share: float) -> None:
        """Go a ``share`` of the way that the gradient points out, the rest along the last step."""
        step = ball.step(self.gradient, 1.0).mul_(self.size).add_(self.point)
        aim = ball.project(step, self.x, eps).clamp_(0.0, 1.0)
        moved = self.point + share * (aim - self.point) + (1 - share) * (self.point - self.before)
        self.before, self.point = self.point, ball.project(moved, self.x, eps).clamp_(0.0, 1.0)
