"""The Square attack: random search with squares of falling size; reads logits only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.ahead import AheadSearch
from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.proposals import MOVES, STARTS
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import best_of, per_image
from learn2perturb.checks import check_count, check_flag
from learn2perturb.engine import execution
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
    (20 is usual), incumbents are scored anew, and none drops out. Where passes are not ``plain``, a deterministic
    network (no black box, whose every query may cost) is asked about several proposals at once: see ``ahead``.

    Attributes:
        queries: scores of an image in a run that count, the first included.
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

        def run(left: Tensor, _: range) -> tuple[Tensor, Tensor]:
            if drop and execution.current().full_passes and isinstance(query.model, nn.Module):
                sides = [self._side(number, x) for number in range(1, self.queries)]
                return AheadSearch(query, x[left], y[left], self.eps, self.norm, sides).run()
            return self._search(query, x[left], y[left], drop)

        return best_of(query, x, y, run, self.restarts, drop=drop, draws=self.eot)

    def _search(self, query: Query, x: Tensor, y: Tensor, drop: bool) -> tuple[Tensor, Tensor]:
        """Return the best point of one run and which images (bool) are broken; all False unless these drop out."""
        found, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        index = torch.arange(len(x), device=x.device)
        best = trial = STARTS[self.norm](x, self.eps)
        best_loss = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        for number in range(self.queries):
            if number:
                trial = MOVES[self.norm].drawn(x, self._side(number, x)).shown(best, x, self.eps)
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
