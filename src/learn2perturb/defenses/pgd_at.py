"""PGD adversarial training (Madry et al. 2018), half clean and half adversarial: the paper's "Vanilla"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from learn2perturb.defenses.base import Defense


@final
@dataclass(frozen=True, kw_only=True)
class PGDTraining(Defense):
    """``alpha CE(f(x), y) + beta CE(f(x'), y)``, eq. 11 of Learn2Perturb without noise.

    Madry's own objective is adversarial only: the defense ``madry``, or ``alpha`` 0 and ``beta`` 1 here.
    """
