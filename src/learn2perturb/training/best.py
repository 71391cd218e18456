"""The best epoch of a training by what is monitored: its weights, and whether it is long ago."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class BestEpoch:
    """The epoch with the best score so far, the first of equals, and the network's state after it.

    Args:
        keeps: whether the state is kept, and given out in place of the last one.
        patience: epochs without a better score after which a training ends; 0 is never.
    """

    def __init__(self, *, keeps: bool, patience: int) -> None:
        self.keeps, self.patience = keeps, patience
        self.score, self.epoch, self.step = -1.0, -1, 0
        self.values: dict[str, Tensor] = {}

    def look(self, model: nn.Module, score: float, epoch: int, step: int) -> None:
        """Take in the score after an epoch (from 0); ``model`` has the weights that were scored."""
        if score > self.score:
            self.score, self.epoch, self.step = score, epoch, step
            if self.keeps:
                self.values = {key: value.detach().cpu().clone() for key, value in _tensors(model)}

    def ended(self, epochs: int) -> bool:
        """Tell whether, after so many epochs, the best is longer ago than the patience."""
        return bool(self.patience) and self.epoch >= 0 and epochs - 1 - self.epoch >= self.patience

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        """Put the best weights into ``model``, if there are any yet."""
        if self.values:
            for key, value in _tensors(model):
                value.copy_(self.values[key])

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Put the best weights into ``model`` for the body; then every value is again what it was, bit for bit."""
        kept = {key: value.clone() for key, value in _tensors(model)} if self.values else {}
        try:
            self.install(model)
            yield
        finally:
            with torch.no_grad():
                for key, value in _tensors(model) if kept else ():
                    value.copy_(kept[key])

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs, on the CPU."""
        return {"score": self.score, "epoch": self.epoch, "step": self.step, "values": self.values}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.score, self.epoch, self.step = state["score"], state["epoch"], state["step"]
        self.values = dict(state["values"])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in model.state_dict().items() if isinstance(value, Tensor))
