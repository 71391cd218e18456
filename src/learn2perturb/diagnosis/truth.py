"""Check 10: is the gradient that of the function? Where it is not, only what needs no gradient can tell anything."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from learn2perturb.attacks.balls import BALLS, Ball
from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.diagnosis.blackbox import descent, not_beaten
from learn2perturb.diagnosis.measure import Attacked, Bench, digest
from learn2perturb.diagnosis.verdict import Draft, percent
from learn2perturb.diagnosis.whitebox import best_of, by_same_draws
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation.passes import Model, checked_logits
from learn2perturb.evaluation.significance import beyond

# Largest change of a pixel: a quarter of one of 256 levels. Far below what an attack moves, far above rounding.
STEP = 0.25 / 255
DRAWS = 4
NEIGHBOURS = 32  # points around an image, over which a gradient is averaged
# Honest networks have medians of .99 to 1.00 and 10 to 90 % within .95 to 1.02; their kinks cost that much.
MEDIAN_OFF = 0.1
SPREAD_OFF = 0.25
# What a single attack without gradients may be ahead by chance, where nothing is significant.
BEST_AHEAD = 0.02
DESCENT = "descent on values"


@final
@dataclass(frozen=True)
class Ratios:
    """Finite difference of the margin along the gradient, over the squared gradient: 1 where the gradient is true.

    Attributes:
        median, low, high: over images and draws; ``low`` and ``high`` are the 10 % and the 90 % quantile.
        none: share of gradients that are exactly zero; their ratio counts as 0.
    """

    median: float
    low: float
    high: float
    none: float

    @property
    def near(self) -> bool:
        """Whether the gradient may be taken for that of the function."""
        inside = self.low >= 1 - SPREAD_OFF and self.high <= 1 + SPREAD_OFF
        return abs(self.median - 1) <= MEDIAN_OFF and inside

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@final
@dataclass(frozen=True)
class Truth:
    """The ratios at the images, and over neighbourhoods of them.

    A function that jumps (k-winners-take-all) may have a true gradient at nearly every point, which says nothing of its
    neighbourhood; a staircase (rounding, straight through) the other way round.
    """

    at_images: Ratios
    averaged: Ratios

    @property
    def near(self) -> bool:
        """Whether the gradient is that of the function, at the images and around them."""
        return self.at_images.near and self.averaged.near

    @property
    def leads(self) -> bool:
        """Whether the function is a staircase, and the gradient that of its slope."""
        return self.averaged.near and not self.at_images.near


def truth_of(bench: Bench) -> Truth:
    """Compare gradients with differences, near by and as far as an attack moves."""
    return Truth(ratios(bench), averaged_ratios(bench))


def best_by_gradients(bench: Bench, reported: Attacked) -> Attacked:
    """Return the best, for each image, of the reported attack and of restarts of it by two losses.

    On a staircase the last of some steps is wrong by luck, so that a search that keeps its best point is ahead of one
    descent. Several are what is to be compared with it.
    """
    budget = bench.budget
    base = dataclasses.replace(bench.attack, restarts=budget.restarts, eot=budget.sweep_eot)
    more = [
        bench.attacked(f"{budget.restarts} restarts by {loss}", dataclasses.replace(base, loss=loss), budget.images)
        for loss in ("ce", "margin")
    ]
    return best_of(bench, "best by gradients", by_same_draws(bench, "best by gradients", [reported, *more]))


def true_gradient(bench: Bench, truth: Truth, own: Attacked, rivals: Mapping[str, Attacked]) -> Draft:
    """10: finite differences agree with the gradient, or attacks that need none do no better than it.

    ``own`` is the white-box attack, ``rivals`` are those of check 2, which holds them against it; here is the descent,
    and what all of them leave.
    """
    evidence = _evidence(truth)
    text = (
        f"the margin rises along its gradient by {truth.at_images} times what the gradient says (median [10 %, 90 %]), "
        f"over neighbourhoods by {truth.averaged}"
    )
    if truth.near:
        return Draft(10, text, evidence=evidence)
    falling = descent(bench, DESCENT)
    rivals = {**rivals, DESCENT: falling}
    evidence |= {name: rival.accuracy for name, rival in rivals.items()}
    left = ", ".join(f"{name} {percent(rival.accuracy)}" for name, rival in rivals.items())
    what = "a staircase, whose slope the gradients are" if truth.leads else "the gradients are not the function's"
    told = f"{text}: {what}. What needs none decides; it leaves: {left}; the gradients {percent(own.accuracy)}"
    ahead = [
        name
        for name, rival in rivals.items()
        if beyond(float(own.first(len(rival.x)).mean()) - rival.accuracy, BEST_AHEAD)
    ]
    not_shown = f"{told}; {' and '.join(ahead)} may be stronger than the gradients: give more images" if ahead else ""
    note = "robustness to attacks by gradients says little of this model; see what those without leave"
    claims = (not_beaten(f"a {DESCENT}", falling, own.first(len(falling.x))),)
    return Draft(10, told, claims, not_shown=not_shown, notes=(note,), evidence=evidence)


def _evidence(truth: Truth) -> dict[str, float]:
    near, far = truth.at_images, truth.averaged
    found = {"median": near.median, "10 %": near.low, "90 %": near.high, "no gradient": near.none}
    return found | {"averaged median": far.median, "averaged 10 %": far.low, "averaged 90 %": far.high}


def ratios(bench: Bench) -> Ratios:
    """Compare the gradient of the margin at each image with its central difference, the same draws on both sides."""
    # Inside the box by a step, where a network that clips its images has a derivative on both sides.
    x = bench.x[: bench.budget.some].clamp(STEP, 1 - STEP)
    draws = DRAWS if bench.subject.stochastic else 1
    return _quantiles([_compared(bench, x, "linf", STEP, draws=(draw,)) for draw in range(draws)])


def averaged_ratios(bench: Bench) -> Ratios:
    """Compare the gradient's mean over a neighbourhood of each image, of half the radius, with differences as far.

    Rounding whose gradient is passed straight through is a staircase: nowhere is its gradient true, and over some steps
    it is. The gradient of another network is as false there as anywhere, and so is that of what jumps.
    """
    attack = bench.attack
    x = bench.x[: bench.budget.some]
    return _quantiles([_compared(bench, x, attack.norm, attack.eps / 2, draws=range(NEIGHBOURS), around=True)])


def _quantiles(found: Sequence[tuple[Tensor, int]]) -> Ratios:
    every = torch.cat([ratio for ratio, _ in found]).cpu().numpy()
    low, median, high = (float(value) for value in np.quantile(every, (0.1, 0.5, 0.9)))
    return Ratios(median, low, high, sum(none for _, none in found) / len(every))


def _compared(
    bench: Bench, x: Tensor, norm: str, reach: float, *, draws: Sequence[int], around: bool = False
) -> tuple[Tensor, int]:
    """Return each image's ratio (n,), and how many have no gradient.

    Sums over ``draws``, each at the image itself or, ``around`` it, at a random point as far as ``reach``.
    """
    ball, y, batches = BALLS[norm], bench.y[: len(x)], bench.batches(len(x))
    with bench.subject.ready() as model:

        def one(batch: int) -> tuple[Tensor, int]:
            rows = batches[batch]
            seed_everything(bench.seed, "neighbours", batch)
            points = {draw: _point(ball, x[rows], reach if around else 0.0) for draw in draws}
            asked = functools.partial(_asked, bench, model, y[rows], batch)
            slopes = {draw: asked(draw, point, slope=True) for draw, point in points.items()}
            mean = torch.stack(list(slopes.values())).mean(dim=0)
            length = ball.distance(mean, torch.zeros_like(mean))
            none = length == 0
            move = mean * (reach / length.masked_fill(none, 1.0)).to(mean.dtype).view(-1, *[1] * (x.ndim - 1))
            rise, said = torch.zeros_like(length), torch.zeros_like(length)
            for draw, point in points.items():
                up, down = ((point + side * move).clamp_(0, 1) for side in (1, -1))
                rise += asked(draw, up).double() - asked(draw, down).double()
                said += (slopes[draw].double() * (up.double() - down.double())).flatten(1).sum(dim=1)
            return (rise / said.masked_fill(said == 0, 1.0)).masked_fill(none, 0.0), int(none.sum())

        found = bench.each(one, len(batches), ("ratios", norm, reach, list(draws), around, digest(x)))
    return torch.cat([ratio for ratio, _ in found]), sum(none for _, none in found)


def _point(ball: Ball, x: Tensor, reach: float) -> Tensor:
    return (x + ball.random(x, reach)).clamp_(0, 1) if reach else x


def _asked(bench: Bench, model: Model, y: Tensor, batch: int, draw: int, x: Tensor, *, slope: bool = False) -> Tensor:
    """Return the margin (n,) of each image, or its gradient (n, C, H, W), by the draws of that number."""
    seed_everything(bench.seed, "true gradient", draw, batch)
    with torch.set_grad_enabled(slope):
        return input_gradient(model, margin, x, y) if slope else margin(checked_logits(model, x), y)
