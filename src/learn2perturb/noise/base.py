"""What every noise module has in common: a place, a switch, a replay, its own parameters, a description of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class NoiseModule(nn.Module, ABC):
    """A module that draws noise. Switched by a flag, never by adding or removing hooks: a compiled graph guards on it.

    Attributes:
        kind: its name in descriptions, by which a checkpoint is rebuilt.
        site: name of the submodule it perturbs, fixed at insertion; replayed draws are a function of it.
        enabled: whether noise is applied. On in training and in inference.
        replay: the seed of replayed draws, or None for fresh ones.
    """

    kind: ClassVar[str]

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.enabled = True
        self.replay: int | None = None

    # -- its place --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def path(self) -> str:
        """Its name below the submodule it perturbs."""

    @property
    def moved(self) -> dict[str, str]:
        """State-dict keys of the plain submodule that are others while it is perturbed: ``{plain: now}``."""
        return {}

    @abstractmethod
    def refusal(self, parent: nn.Module) -> str | None:
        """Return why ``parent`` cannot take it, with the mend, or None where it can."""

    @abstractmethod
    def attach(self, parent: nn.Module) -> None:
        """Put it into the submodule that it perturbs."""

    @abstractmethod
    def detach(self, parent: nn.Module) -> None:
        """Take it out again; ``parent`` is then as it was before :meth:`attach`."""

    # -- what it is -------------------------------------------------------------------------------------------------

    @abstractmethod
    def noise_parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters of the noise; nobody selects them by name."""

    @abstractmethod
    def scale(self) -> tuple[str, Tensor]:
        """Return what the noise is scaled by, and how its paper calls it; for the metrics."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what is needed to insert this module again, its switch included, as plain JSON values."""

    @classmethod
    @abstractmethod
    def from_spec(cls, arguments: dict[str, Any]) -> NoiseModule:
        """Return a module of this description, less its kind and switch."""

    def forget(self) -> None:
        """Drop the replayed draws that are kept, if any."""
        return
