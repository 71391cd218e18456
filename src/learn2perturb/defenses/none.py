"""No defense: plain training on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from learn2perturb.defenses.base import Clock, Defense, Losses, mixed_loss, of_clean_images
from learn2perturb.defenses.settings import Settings


@final
@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Cross-entropy on clean images; the row "No defense" of the paper's tables."""

    objectives: ClassVar[tuple[str, ...]] = ()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the clean cross-entropy, whatever adversary the recipe describes."""
        return mixed_loss(model, x, y, clock, of_clean_images(settings))
