"""The Square attack: random search with squares of falling size; reads logits only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.base import Attack, Query
from learn2perturb.attacks.runs import best_of, per_image
from learn2perturb.checks import check_count, check_flag
from learn2perturb.errors import ConfigError

# The share of pixels that a square covers is halved after these queries (of 10,000).
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# The best of many noisy scores is too good to be true, and nothing would beat it again: so a stochastic model's
# incumbents are scored anew, at a tenth of the cost of the search.
_RESCORE_EVERY = 10


@final
@dataclass(frozen=True)
class Square(Attack):
    """Random search: a square of the image gets one new colour offset a query, which stays if the loss is larger.

    Andriushchenko, Croce, Flammarion, Hein, Square Attack, 2020, https://arxiv.org/abs/1912.00049. For l2, a square is
    a bump (algorithm 3) to which the norm of another window goes. Every image has squares of its own. Images of a
    deterministic model drop out once broken; for a stochastic one every score is the mean of ``eot`` fresh passes
    (20 is usual), incumbents are scored anew, and none drops out.

    Attributes:
        queries: scores of an image in a run, the first included.
        p_init: share of the pixels in the first squares.
        rescale: stretch the schedule of sizes, made for 10,000 queries, to ``queries`` (AutoAttack does not).
        restarts: runs; an image keeps the point that fools the model in most of ``eot`` fresh draws, then by margin.
    """

    loss: str = field(default="margin", kw_only=True)
    queries: int = field(default=5000, kw_only=True)
    p_init: float = field(default=0.8, kw_only=True)
    rescale: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)

    needs_gradient: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ("margin", "ce")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)
        check_count("restarts", self.restarts)
        check_flag("rescale", self.rescale)
        if isinstance(self.p_init, bool) or not isinstance(self.p_init, int | float) or not 0 < self.p_init <= 1:
            raise ConfigError(f"p_init must be a share of the pixels in (0, 1], got {self.p_init!r}; 0.8 is usual")

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken: not of a mean over draws."""
        return self.eot == 1

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the best point of all runs; costs about ``restarts * queries * eot`` forward passes, no backward."""
        drop = self.drops and query.deterministic(x)

        def run(left: Tensor) -> tuple[Tensor, Tensor]:
            return self._search(query, x[left], y[left], drop)

        return best_of(query, x, y, [run] * self.restarts, drop=drop, draws=self.eot)

    def _search(self, query: Query, x: Tensor, y: Tensor, drop: bool) -> tuple[Tensor, Tensor]:
        """Return the best point of one run and which images (bool) are broken; all False unless these drop out."""
        found, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        index = torch.arange(len(x), device=x.device)
        best = trial = stripes(x, self.eps) if self.norm == "linf" else bumps(x, self.eps)
        best_loss = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        for number in range(self.queries):
            if number:
                change = recoloured if self.norm == "linf" else redistributed
                trial = change(best, x, self.eps, self._side(number, x))
            values = query.value(trial, y)
            better = values.loss > best_loss
            best, best_loss = torch.where(per_image(better), trial, best), torch.where(better, values.loss, best_loss)
            if drop:
                gone = query.broken(trial, y, values.margin)
                if bool(gone.any()):
                    found[index[gone]] = trial[gone]
                    broken[index[gone]] = True
                    index, x, y, best, best_loss = (part[~gone] for part in (index, x, y, best, best_loss))
                    query.left = len(y)
                    if not len(y):
                        break
            elif number % _RESCORE_EVERY == _RESCORE_EVERY - 1:
                best_loss = query.value(best, y).loss
        found[index] = best
        return found, broken

    def _side(self, number: int, x: Tensor) -> int:
        """Return the side of the squares of query ``number``, in pixels."""
        height, width = x.shape[2:]
        at = number * 10_000 // self.queries if self.rescale else number
        share = self.p_init / 2 ** sum(at > limit for limit in _HALVED_AFTER)
        side = max(round(math.sqrt(share * height * width)), 1)
        if self.norm == "l2":
            side = max(side, 3) | 1  # odd, so that a bump has a centre
        # Smaller than the image where it can be: a square that always covers it whole would leave nothing to choose.
        return max(min(side, height - 1, width - 1), 1)


def stripes(x: Tensor, eps: float) -> Tensor:
    """Return ``x`` with vertical stripes of width 1, each ``+eps`` or ``-eps`` in every channel."""
    return (x + eps * _signs(x, x.shape[1], 1, x.shape[3])).clamp_(0.0, 1.0)


def recoloured(best: Tensor, x: Tensor, eps: float, side: int) -> Tensor:
    """Return ``best`` with one square an image at ``x +- eps``, one sign for each channel: a corner of the ball."""
    height, width = x.shape[2:]
    rows, columns = _window(x, height, side), _window(x, width, side)
    inside = rows.view(-1, 1, height, 1) & columns.view(-1, 1, 1, width)
    return torch.where(inside, (x + eps * _signs(x, x.shape[1], 1, 1)).clamp_(0.0, 1.0), best)


def bumps(x: Tensor, eps: float) -> Tensor:
    """Return ``x`` plus a grid of bumps, five a side, with a random sign in each channel: of l2 norm ``eps``."""
    height, width = x.shape[2:]
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range((height % side) // 2, height - side + 1, side):
        for left in range((width % side) // 2, width - side + 1, side):
            bump = _bump(side, x) * _signs(x, x.shape[1], 1, 1)
            delta[:, :, top : top + side, left : left + side] = bump
    return (x + _scaled(delta, eps)).clamp_(0.0, 1.0)


def redistributed(best: Tensor, x: Tensor, eps: float, side: int) -> Tensor:
    """Return ``best`` with a new bump in one window of each image, paid for with the norm of another window."""
    delta = best - x
    channels, height, width = x.shape[1:]
    new_rows, new_columns = _starts(x, height, side), _starts(x, width, side)
    given = _inside(new_rows, new_columns, side, x)
    taken = _inside(_starts(x, height, side), _starts(x, width, side), side, x)
    total = delta.square().sum(dim=(1, 2, 3), keepdim=True)
    windows = (delta * (given | taken)).square().sum(dim=(1, 2, 3), keepdim=True)
    old = delta * given
    tiny = torch.finfo(x.dtype).tiny
    old = old / old.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(tiny)
    fresh = torch.zeros_like(x)
    span = torch.arange(side, device=x.device)
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    rows, columns = (new_rows + span).unsqueeze(2), (new_columns + span).unsqueeze(1)
    bump = _bump(side, x) * _signs(x, channels, 1, 1)
    fresh[batch, :, rows, columns] = bump.permute(0, 2, 3, 1)
    mixed = fresh + old
    mixed = mixed / mixed.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(tiny)
    budget = ((eps**2 - total).clamp_min(0.0) / channels + windows / channels).sqrt()
    delta = torch.where(given, mixed * budget, torch.where(taken, 0.0, delta))
    return (x + _scaled(delta, eps)).clamp_(0.0, 1.0)


def _bump(side: int, like: Tensor) -> Tensor:
    """Return two pyramids of opposite sign, side by side, of norm 1: (side, side), lying or standing at random."""
    half = side // 2
    parts = [_pyramid(half, side), -_pyramid(side - half, side)] if half else [_pyramid(side, side)]
    bump = torch.cat(parts).to(like)
    bump = bump / bump.norm()
    # As a value, not as a branch: nothing here may wait for the device.
    return torch.where(torch.rand((), device=like.device) > 0.5, bump.T, bump)


def _pyramid(height: int, width: int) -> Tensor:
    """Return rings that rise towards the middle, the ring at distance k from it adding ``1 / (k + 1)^2``."""
    middle_row, middle_column = height // 2, width // 2
    away_rows = (torch.arange(height) - middle_row).abs().view(-1, 1)
    away_columns = (torch.arange(width) - middle_column).abs().view(1, -1)
    ring = torch.maximum(away_rows, away_columns)
    last = max(middle_row, middle_column)
    weights = torch.tensor([1.0 / (k + 1) ** 2 for k in range(last + 1)])
    rising: Tensor = weights.flip(0).cumsum(0).flip(0)[ring]  # the sum of all rings that reach this far
    return rising / rising.norm()


def _signs(x: Tensor, *shape: int) -> Tensor:
    """Return +1 or -1 at random, (N, *shape)."""
    return torch.randint(0, 2, (len(x), *shape), device=x.device).to(x.dtype).mul_(2).sub_(1)


def _starts(x: Tensor, length: int, side: int) -> Tensor:
    """Return where a window of ``side`` starts along an axis of ``length``, (N, 1), uniform."""
    return torch.randint(0, length - side + 1, (len(x), 1), device=x.device)


def _span(starts: Tensor, length: int, side: int) -> Tensor:
    """Return which of ``length`` places are in the window, (N, length)."""
    places = torch.arange(length, device=starts.device)
    return (places >= starts) & (places < starts + side)


def _window(x: Tensor, length: int, side: int) -> Tensor:
    return _span(_starts(x, length, side), length, side)


def _inside(rows: Tensor, columns: Tensor, side: int, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    return _span(rows, height, side).view(-1, 1, height, 1) & _span(columns, width, side).view(-1, 1, 1, width)


def _scaled(delta: Tensor, eps: float) -> Tensor:
    """Return ``delta`` at l2 norm ``eps``."""
    return BALLS["l2"].step(delta, eps)
