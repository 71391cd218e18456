"""A network with its noise off, as a module of its own: the source of a transfer attack, while the network keeps it."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from learn2perturb.noise.inject import noise_disabled


@final
class NoiseFree(nn.Module):
    """The noise-off twin of ``network``: shares its weights, and switches its noise off for its own passes only.

    ``Transfer(PGD(), source=NoiseFree(model))`` attacks ``model`` with images crafted on its twin.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        name = getattr(network, "registered_name", None) or type(network).__name__
        self.registered_name = f"{name} without noise"

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the logits (N, K) of the network without noise."""
        with noise_disabled(self.network):
            return self.network(x)
