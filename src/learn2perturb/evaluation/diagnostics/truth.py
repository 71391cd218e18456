"""Check 10: is the gradient that of the function? Where it is not, only what needs no gradient can tell anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.evaluation.diagnostics.blackbox import not_beaten
from learn2perturb.evaluation.diagnostics.measure import Attacked, Bench, Subject
from learn2perturb.evaluation.diagnostics.verdict import Draft, percent
from learn2perturb.evaluation.passes import Model, checked_logits

# Largest change of a pixel: a quarter of one of 256 levels. Far below what an attack moves, far above rounding.
STEP = 0.25 / 255
DRAWS = 4
# Honest networks have medians of .99 to 1.00 and 10 to 90 % within .95 to 1.02; their kinks cost that much.
MEDIAN_OFF = 0.1
SPREAD_OFF = 0.25
# Of the estimate: directions, and the size of the differences in units of eps, which looks across what is flat.
_DIRECTIONS = 16
_REACH = 0.25


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


def true_gradient(bench: Bench, reported: Attacked, transfers: Mapping[str, Attacked]) -> Draft:
    """10: finite differences agree with the gradient, or attacks that need none do no better than it."""
    found = ratios(bench)
    evidence = {"median": found.median, "10 %": found.low, "90 %": found.high, "no gradient": found.none}
    text = f"the margin rises along its gradient by {found} times what the gradient says (median [10 %, 90 %])"
    if found.near:
        return Draft(10, text, evidence=evidence)
    attack = dataclasses.replace(bench.attack, eot=bench.budget.sweep_eot, restarts=1)
    subject = bench.subject
    estimate = Estimated(subject.model, _REACH * (attack.eps if attack.norm == "linf" else _pixel(bench, attack.eps)))
    name = "estimated gradients"
    source = Subject(estimate.eval(), subject.stochastic, subject.quiet)
    rival = bench.attacked(name, attack, bench.budget.some, source=source, victim=subject)
    bench.rivals[name] = rival.accuracy
    evidence |= {name: rival.accuracy}
    told = (
        f"{text}: the gradients are not the function's. What needs none decides: {name} leave {percent(rival.accuracy)}"
    )
    claims = (not_beaten(f"an attack with {name}", rival, reported.first(len(rival.x))),)
    note = "robustness to attacks by gradients says little of this model; see what checks 2 and 4 leave"
    if not transfers:
        return Draft(
            10,
            claims=claims,
            not_shown=f"{told}; but no source to transfer from is there",
            missing=("transfer from any source",),
            notes=(note,),
            evidence=evidence,
        )
    return Draft(10, told, claims, notes=(note,), evidence=evidence)


def ratios(bench: Bench) -> Ratios:
    """Compare the gradient of the margin with its central difference, the same draws on both sides."""
    n = bench.budget.some
    # Inside the box by a step, where a network that clips its images has a derivative on both sides.
    x, y = bench.x[:n].clamp(STEP, 1 - STEP), bench.y[:n]
    found, zero = [], 0
    with bench.subject.ready() as model:
        for draw in range(DRAWS if bench.subject.stochastic else 1):
            for batch, rows in enumerate(x.split(bench.batch_size)):
                labels = y[batch * bench.batch_size :][: len(rows)]

                def drawn(call: Callable[[], Tensor], draw: int = draw, batch: int = batch) -> Tensor:
                    seed_everything(bench.seed, "true gradient", draw, batch)
                    return call()

                ratio, none = _compared(model, rows, labels, drawn)
                found.append(ratio)
                zero += none
    every = torch.cat(found).cpu().numpy()
    low, median, high = (float(value) for value in np.quantile(every, (0.1, 0.5, 0.9)))
    return Ratios(median, low, high, zero / len(every))


def _compared(
    model: Model, x: Tensor, y: Tensor, drawn: Callable[[Callable[[], Tensor]], Tensor]
) -> tuple[Tensor, int]:
    """Return each image's ratio (n,), and how many have no gradient; ``drawn`` makes a call with the same draws."""
    with torch.enable_grad():
        gradient = drawn(lambda: input_gradient(model, margin, x, y))
    largest = gradient.flatten(1).abs().amax(dim=1)
    none = largest == 0
    scale = STEP / largest.masked_fill(none, 1.0)
    move = scale.view(-1, *[1] * (x.ndim - 1)) * gradient
    with torch.no_grad():
        up = drawn(lambda: margin(checked_logits(model, x + move), y))
        down = drawn(lambda: margin(checked_logits(model, x - move), y))
    squared = gradient.double().flatten(1).square().sum(dim=1).masked_fill(none, 1.0)
    ratio = (up.double() - down.double()) / (2 * scale.double() * squared)
    return ratio.masked_fill(none, 0.0), int(none.sum())


def _pixel(bench: Bench, eps: float) -> float:
    """Return the change of each pixel that has the l2 norm ``eps``."""
    return eps / float(bench.x[0].numel()) ** 0.5


@final
class Estimated(nn.Module):
    """``model`` with a gradient estimated from its values, so that any attack by gradients needs none.

    ``g = mean_u u (v . (f(x + s u) - f(x - s u))) / 2 s`` over random signs u, the same draws on both sides (Spall
    1992; against masked gradients Uesato et al. 2018). ``size`` is s, [0, 1] pixel scale.
    """

    def __init__(self, model: Model, size: float, directions: int = _DIRECTIONS) -> None:
        super().__init__()
        self.model, self.size, self.directions = model, size, directions

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits: Tensor = _Differences.apply(x, self)
        return logits


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, estimated: Estimated) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimated = estimated
        return checked_logits(estimated.model, x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (x,), estimated = ctx.saved_tensors, ctx.estimated
        total = torch.zeros_like(x)
        for _ in range(estimated.directions):
            signs = torch.randint_like(x, 2) * 2 - 1
            with isolated_rng():
                up = checked_logits(estimated.model, x + estimated.size * signs)
            down = checked_logits(estimated.model, x - estimated.size * signs)
            slope = (outer[0] * (up - down)).sum(dim=1) / (2 * estimated.size)
            total += signs * slope.view(-1, *[1] * (x.ndim - 1))
        return total / estimated.directions, None
