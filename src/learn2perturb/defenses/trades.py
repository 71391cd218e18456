"""TRADES (Zhang et al. 2019): clean accuracy traded against the stability of the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from learn2perturb.defenses.base import Defense


@final
@dataclass(frozen=True, kw_only=True)
class Trades(Defense):
    """``CE(f(x), y) + trades_beta KL(p(x) || p(x'))``, x' the maximiser of that KL in the ball (eq. 5, algorithm 1).

    The loss is the setting ``objective`` with the value ``trades``, which learned noise can have too: this is it
    without noise. https://arxiv.org/abs/1901.08573.
    """

    objectives: ClassVar[tuple[str, ...]] = ("trades",)
