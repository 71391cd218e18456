"""Draws that repeat: a model that seeds its noise gives every pass the same, and spoils the draws of whoever asks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.evaluation.passes import Model, checked_logits, passes_differ

SEEDS = "forward() seeds the random generators, or puts back a state of theirs"
HIDDEN = "forward() draws random numbers from a seed of its own (fixed, or made from the images)"
BY_ROW = "the answer depends on the row of the batch that an image stands in, so each row has one fixed draw"
# Of logits, against rounding: rows in another order are summed in another order. Another draw changes far more.
_TOLERANCE = 1e-3


def replayed(model: Model, x: Tensor, seed: int) -> str:
    """Return how the draws of ``model`` (in eval mode) are replayed, or nothing.

    Of noise that torch, numpy or ``random`` draw from their default generators, and of torch's own from any other.
    """
    if seeds_generators(model, x, seed):
        return SEEDS
    if passes_differ(model, x, seed):
        return ""
    if depends_on_row(model, x):
        return BY_ROW
    return HIDDEN if _draws(model, x) else ""


def seeds_generators(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether a pass leaves a default generator in one state, whatever its state was before."""
    left = []
    with torch.no_grad(), isolated_rng():
        for probe in range(2):
            seed_everything(seed, "state", probe)
            checked_logits(model, x)
            left.append(_states(x.device))
    return any(_equal(one, other) for one, other in zip(*left, strict=True))


def depends_on_row(model: Model, x: Tensor) -> bool:
    """Tell whether images get other logits in another order, for a model two passes of which agree.

    Batch statistics do not depend on the order; draws that are replayed for each row do.
    """
    if len(x) < 2:
        return False
    with torch.no_grad():
        logits = checked_logits(model, x)
        moved = checked_logits(model, x.roll(1, dims=0)).roll(-1, dims=0)
    return float((logits - moved).abs().max()) > _TOLERANCE * (1 + float(logits.abs().max()))


def contained(model: Model, x: Tensor, seed: int) -> Model:
    """Return the model, with random generators of its own if it seeds them: attacks draw from the same ones."""
    return Contained(model).eval() if seeds_generators(model, x, seed) else model


@final
class Contained(nn.Module):
    """``model`` with random generators of its own: it may seed them without touching the draws of an attack."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.registered_name = getattr(model, "registered_name", None) or getattr(model, "__name__", "")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K); the default generators are left as they were found."""
        with isolated_rng():
            return self.model(x)


class _Drawing(TorchDispatchMode):
    """Notes whether any operation of torch draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws(model: Model, x: Tensor) -> bool:
    with torch.no_grad(), _Drawing() as mode:
        checked_logits(model, x)
    return mode.drew


def _states(device: torch.device) -> list[Any]:
    """Return the states of the default generators that a model on ``device`` may draw from."""
    states: list[Any] = [torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))
