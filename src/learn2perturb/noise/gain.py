"""Features times random weights whose mean and deviation are learned (CTRW)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.engine.by_row import draws_by_row
from learn2perturb.errors import ConfigError
from learn2perturb.noise.base import NoiseModule


@final
@draws_by_row
class RandomGain(NoiseModule):
    """``v (mu + sigma eps)`` with mu and sigma learned for each element, sigma held above a bound.

    Ma, Dong, Xu, Adversarial Robustness through Random Weight Sampling, NeurIPS 2023. Both start at 1. With the noise
    off it is ``v mu``.

    Args:
        shape: of one example's features, or of the weight.
        least: what every sigma is at least after a step; the paper bounds their sum by 2,048 of 3,072 elements.

    Raises:
        ConfigError: least is no number from 0 to 1, where sigma starts.
    """

    kind: ClassVar[str] = "gain"
    settings = ("least",)
    keeps: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, ...], *, least: float = 2 / 3, **place: Any) -> None:
        super().__init__(shape, **place)
        real = isinstance(least, (int, float)) and not isinstance(least, bool)
        if not real or not 0 <= least <= 1:
            raise ConfigError(f"least is {least!r}; it must be a number between 0 and 1, where sigma starts")
        self.least = float(least)
        self.mu = nn.Parameter(torch.ones(self.scale_shape))
        self.sigma = nn.Parameter(torch.ones(self.scale_shape))

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return ``v (mu + sigma eps)``."""
        return value * (self.mu + self.sigma * eps).to(value.dtype)

    def quiet(self, value: Tensor) -> Tensor:
        """Return ``v mu``."""
        return value * self.mu.to(value.dtype)

    def scale(self) -> tuple[str, Tensor]:
        """Return sigma."""
        return "sigma", self.sigma

    @torch.no_grad()
    def project(self) -> None:
        """Raise what is below the bound, by what the smallest lacks (as the released code does, before each pass)."""
        lacking = (self.least - self.sigma.min()).clamp_min(0.0)
        self.sigma.add_((self.sigma < self.least) * lacking)
