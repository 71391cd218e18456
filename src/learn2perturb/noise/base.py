"""What every noise module has in common: a switch, a replay, its own parameters, and a description of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class NoiseModule(nn.Module, ABC):
    """A module that draws noise. Switched by a flag, never by adding or removing hooks: a compiled graph guards on it.

    Attributes:
        site: name of the submodule it perturbs, fixed at insertion; replayed draws are a function of it.
        enabled: whether noise is applied. On in training and in inference.
        replay: the seed of replayed draws, or None for fresh ones.
    """

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.enabled = True
        self.replay: int | None = None

    @abstractmethod
    def noise_parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters of the noise; nobody selects them by name."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what is needed to insert this module again, its switch included, as plain JSON values."""
