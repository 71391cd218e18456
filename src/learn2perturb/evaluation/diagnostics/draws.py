"""Check 9: the draws are real. Two calls differ, two rows of a batch differ, averages of K draws vary as 1/K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation.diagnostics.measure import Bench
from learn2perturb.evaluation.diagnostics.verdict import Draft
from learn2perturb.evaluation.passes import Model, checked_logits, passes_differ
from learn2perturb.noise import Perturbation, noise_modules

COUNTS = (1, 4, 16)
TOLERANCE = 0.1
REPLAYED = (
    "two calls give the same answer although the model has noise: its draws are replayed, so an average over draws "
    "averages nothing, and scoring uses the draws that the attack saw"
)
SHARED = (
    "all rows of a batch share one draw: copies of an image in one batch average nothing, and errors over images are "
    "not independent"
)


@dataclass(frozen=True)
class Slope:
    """Slope of log variance against log K over ``COUNTS``, the mean over images, and its standard error."""

    value: float
    standard_error: float

    @property
    def fits(self) -> bool:
        """Whether it is -1 within the tolerance and two standard errors."""
        return abs(self.value + 1) <= TOLERANCE + 2 * self.standard_error

    def __str__(self) -> str:
        return f"{self.value:.2f} +- {self.standard_error:.2f}"


def real(bench: Bench, *, claimed: bool) -> Draft:
    """9: draws are fresh in every pass, independent between rows, and averages over them converge as they must."""
    if not claimed:
        return Draft(9, does_not_apply="two calls give the same answer, and nothing says that the model is random")
    budget = bench.budget
    x, y = bench.x[: budget.slope_images], bench.y[: budget.slope_images]
    with bench.subject.ready() as model:
        if not passes_differ(model, x, bench.seed):
            return Draft(
                9,
                wrong=(REPLAYED,),
                evidence={"calls differ": 0.0},
            )
        seed_everything(bench.seed, "rows")
        rows_differ = _rows_differ(model, x)
        shares = _shares_weights(model)
        seed_everything(bench.seed, "gradient slope")
        gradients = gradient_slope(model, x, y, COUNTS[-1] * budget.slope_repeats)
        seed_everything(bench.seed, "row slope")
        rows = row_slope(model, x, budget.slope_repeats) if rows_differ else None
    evidence = {"calls differ": 1.0, "rows differ": float(rows_differ)}
    wrong, told = [], ["two calls differ"]
    if not rows_differ and not shares:
        wrong.append(SHARED)
    told.append("the weights' draw is one for each pass" if shares else "two rows of a batch differ")
    for name, slope in (("gradient", gradients), ("rows of a batch", rows)):
        if slope is None:
            continue
        evidence |= {f"slope of {name}": slope.value, f"its error, {name}": slope.standard_error}
        told.append(f"the variance of {name} averaged over K draws falls with slope {slope} (-1 is independence)")
        if not slope.fits:
            wrong.append(
                f"the variance of {name} averaged over K draws falls with slope {slope}, not -1: the draws are not "
                "independent"
            )
    not_shown = "" if gradients is not None else "the gradient does not vary with the draws, so its slope tells nothing"
    told.append("scoring has streams of draws that no attack sees")
    return Draft(9, "; ".join(told), wrong=tuple(wrong), not_shown=not_shown, evidence=evidence)


def _rows_differ(model: Model, x: Tensor) -> bool:
    """Tell whether copies of one image in one batch get different logits, beyond rounding."""
    with torch.no_grad():
        logits = checked_logits(model, x[:1].repeat(COUNTS[-1], 1, 1, 1))
    spread = (logits - logits[:1]).abs().max()
    return bool(spread > 1e-5 * (1 + logits.abs().max()))


def _shares_weights(model: Model) -> bool:
    """Tell whether all noise of the model is in its weights, one draw a pass by construction."""
    modules = [module for module in noise_modules(model) if module.enabled] if isinstance(model, nn.Module) else []
    return bool(modules) and not any(isinstance(module, Perturbation) for module in modules)


def gradient_slope(model: Model, x: Tensor, y: Tensor, passes: int) -> Slope | None:
    """Return how the variance of the input gradient, averaged over K successive passes, falls with K.

    Of the margin: the cross-entropy of a confident image is ruled by rare draws, whose variance is ill estimated.
    """
    sums = {count: torch.zeros_like(x, dtype=torch.float64) for count in COUNTS}
    squares = {count: torch.zeros_like(x, dtype=torch.float64) for count in COUNTS}
    running = {count: torch.zeros_like(x, dtype=torch.float64) for count in COUNTS}
    for number in range(1, passes + 1):
        gradient = input_gradient(model, margin, x, y).double()
        for count in COUNTS:
            running[count] += gradient / count
            if number % count == 0:
                sums[count] += running[count]
                squares[count] += running[count].square()
                running[count].zero_()
    variances = []
    for count in COUNTS:
        blocks = passes // count
        variance = (squares[count] - sums[count].square() / blocks) / (blocks - 1)
        variances.append(variance.flatten(1).sum(dim=1).cpu().numpy())
    return _slope(np.stack(variances))


def row_slope(model: Model, x: Tensor, repeats: int) -> Slope | None:
    """Return how the variance of the logits, averaged over K rows of a batch of copies, falls with K."""
    copies = COUNTS[-1]
    variances = []
    for image in x.split(1):
        with torch.no_grad():
            logits = torch.stack(
                [checked_logits(model, image.repeat(copies, 1, 1, 1)) for _ in range(repeats)]
            ).double()
        means = [logits.unflatten(1, (copies // count, count)).mean(dim=2) for count in COUNTS]
        variances.append([float(mean.var(dim=0).mean(dim=0).sum()) for mean in means])
    return _slope(np.array(variances).T)


def _slope(variances: NDArray[np.float64]) -> Slope | None:
    """Fit each image's log variance, (counts, images), against log K; None where nothing varies."""
    varying = variances[:, (variances > 0).all(axis=0)]
    if varying.shape[1] == 0:
        return None
    slopes = np.polyfit(np.log(COUNTS), np.log(varying), 1)[0]
    error = float(slopes.std(ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else TOLERANCE
    return Slope(float(slopes.mean()), error)
