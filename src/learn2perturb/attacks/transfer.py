"""Transfer: images crafted on one model, to be tried on another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.query import Model, Query
from learn2perturb.errors import ConfigError


@final
class Source:
    """The model that images are crafted on, by a name that records can hold."""

    def __init__(self, model: Model, name: str | None = None) -> None:
        self.model = model
        self.name = name or getattr(model, "registered_name", None) or type(model).__name__

    def __repr__(self) -> str:
        return self.name


@final
@dataclass(frozen=True)
class Transfer(Attack):
    """Run ``attack`` on ``source`` with its own draws, whatever is attacked: the images do not depend on the target.

    A source with noise keeps it; ``NoiseFree(model)`` of ``learn2perturb.noise`` is a network with its noise off.
    Passes are those of the source.
    Papernot, McDaniel, Goodfellow, Transferability in machine learning, 2016, https://arxiv.org/abs/1605.07277.

    Attributes:
        eps: replaces that of ``attack``; NaN, the default, leaves it. Norm, loss and aim are those of ``attack``.
        attack: how images are crafted.
        source: any callable from images to logits, or a :class:`Source`, which gives it a name.
    """

    eps: float = math.nan
    attack: Attack | None = field(default=None, kw_only=True)
    source: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack) or isinstance(self.attack, Transfer):
            raise ConfigError(f"attack must be a white-box attack such as PGD(eps=8/255), got {self.attack!r}")
        if not isinstance(self.source, Source):
            if not callable(self.source):
                raise ConfigError(f"source must be a model to craft images on, got {self.source!r}; give one")
            self._set("source", Source(self.source))
        if isinstance(self.eps, float) and math.isnan(self.eps):
            self._set("eps", self.attack.eps)
        for name in ("norm", "loss", "targeted"):
            self._set(name, getattr(self.attack, name))
        if self.norm not in self.norms:
            raise ConfigError(f"attack must be of norm {' or '.join(self.norms)}, got norm {self.norm!r}")
        super().__post_init__()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the spec is frozen once it is made

    @property
    def drops(self) -> bool:
        """Whether images leave the attack that crafts them."""
        return self.attack is not None and self.attack.drops

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return what the attack finds on the source; costs no pass of the attacked model."""
        assert self.attack is not None
        # The caller has seeded the generators already; a seed of the inner attack itself stands.
        result = self.attack.resized(self.eps).run(self.source.model, x, y)
        query.forwards += round(result.forward_passes * len(x))
        query.watch.first(result.zero_gradients)
        query.backwards += round(result.backward_passes * len(x))
        return result.x_adv
