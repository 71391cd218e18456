"""Check 9: the draws are real. Two calls differ, and averages of K draws vary as 1/K; shared draws are noted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learn2perturb.attacks.gradients import input_gradient
from learn2perturb.attacks.losses import margin
from learn2perturb.diagnosis.measure import Bench
from learn2perturb.diagnosis.verdict import Draft
from learn2perturb.engine.answers import ask, plain_logits, scale_of
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation.passes import Model, checked_logits, passes_differ
from learn2perturb.evaluation.replays import draws_afresh

COUNTS = (1, 4, 16)
TOLERANCE = 0.1
REPLAYED = "its draws are replayed, so an average over draws averages nothing, and scoring uses draws the attack saw"
SAME = "two calls give the same answer although the model has noise"
SHARED = (
    "so EOT must average over fresh passes, as the attacks here do: copies of an image in one batch average less than "
    "they seem to; and images scored in one pass are not independent, which intervals and standard errors allow for"
)
# Parts of the passes, each left out once: enough to tell an error, few enough to keep the sums of each.
_PARTS = 12
_FEWEST_BLOCKS = 3
# Relative to a square: what is below is rounding.
_NOTHING = 1e-12
_BUCKETS = 256
# Orders that the passes are compared with, so many at once, until enough resemble as much. All must be beaten, which
# independent passes do once in so many diagnoses. Lags at which fewer pairs of passes meet are left out.
_ORDERS, _TOGETHER, _ENOUGH = 1000, 20, 10
_CONFIRMS = 0.01  # p-value that new passes must reach, once others have beaten all orders
_DIRECTIONS = 32
_FEWEST_PAIRS = 8


@final
@dataclass(frozen=True)
class Slope:
    """Slope of log variance against log K over ``COUNTS``, the mean over images, and its standard error.

    Attributes:
        recurs: p-value of passes that resemble earlier ones, where it is passes that are averaged (:func:`recurrence`);
            rare draws give slopes far from -1 by chance, so it decides there.
    """

    value: float
    standard_error: float
    recurs: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the draws are independent, as far as can be told."""
        if self.recurs is not None:
            return self.recurs > 1 / _ORDERS
        return abs(self.value + 1) <= TOLERANCE + 2 * self.standard_error

    def __str__(self) -> str:
        return f"{self.value:.2f} +- {self.standard_error:.2f}"


def real(bench: Bench, *, claimed: bool, replay: str = "") -> Draft:
    """9: draws are fresh in every pass, and averages over them converge as they must.

    ``replay``: how the draws are known to be replayed, if they are. Draws that the rows of a batch share are noted, and
    so are draws that no answer shows, as in a vote that is sure.
    """
    if not claimed:
        return Draft(9, does_not_apply="two calls give the same answer, and nothing says that the model is random")
    budget = bench.budget
    x, y = bench.x[: budget.slope_images], bench.y[: budget.slope_images]
    with bench.subject.ready() as model:
        differ = passes_differ(model, x, bench.seed)
        if replay or not (differ or draws_afresh(model, x)):
            return Draft(9, wrong=(f"{replay or SAME}: {REPLAYED}",), evidence={"calls differ": float(differ)})
        seed_everything(bench.seed, "rows")
        rows_differ = _rows_differ(model, x)
        passes = COUNTS[-1] * budget.slope_repeats

        def of_passes() -> tuple[Slope | None, str]:
            measured = partial(gradient_slope, model, x, y, passes)
            found = _confirmed(measured, bench.seed, "gradient slope") if bench.subject.gradient else None
            if found is not None:
                return found, "gradient"
            return _confirmed(partial(value_slope, model, x, passes), bench.seed, "value slope"), "logits"

        def of_rows() -> tuple[Slope | None, str]:
            seed_everything(bench.seed, "row slope")
            enough = rows_differ and budget.slope_repeats > 1
            return row_slope(model, x, budget.slope_repeats) if enough else None, ""

        (found, what), (rows, _) = (
            (None if numbers is None else Slope(*numbers), said)
            for numbers, said in bench.each(
                lambda number: _plain(*(of_passes, of_rows)[number]()), 2, ("draws", budget.slope_repeats, rows_differ)
            )
        )
    enough = budget.slope_repeats >= _FEWEST_BLOCKS
    return _told(found, what, rows, differ=differ, rows_differ=rows_differ, enough=enough)


def _confirmed(measured: Callable[[], Slope | None], seed: int, stream: str) -> Slope | None:
    """Return what was measured; what would condemn is measured again, on passes of its own, and must show again.

    One diagnosis in a thousand of independent draws looks as if they came again, one in a hundred thousand twice.
    """
    seed_everything(seed, stream)
    found = measured()
    if found is None or found.fits or found.recurs is None:
        return found
    seed_everything(seed, f"{stream}, again")
    again = measured()
    return found if again is None or again.recurs is None or again.recurs <= _CONFIRMS else again


def _plain(slope: Slope | None, said: str) -> tuple[tuple[float, float, float | None] | None, str]:
    return None if slope is None else (slope.value, slope.standard_error, slope.recurs), said


def _told(
    found: Slope | None, what: str, rows: Slope | None, *, differ: bool, rows_differ: bool, enough: bool
) -> Draft:
    """Return the check from what was measured."""
    evidence = {"calls differ": float(differ), "rows differ": float(rows_differ)}
    wrong, notes, not_shown = [], [], ""
    told = ["two calls differ" if differ else "the draws of two calls differ, though their answers do not"]
    if differ and not rows_differ:
        notes.append(f"all rows of a batch share one draw, or seldom show theirs; {SHARED}")
    if rows is not None:
        evidence |= {"slope of rows of a batch": rows.value, "its error, rows of a batch": rows.standard_error}
        falls = f"the variance of K rows of a batch, averaged, falls with slope {rows}"
        if rows.fits:
            told.append(f"{falls} (-1 is independence)")
        else:
            notes.append(f"the rows of a batch share a part of their draws ({falls}, not -1), {SHARED}")
    if not enough:
        not_shown = f"slope_repeats is below {_FEWEST_BLOCKS}, so it is not known whether draws come again"
    elif found is None:
        notes.append("no draw changes an answer or a gradient on these images, so nothing is known of their average")
    else:
        evidence |= {f"slope of {what}": found.value, f"its error, {what}": found.standard_error}
        evidence |= {"p-value of passes that come again": found.recurs or 0.0}
        falls = f"the variance of the {what} averaged over K passes falls with slope {found} (-1 is independence)"
        told.append(falls)
        if not found.fits:
            wrong.append(
                f"{falls}, and passes resemble earlier ones more than in any of {_ORDERS} other orders, new passes as "
                "well: draws come again, so passes are not independent"
            )
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

    Of the margin: the cross-entropy of a confident image is ruled by rare draws, whose variance is ill estimated. None
    where nothing varies, or where the passes are too few for a variance and its error.
    """

    def answers(images: Tensor) -> Tensor:
        return plain_logits(ask(model, images))

    return _slope_of(lambda: input_gradient(answers, margin, x, y), passes)


def value_slope(model: Model, x: Tensor, passes: int) -> Slope | None:
    """Return the same of the logits: what is left to look at where no gradient varies, as in a vote."""
    with torch.no_grad():
        return _slope_of(lambda: checked_logits(model, x), passes)


def _slope_of(one_pass: Callable[[], Tensor], passes: int) -> Slope | None:
    """Return the slope of what ``one_pass`` gives, an (n, ...) in each pass, and whether its passes come again.

    The error is over passes (delete-a-part jackknife), not over images, which may share the draws of a pass.
    """
    blocks = passes // COUNTS[-1]
    if blocks < _FEWEST_BLOCKS:
        return None
    first = one_pass().flatten(1)
    buckets, signs = _sketch(first)
    values = torch.zeros(blocks * COUNTS[-1], len(first), int(buckets.max()) + 1, device=first.device).double()
    for one in values:
        one.index_add_(1, buckets, signs * one_pass().double().flatten(1))
    centred = values - values.mean(dim=0)
    varying = centred.square().sum(dim=(0, 2)) > _NOTHING * values.square().sum(dim=(0, 2))
    if not bool(varying.any()):
        return None
    centred = centred[:, varying]
    slopes = _slopes(centred)
    if slopes is None:
        return None
    edges = np.linspace(0, blocks, min(_PARTS, blocks) + 1).astype(int) * COUNTS[-1]
    left_out = [_slopes(torch.cat([centred[:start], centred[end:]])) for start, end in itertools.pairwise(edges)]
    # Draws may be so rare that without one part none is left: then nobody knows how far off the slope is.
    others = np.array([one.mean() for one in left_out if one is not None])
    scatter = ((others - others.mean()) ** 2).sum() if len(others) == len(left_out) else np.inf
    error = float(((len(left_out) - 1) / len(left_out) * scatter) ** 0.5)
    return Slope(float(slopes.mean()), error, recurrence(centred))


def _sketch(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of D numbers the bucket that it is added to, and its sign: few buckets keep all inner products.

    As they are where they are few; else a count sketch, whose inner products are right in the mean (Charikar 2002).
    """
    count = values.shape[1]
    if count <= _BUCKETS:
        return torch.arange(count, device=values.device), values.new_ones(count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # of its own: the draws of the model are not touched
    buckets = torch.randint(_BUCKETS, (count,), generator=generator)
    signs = torch.randint(2, (count,), generator=generator).double() * 2 - 1
    return buckets.to(values.device), signs.to(values.device)


def _slopes(values: Tensor) -> NDArray[np.float64] | None:
    """Return each image's slope from what its passes gave, (N, n, D)."""
    variances = [values.unflatten(0, (-1, count)).mean(dim=1).var(dim=0).sum(dim=1) for count in COUNTS]
    return _fitted(torch.stack(variances).cpu().numpy())


def recurrence(values: Tensor) -> float:
    """Return how likely passes in any order are to resemble those some lag before as much as these do, (N, n, D).

    Draws that come again do so at some lag: at 1 where one serves several passes, at its length where a pool is run
    through. Passes that are independent, however rare or shared their draws, are as likely in any other order; so the
    largest mean product of passes a lag apart is compared with that of the same passes shuffled. The p-value is exact:
    it rests on no variance, no normal distribution, and on no independence of images.
    """
    each = (values / values.square().sum(dim=(0, 2)).sqrt().unsqueeze(1)).flatten(1)
    generator = torch.Generator().manual_seed(0)
    if each.shape[1] > _DIRECTIONS:
        directions = torch.randn(each.shape[1], _DIRECTIONS, generator=generator, dtype=each.dtype)
        each = each @ directions.to(each.device)
    found = _largest(each.unsqueeze(0))
    beaten = tried = 0
    while tried < _ORDERS and beaten < _ENOUGH:
        orders = torch.stack([torch.randperm(len(each), generator=generator) for _ in range(_TOGETHER)])
        beaten += int((_largest(each[orders.to(each.device)]) >= found * (1 - _NOTHING)).sum())
        tried += _TOGETHER
    return (1 + beaten) / (1 + tried)


def _largest(sequences: Tensor) -> Tensor:
    """Return, of each sequence of passes (B, N, D), the largest sum of products at a lag, over root of their number."""
    passes = sequences.shape[1]
    spectrum = torch.fft.rfft(sequences, n=2 * passes, dim=1).abs().square().sum(dim=2)
    products = torch.fft.irfft(spectrum, n=2 * passes, dim=1)[:, :passes]
    pairs = torch.arange(passes, 0, -1, device=sequences.device)
    return (products / pairs.sqrt())[:, 1 : passes - _FEWEST_PAIRS + 1].amax(dim=1)


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
    slopes = _fitted(np.array(variances).T)
    if slopes is None:
        return None
    # Every image has passes of its own here, so that images are independent.
    error = float(slopes.std(ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else TOLERANCE
    return Slope(float(slopes.mean()), error)


def _fitted(variances: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the slope of each image's log variance, (counts, images), against log K; None where nothing varies."""
    varying = variances[:, variances[0] > 0]
    if varying.shape[1] == 0:
        return None
    # The minimum is for draws that run in a circle, whose average may be constant.
    logs = np.log(np.maximum(varying, _NOTHING * varying[0]))
    slopes: NDArray[np.float64] = np.polyfit(np.log(COUNTS), logs, 1)[0]
    return slopes
