"""What every noise law has in common: a place, a switch, fresh and replayed draws, a description of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_choice
from learn2perturb.engine.random import derive_seed
from learn2perturb.engine.rows import shared_by_all
from learn2perturb.engine.shapes import Features
from learn2perturb.noise.distributions import check_distribution, draw, draw_seeded, is_channels_last
from learn2perturb.noise.places import Place, place_of

GRANULARITIES = ("element", "channel", "layer")
SHARINGS = ("per_example", "per_batch")


def map_shape(shape: tuple[int, ...], granularity: str, channel_dim: int) -> tuple[int, ...]:
    """Return the shape of a scale for values of ``shape`` (no batch dimension)."""
    if granularity == "element":
        return shape
    mapped = [1] * len(shape)
    if granularity == "channel":
        mapped[channel_dim] = shape[channel_dim]
    return tuple(mapped)


class NoiseModule(nn.Module, ABC):
    """A noise law at a place of a network: how a draw perturbs a value, and what scales it.

    A law gives :meth:`noisy` and :meth:`scale`, and names its arguments in ``settings``; the place, the draws and their
    replay, the switch and the description are here. The switch is a flag, never a hook that comes or goes: a compiled
    graph guards on it.

    Attributes:
        kind: its name in descriptions, by which a checkpoint is rebuilt.
        settings: names of the arguments (attributes of equal name) that belong to its description.
        shape: of one example's features, or of the weight.
        site: name of the submodule it perturbs, fixed at insertion; replayed draws are a function of it.
        place: where it acts: ``output`` or ``input`` of the submodule, or the name of one of its parameters.
        enabled: whether noise is applied. On in training and in inference.
        keeps: whether a value is changed with the noise off too, by :meth:`quiet`: part of the law is no noise.
        replay: the seed of replayed draws, or None for fresh ones.

    Args:
        granularity: one scale for each ``element``, ``channel``, or for the whole ``layer``.
        sharing: on features, ``per_example`` draws for each row of a batch, ``per_batch`` once for all; a weight is
            drawn once in a pass.
        distribution: ``gaussian``, ``laplace``, ``uniform`` or a registered one, of unit variance.
        channel_dim: index of the channel dimension in ``shape``.

    Raises:
        ConfigError: a choice is unknown.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    granularity_of_law: ClassVar[str] = "element"
    keeps: ClassVar[bool] = False

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        site: str,
        place: str = "output",
        granularity: str | None = None,
        sharing: str = "per_example",
        distribution: str = "gaussian",
        channel_dim: int = 0,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.site = site
        self.where: Place = place_of(place)
        self.place = place
        self.granularity = self.granularity_of_law if granularity is None else granularity
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("sharing", sharing, SHARINGS)
        self.sharing = sharing
        self.distribution = check_distribution(distribution)
        self.channel_dim = channel_dim
        self.enabled = True
        self.replay: int | None = None
        self._kept: tuple[int, Tensor] | None = None

    # -- the law ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def noisy(self, value: Features, eps: Tensor) -> Features:
        """Return ``value`` perturbed by the draw ``eps`` of zero mean and unit variance, which broadcasts over it."""

    @abstractmethod
    def scale(self) -> tuple[str, Tensor]:
        """Return what the noise is scaled by, and how its paper calls it; for the metrics."""

    def quiet(self, value: Features) -> Features:
        """Return what ``value`` is with the noise off: itself, unless the law ``keeps`` a part of what it does."""
        return value

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters of the noise; nobody selects them by name."""
        return list(self.parameters())

    @torch.no_grad()
    def project(self) -> None:
        """Put the scale back into what is allowed, after a step of the optimiser."""
        return

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of a scale of its granularity."""
        return map_shape(self.shape, self.granularity, self.channel_dim)

    @property
    def draws_by_row(self) -> bool:
        """Whether every row of a batch has a fresh draw of its own, and its scale takes nothing from other rows."""
        return self.where.of_features and self.enabled and self.sharing == "per_example" and self.replay is None

    # -- its draws --------------------------------------------------------------------------------------------------

    def forward(self, value: Features) -> Features:
        """Return a perturbed weight; of features ``value`` itself, since a hook of their submodule calls perturb."""
        return value if self.where.of_features else self.perturb(value)

    def perturb(self, value: Features) -> Features:
        """Return ``value`` with a fresh (or replayed) draw of noise, or what is left of it when switched off.

        Args:
            value: features (N, *shape), or a weight of ``shape``.

        Raises:
            SiteError: the features do not have the shape that this module was made for.
        """
        if not self.enabled:
            return self.quiet(value)
        self.where.check(self, value)
        return self.noisy(value, self.draw(value))

    @torch.no_grad()
    def draw(self, value: Tensor) -> Tensor:
        """Draw eps for ``value``: of features a row for each example or one for all, of a weight its whole shape."""
        rows = self._rows(value)
        if self.replay is not None:
            eps = self._replayed(self.replay, rows, tuple(value.shape[1:] if rows else value.shape))
            return eps.to(value.device) if rows else eps.to(value)
        shape = (rows, *value.shape[1:]) if rows else value.shape
        with shared_by_all(not rows or self.sharing == "per_batch"):
            eps = draw(self.distribution, shape, value.device, channels_last=is_channels_last(value))
        return eps if rows else eps.to(value.dtype)

    def _rows(self, value: Tensor) -> int:
        """Return how many rows are drawn; 0 for a weight, which has none."""
        if not self.where.of_features:
            return 0
        return 1 if self.sharing == "per_batch" else value.shape[0]

    def _replayed(self, seed: int, rows: int, shape: tuple[int, ...]) -> Tensor:
        """Return draws that are a function of seed, site and row (or tensor) alone; kept while the seed is replayed."""
        known = self._kept[1] if self._kept is not None and self._kept[0] == seed else torch.empty(0, *shape)
        if known.shape[1:] != shape:
            known = torch.empty(0, *shape)
        names = list(range(rows)) if rows else [self.place]
        if known.shape[0] < len(names):
            new = [
                draw_seeded(self.distribution, shape, derive_seed(seed, "noise", self.site, name))
                for name in names[known.shape[0] :]
            ]
            known = torch.cat([known, torch.stack(new)])
            self._kept = (seed, known)
        return known[:rows] if rows else known[0]

    def forget(self) -> None:
        """Drop the replayed draws that are kept, if any."""
        self._kept = None

    # -- its place --------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Its name below the submodule it perturbs."""
        return self.where.path

    @property
    def moved(self) -> dict[str, str]:
        """State-dict keys of the plain submodule that are others while it is perturbed: ``{plain: now}``."""
        return self.where.moved

    def refusal(self, parent: nn.Module) -> str | None:
        """Return why ``parent`` cannot take it, with the fix, or None where it can."""
        return self.where.refusal(self, parent)

    def attach(self, parent: nn.Module) -> None:
        """Put it into the submodule that it perturbs."""
        self.where.attach(self, parent)

    def detach(self, parent: nn.Module) -> None:
        """Take it out again; ``parent`` is then as it was before :meth:`attach`."""
        self.where.detach(parent)

    # -- what it is -------------------------------------------------------------------------------------------------

    def spec(self) -> dict[str, Any]:
        """Return what is needed to insert this module again, its switch included, as plain JSON values."""
        own = {name: getattr(self, name) for name in self.settings}
        usual = {
            "granularity": self.granularity_of_law, "sharing": "per_example", "distribution": "gaussian",
            "channel_dim": 0,
        }  # fmt: skip
        unusual = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return (
            {"kind": self.kind, "site": self.site}
            | self.where.described(self.shape)
            | unusual
            | own
            | {"enabled": self.enabled}
        )

    @classmethod
    def from_spec(cls, arguments: dict[str, Any]) -> Self:
        """Return a module of this description, less its kind and switch."""
        arguments = dict(arguments)
        shape = arguments.pop("feature_shape", None) or arguments.pop("shape", ())
        place = arguments.pop("tensor", None) or arguments.pop("place", "output")
        return cls(tuple(shape), place=place, **arguments)
