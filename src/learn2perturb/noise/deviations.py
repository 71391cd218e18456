"""How large features are where noise is added to them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import SiteError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.inject import noise_disabled, noise_modules


def feature_deviations(network: nn.Module, x: Tensor) -> dict[NoiseModule, float]:
    """Return, for each noise on features, the standard deviation of those features, noise off, on images (N, C, H, W).

    The network runs in the mode that it is in. Its running statistics and torch's generators are as before.

    Raises:
        SiteError: a site was not reached, or its features are not finite.
    """
    found: dict[NoiseModule, float] = {}
    wanted = [noise for noise in noise_modules(network) if noise.where.of_features]
    buffers = {name: copy.deepcopy(value) for name, value in network.named_buffers()}
    own = {id(noise): noise.perturb for noise in wanted}

    def watching(noise: NoiseModule) -> Any:
        def perturb(value: Tensor) -> Tensor:
            found[noise] = float(value.detach().float().std(unbiased=False))
            return own[id(noise)](value)

        return perturb

    try:
        for noise in wanted:
            noise.perturb = watching(noise)  # type: ignore[method-assign]
        with noise_disabled(network), torch.no_grad(), isolated_rng():
            network(x.clone())
    finally:
        for noise in wanted:
            del noise.perturb
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(buffers[name])
    for noise in wanted:
        if not torch.isfinite(torch.tensor(found.get(noise, float("nan")))):
            raise SiteError(f"the features of {noise.site!r} have no finite size on this batch; give init a number")
    return found
