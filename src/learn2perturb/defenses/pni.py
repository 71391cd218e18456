"""PNI, parametric noise injection (He, Rakin, Fan 2019): ``v + alpha * eta`` with ``eta ~ N(0, std(v)^2)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import nn

from learn2perturb.defenses.base import Defense, check_choice
from learn2perturb.defenses.settings import number
from learn2perturb.noise import perturb, perturb_weights
from learn2perturb.noise.base import GRANULARITIES
from learn2perturb.noise.inject import LAYERS

VARIANTS = ("weight", "output", "input")


@final
@dataclass(frozen=True, kw_only=True)
class PNI(Defense):
    """Noise of the size of what it perturbs, with the half-and-half loss; weights and alpha descend it together.

    The standard deviation is that of the whole tensor, detached; alpha is free in sign and has no weight decay. It is
    on at every convolution and linear layer, in training (its adversary included) and in inference.

    Args:
        variant: ``weight`` (PNI-W: one draw for each forward pass, shared by the batch), ``output`` (A-a: what the
            layers give) or ``input`` (A-b: what they take).
        granularity: alpha per ``layer``, ``channel`` or ``element``.
        init: first value of every alpha.
        sites: glob or list of names in place of every convolution and linear layer.

    Raises:
        ConfigError: a value is not allowed.
    """

    variant: str = "weight"
    granularity: str = "layer"
    init: float = 0.25
    sites: list[str] | str | None = None

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("granularity", self.granularity, GRANULARITIES)
        number("init", self.init, 0.0, math.inf)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Insert the noise, in place."""
        if self.variant == "weight":
            return perturb_weights(network, sites=self.sites, granularity=self.granularity, init=self.init)
        sites = self.sites if self.sites is not None else lambda name, layer: isinstance(layer, LAYERS)
        return perturb(
            network, input_shape=input_shape, sites=sites, place=self.variant, granularity=self.granularity,
            init=self.init, minimum=0.0, relative=True,
        )  # fmt: skip
