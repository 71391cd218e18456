"""The average of the weights over the steps of a training, kept beside the network that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class WeightAverage:
    """``a <- a + (1 - d_t) (w - a)`` after step t = 1, 2, ..., with ``d_t = min(decay, (1 + t) / (10 + t))``.

    The rising decay is the warm-up: a short training's average is not held back by the random weights that it began
    with. Averaged is every floating-point value of the state dict: weights, theta, and BatchNorm's running statistics,
    so that these belong to the averaged weights and not to the last ones. Counters are copied. Kept in float32 at
    least, whatever the network is kept in.

    Izmailov et al. 2018 average weights so; Rebuffi et al. 2021 find it to help robustness most.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._values = {key: _wide(value) for key, value in _tensors(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step; nothing waits for the device."""
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in _tensors(model):
            own = self._values[key]
            if own.is_floating_point():
                own.lerp_(value.to(own.dtype), share)
            else:
                own.copy_(value)

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        """Put the average into ``model``, in the types that it has."""
        for key, value in _tensors(model):
            value.copy_(self._values[key])

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Put the average into ``model`` for the body; then every value is again what it was, bit for bit."""
        kept = {key: value.clone() for key, value in _tensors(model)}
        try:
            self.install(model)
            yield
        finally:
            with torch.no_grad():
                for key, value in _tensors(model):
                    value.copy_(kept[key])

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs, on the CPU."""
        return {"updates": self.updates, "values": {key: value.cpu() for key, value in self._values.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.updates = state["updates"]
        for key, value in self._values.items():
            value.copy_(state["values"][key])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what can be averaged or copied: a state dict may hold extra state, too."""
    return ((key, value) for key, value in model.state_dict().items() if isinstance(value, Tensor))


def _wide(value: Tensor) -> Tensor:
    value = value.detach()
    wide = value.is_floating_point() and value.dtype.itemsize < torch.float32.itemsize
    return value.float() if wide else value.clone()
