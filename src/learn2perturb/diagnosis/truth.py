"""Check 10: is the gradient that of the function? Where it is not, only what needs no gradient can tell anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.diagnosis.blackbox import descent, not_beaten
from learn2perturb.diagnosis.measure import Attacked, Bench
from learn2perturb.diagnosis.verdict import Draft, percent
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation.passes import Model, checked_logits
from learn2perturb.evaluation.significance import beyond

# Largest change of a pixel: a quarter of one of 256 levels. Far below what an attack moves, far above rounding.
STEP = 0.25 / 255
DRAWS = 4
# Honest networks have medians of .99 to 1.00 and 10 to 90 % within .95 to 1.02; their kinks cost that much.
MEDIAN_OFF = 0.1
SPREAD_OFF = 0.25
# What a single attack without gradients may be ahead by chance, where nothing is significant.
BEST_AHEAD = 0.02
DESCENT = "descent on values"


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


def true_gradient(
    bench: Bench, found: Ratios, reported: Attacked, square: Attacked, transfers: Mapping[str, Attacked]
) -> Draft:
    """10: finite differences agree with the gradient, or attacks that need none do no better than it.

    ``square`` and ``transfers`` are those of check 2, which holds them against the gradients; here is the descent, and
    what all of them leave.
    """
    evidence = {"median": found.median, "10 %": found.low, "90 %": found.high, "no gradient": found.none}
    text = f"the margin rises along its gradient by {found} times what the gradient says (median [10 %, 90 %])"
    if found.near:
        return Draft(10, text, evidence=evidence)
    falling = descent(bench, DESCENT)
    rivals = {"Square": square, **{f"transfer from {name}": one for name, one in transfers.items()}, DESCENT: falling}
    evidence |= {name: rival.accuracy for name, rival in rivals.items()}
    left = ", ".join(f"{name} {percent(rival.accuracy)}" for name, rival in rivals.items())
    told = (
        f"{text}: the gradients are not the function's. What needs none decides; it leaves: {left}; the gradients "
        f"{percent(reported.accuracy)}"
    )
    ahead = [
        name
        for name, rival in rivals.items()
        if beyond(float(reported.first(len(rival.x)).mean()) - rival.accuracy, BEST_AHEAD)
    ]
    not_shown = f"{told}; {' and '.join(ahead)} may be stronger than the gradients: give more images" if ahead else ""
    note = "robustness to attacks by gradients says little of this model; see what those without leave"
    claims = (not_beaten(f"a {DESCENT}", falling, reported.first(len(falling.x))),)
    return Draft(10, told, claims, not_shown=not_shown, notes=(note,), evidence=evidence)


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
