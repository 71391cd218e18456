"""RPF, random projection filters (Dong, Xu 2023): most filters of the first convolution are drawn anew in every pass.

Adversarial Robustness via Random Projection Filters, CVPR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from learn2perturb.defenses.base import Defense, Optimizers, Stage, sgd_optimizers
from learn2perturb.defenses.settings import Settings, number
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import RandomProjection, insert, named_noise
from learn2perturb.noise.sites import convolutions, probe


@final
@dataclass(frozen=True, kw_only=True)
class RPF(Defense):
    """``share`` of the first convolution's filters are ``N(0, 1 / k^2)`` anew in every pass, the rest ``w / std / k``.

    One draw serves a whole pass, so EOT needs passes of its own. With the noise off the filters are one fixed draw.

    Args:
        share: of the filters of the first convolution that is called, that are random (48 of 64 in the paper).
        filter_decay: weight decay of the learned ones; that of all else is the setting ``weight_decay``.

    Raises:
        ConfigError: a value is not allowed.
    """

    share: float = 0.75
    filter_decay: float = 1e-2

    def __post_init__(self) -> None:
        number("share", self.share, 0.0, 1.0)
        number("filter_decay", self.filter_decay, 0.0, math.inf)
        if self.share in (0, 1):
            raise ConfigError(f"share is {self.share!r}; some filters must be random and some learned, such as 0.75")

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Make filters of the first convolution random, in place.

        Raises:
            SiteError: there is no convolution, its weight is not its own, or it has fewer than two filters.
        """
        names = convolutions(probe(network, input_shape))
        if not names:
            raise SiteError("the network has no convolution, and RPF draws filters of the first; use learn2perturb")
        first = network.get_submodule(names[0])
        weight = first._parameters.get("weight")
        if weight is None or len(weight) < 2 or getattr(first, "transposed", False):
            raise SiteError(
                f"the first convolution, {names[0]!r}, has no weight of its own with two filters or more; RPF needs one"
            )
        spec = {
            "kind": RandomProjection.kind, "site": names[0], "tensor": "weight", "shape": list(weight.shape),
            "share": self.share,
        }  # fmt: skip
        return insert(network, [spec])

    def stages(self, settings: Settings) -> tuple[Stage, ...]:
        """Return one stage of SGD in which the learned filters have a weight decay of their own."""

        def build(model: nn.Module) -> Optimizers:
            optimizers = sgd_optimizers(settings)(model)
            ((site, noise),) = [pair for pair in named_noise(model) if isinstance(pair[1], RandomProjection)]
            filters = model.get_submodule(site).get_parameter(noise.moved[noise.place])
            (group,) = optimizers["weights"].param_groups
            group["params"] = [parameter for parameter in group["params"] if parameter is not filters]
            if filters.requires_grad:
                optimizers["weights"].add_param_group({"params": [filters], "weight_decay": self.filter_decay})
            return optimizers

        builder: Callable[[nn.Module], Optimizers] = build
        return tuple(replace(stage, optimizers=builder) for stage in super().stages(settings))
