"""Check 9: the draws are real. Two calls differ, and averages of K draws vary as 1/K; shared draws are noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.engine.answers import ask, plain_logits, scale_of
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation.diagnostics.measure import Bench
from learn2perturb.evaluation.diagnostics.verdict import Draft
from learn2perturb.evaluation.passes import Model, checked_logits, passes_differ

COUNTS = (1, 4, 16)
TOLERANCE = 0.1
REPLAYED = "its draws are replayed, so an average over draws averages nothing, and scoring uses draws the attack saw"
SAME = "two calls give the same answer although the model has noise"
SHARED = (
    "so EOT must average over fresh passes, as the attacks here do: copies of an image in one batch average less than "
    "they seem to; and images scored in one pass are not independent, so intervals over images are too narrow: compare "
    "several scorings"
)
# Parts of the passes, each left out once: enough to tell an error, few enough to keep the sums of each.
_PARTS = 12
_FEWEST_BLOCKS = 3
_MORE = 4
# Relative to a square: what is below is rounding.
_NOTHING = 1e-12


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


def real(bench: Bench, *, claimed: bool, replay: str = "") -> Draft:
    """9: draws are fresh in every pass, and averages over them converge as they must.

    ``replay``: how the draws are known to be replayed, if they are. Draws that the rows of a batch share are noted.
    """
    if not claimed:
        return Draft(9, does_not_apply="two calls give the same answer, and nothing says that the model is random")
    budget = bench.budget
    x, y = bench.x[: budget.slope_images], bench.y[: budget.slope_images]
    with bench.subject.ready() as model:
        differ = passes_differ(model, x, bench.seed)
        if replay or not differ:
            return Draft(9, wrong=(f"{replay or SAME}: {REPLAYED}",), evidence={"calls differ": float(differ)})
        seed_everything(bench.seed, "rows")
        rows_differ = _rows_differ(model, x)
        seed_everything(bench.seed, "gradient slope")
        passes, values = COUNTS[-1] * budget.slope_repeats, not bench.subject.gradient
        # Logits are fewer than pixels, so that their variance is told from more passes, which are cheap.
        slope = value_slope(model, x, _MORE * passes) if values else gradient_slope(model, x, y, passes)
        seed_everything(bench.seed, "row slope")
        rows = row_slope(model, x, budget.slope_repeats) if rows_differ and budget.slope_repeats > 1 else None
    return _told(slope, rows, rows_differ=rows_differ, of="logits" if values else "gradient")


def _told(slope: Slope | None, rows: Slope | None, *, rows_differ: bool, of: str = "gradient") -> Draft:
    """Return the check from what was measured; ``of`` is what was averaged over passes."""
    evidence = {"calls differ": 1.0, "rows differ": float(rows_differ)}
    wrong, notes, told = [], [], ["two calls differ"]
    if not rows_differ:
        notes.append(f"all rows of a batch share one draw, {SHARED}")
    if rows is not None:
        evidence |= {"slope of rows of a batch": rows.value, "its error, rows of a batch": rows.standard_error}
        falls = f"the variance of K rows of a batch, averaged, falls with slope {rows}"
        if rows.fits:
            told.append(f"{falls} (-1 is independence)")
        else:
            notes.append(f"the rows of a batch share a part of their draws ({falls}, not -1), {SHARED}")
    not_shown = ""
    if slope is None:
        not_shown = f"the {of} does not vary with the draws (or slope_repeats is below 3), so its slope tells nothing"
    else:
        evidence |= {f"slope of {of}": slope.value, f"its error, {of}": slope.standard_error}
        falls = f"the variance of the {of} averaged over K passes falls with slope {slope}"
        told.append(f"{falls} (-1 is independence)")
        if not slope.fits:
            wrong.append(f"{falls}, not -1: draws come again, so passes are not independent")
    told.append("scoring has streams of draws that no attack sees")
    return Draft(9, "; ".join(told), (), tuple(wrong), not_shown=not_shown, notes=tuple(notes), evidence=evidence)


def _rows_differ(model: Model, x: Tensor) -> bool:
    """Tell whether copies of one image in one batch get different logits, beyond rounding."""
    with torch.no_grad():
        logits = checked_logits(model, x[:1].repeat(COUNTS[-1], 1, 1, 1))
    spread = (logits - logits[:1]).abs().max()
    return bool(spread > 1e-5 * (1 + scale_of(logits)))


def gradient_slope(model: Model, x: Tensor, y: Tensor, passes: int) -> Slope | None:
    """Return how the variance of the input gradient, averaged over K successive passes, falls with K.

    Of the margin: the cross-entropy of a confident image is ruled by rare draws, whose variance is ill estimated. The
    error is over passes (delete-a-part jackknife), not over images, which may share the draws of a pass. None where
    nothing varies, or where the passes are too few for a variance and its error.
    """

    def answers(images: Tensor) -> Tensor:
        return plain_logits(ask(model, images))

    return _slope_over_passes(lambda: input_gradient(answers, margin, x, y), passes)


def value_slope(model: Model, x: Tensor, passes: int) -> Slope | None:
    """Return how the variance of the logits, averaged over K successive passes, falls with K: without a gradient."""
    with torch.no_grad():
        return _slope_over_passes(lambda: checked_logits(model, x), passes)


def _slope_over_passes(once: Callable[[], Tensor], passes: int) -> Slope | None:
    """Return how the variance of what a pass gives (n, ...), averaged over K of them, falls with K."""
    blocks = passes // COUNTS[-1]
    if blocks < _FEWEST_BLOCKS:
        return None
    parts = min(_PARTS, blocks)
    first = once().double().flatten(1)
    sums = first.new_zeros(parts, *first.shape)
    squares = first.new_zeros(len(COUNTS), parts, len(first))
    held = first.new_zeros(parts)
    for block in range(blocks):
        part = block * parts // blocks
        held[part] += 1
        running = first.new_zeros(len(COUNTS), *first.shape)
        for number in range(1, COUNTS[-1] + 1):
            running += once().double().flatten(1)
            for index, count in enumerate(COUNTS):
                if number % count == 0:
                    squares[index, part] += (running[index] / count).square().sum(dim=1)
                    if count == COUNTS[-1]:
                        sums[part] += running[index]
                    running[index].zero_()
    whole = sums.sum(dim=0)
    left_out = [
        _slopes(whole - sums[part], squares.sum(dim=1) - squares[:, part], float(held.sum() - held[part]))
        for part in range(parts)
    ]
    slopes = _slopes(whole, squares.sum(dim=1), float(held.sum()))
    if slopes is None or any(one is None for one in left_out):
        return None
    others = np.array([one.mean() for one in left_out if one is not None])
    error = ((parts - 1) / parts * ((others - others.mean()) ** 2).sum()) ** 0.5
    return Slope(float(slopes.mean()), float(error))


def _slopes(total: Tensor, squares: Tensor, blocks: float) -> NDArray[np.float64] | None:
    """Return each image's slope from the sum (n, D) of its gradients and the squares (counts, n) of its averages."""
    variances = []
    for index, count in enumerate(COUNTS):
        averages = blocks * COUNTS[-1] / count
        variances.append((squares[index] - (total / count).square().sum(dim=1) / averages) / (averages - 1))
    rounding = _NOTHING * squares[0] / (blocks * COUNTS[-1])
    return _fitted(torch.stack(variances).cpu().numpy(), rounding.cpu().numpy())


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
    slopes = _fitted(np.array(variances).T, 0.0)
    if slopes is None:
        return None
    # Every image has passes of its own here, so that images are independent.
    error = float(slopes.std(ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else TOLERANCE
    return Slope(float(slopes.mean()), error)


def _fitted(variances: NDArray[np.float64], rounding: NDArray[np.float64] | float) -> NDArray[np.float64] | None:
    """Return the slope of each image's log variance, (counts, images), against log K; None where nothing varies."""
    varying = variances[:, variances[0] > rounding]
    if varying.shape[1] == 0:
        return None
    # The floor is for draws that run in a circle, whose average may be constant.
    logs = np.log(np.maximum(varying, _NOTHING * varying[0]))
    slopes: NDArray[np.float64] = np.polyfit(np.log(COUNTS), logs, 1)[0]
    return slopes
