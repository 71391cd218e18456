"""RNA, random normalisation aggregation (Dong et al. 2022): every BatchNorm is it or a GroupNorm, anew in every pass.

Random Normalization Aggregation for Adversarial Defense, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from learn2perturb.checks import check_count
from learn2perturb.defenses.base import Defense
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import RandomNorm, insert
from learn2perturb.noise.sites import check, probe


@final
@dataclass(frozen=True, kw_only=True)
class RNA(Defense):
    """In each pass every BatchNorm is itself or a GroupNorm of the same features, each by a pick of its own.

    One pick serves a whole pass, so EOT needs passes of its own. With the noise off the network is the one of its
    BatchNorms. Scale and shift of the GroupNorms are learned, with weight decay, like those of the BatchNorms.

    Args:
        channels: for each GroupNorm that can be picked, how many channels make a group (the released code: 1).

    Raises:
        ConfigError: it is no list of numbers.
    """

    channels: Sequence[int] = (1,)

    def __post_init__(self) -> None:
        if not isinstance(self.channels, (list, tuple)) or not self.channels:
            raise ConfigError(f"channels is {self.channels!r}; it must be a list such as [1] or [1, 4]")
        for size in self.channels:
            check_count("a number of channels", size)

    def prepare(self, network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Put GroupNorms beside every BatchNorm that is called, in place.

        Raises:
            SiteError: there is no BatchNorm over images, or one is called more than once in a pass.
            ConfigError: a number of channels does not divide those of a BatchNorm.
        """
        seen = probe(network, input_shape)
        sites = [name for name, call in seen.calls.items() if isinstance(call.module, nn.BatchNorm2d)]
        if not sites:
            raise SiteError("the network has no BatchNorm2d, and RNA picks another in its place; use learn2perturb")
        specs = [
            {
                "kind": RandomNorm.kind, "site": site, "feature_shape": check(site, seen, "output")[0],
                "channels": list(self.channels),
            }
            for site in sites
        ]  # fmt: skip
        return insert(network, specs)
