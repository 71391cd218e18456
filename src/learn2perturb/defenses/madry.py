"""Adversarial training as its authors proposed it (Madry et al. 2018): on adversarial examples only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from learn2perturb.defenses.base import Defense
from learn2perturb.defenses.settings import Settings
from learn2perturb.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class Madry(Defense):
    """``min_w E max_{|d| <= eps} CE(f_w(x + d), y)``, the maximum by PGD (eq. 2.1). https://arxiv.org/abs/1706.06083.

    It is ``pgd_at`` with ``alpha`` 0 and ``beta`` 1, which is what its recipes set.
    """

    objectives: ClassVar[tuple[str, ...]] = ("mixed",)

    def check(self, settings: Settings) -> None:
        """Refuse a clean loss beside the adversarial one.

        Raises:
            ConfigError: ``alpha`` is not 0.
        """
        super().check(settings)
        if settings.alpha:
            raise ConfigError(
                f"alpha is {settings.alpha!r}, but Madry's training has no clean loss; set alpha 0, or take 'pgd_at'"
            )
