"""Draws that repeat: a model that seeds its noise gives every pass the same, and spoils the draws of whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learn2perturb.engine.random import equal_states, generator_states, isolated_rng, seed_everything
from learn2perturb.evaluation.passes import Model, checked_logits, passes_differ

SEEDS = "forward() seeds the random generators, or puts back a state of theirs"
HIDDEN = "forward() draws random numbers from a seed of its own (fixed, or made from the images)"
BY_ROW = "the answer depends on the row of the batch that an image stands in, so each row has one fixed draw"
# Of logits, against rounding: rows in another order are summed in another order. Another draw changes far more.
_TOLERANCE = 1e-3
_PASSES = 64
# Operations whose results do not come again by chance.
_CONTINUOUS = {
    "rand", "rand_like", "randn", "randn_like", "normal", "uniform", "exponential", "cauchy", "log_normal",
    "standard_gamma", "sample_dirichlet", "rrelu_with_noise",
}  # fmt: skip


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
    drawn = _draws(model, x, seed)
    return HIDDEN if drawn.any and not drawn.fresh else ""


def draws_afresh(model: Model, x: Tensor, seed: int = 0) -> bool:
    """Tell whether torch draws other random numbers in each pass of ``model``, whether its answers show them or not."""
    return _draws(model, x, seed).fresh


def draws_anew(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether a model is random: its passes differ, or draw afresh what few images show, as a vote does."""
    return passes_differ(model, x, seed) or draws_afresh(model, x, seed)


def seeds_generators(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether a pass leaves a default generator in one state, whatever its state was before."""
    left = []
    with torch.no_grad(), isolated_rng():
        for probe in range(2):
            seed_everything(seed, "state", probe)
            checked_logits(model, x)
            left.append(generator_states(x.device))
    return any(equal_states(one, other) for one, other in zip(*left, strict=True))


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


def seeds_decide(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether the draws of a pass follow from seeds alone: not from what a generator of the model has drawn."""
    found = []
    with torch.no_grad(), isolated_rng():
        for _ in range(2):
            seed_everything(seed, "decided")
            found.append(checked_logits(model, x.clone()))
    tolerance = 0.0 if x.device.type == "cpu" else 1e-4  # kernels of accelerators may add in another order each time
    return torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance)


def contained(model: Model, x: Tensor, seed: int) -> Model:
    """Return the model, with random generators of its own if it seeds them: attacks draw from the same ones."""
    return Contained(model) if seeds_generators(model, x, seed) else model


@final
class Contained(nn.Module):
    """``model`` with random generators of its own: it may seed them without touching the draws of an attack."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.registered_name = getattr(model, "registered_name", None) or getattr(model, "__name__", "")
        self.training = False  # not by eval(), which would switch the dropouts off that the model draws by

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K); the default generators are left as they were found."""
        with isolated_rng():
            return self.model(x)


@final
@dataclass(frozen=True)
class _Drawn:
    """Whether a pass draws random numbers, and whether another pass draws others."""

    any: bool
    fresh: bool


@final
class _Drawing(TorchDispatchMode):
    """Keeps the random numbers that operations of torch draw: (their operation, what it gave)."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.drawn.append((func.overloadpacket.__name__.strip("_"), first.detach().clone()))
        return result


def _draws(model: Model, x: Tensor, seed: int) -> _Drawn:
    """Compare the random numbers of several passes: an answer that is always the same may still be drawn afresh.

    Numbers from a continuum that come again are replayed. Choices (of one member in a hundred, of what is dropped) may
    come again by chance: they are replayed if all do and the default generators do not move on from pass to pass.
    """
    with torch.no_grad(), isolated_rng():
        seed_everything(seed, "draws")
        first, left = _drawn(model, x), generator_states(x.device)
        same, took = list(range(len(first))), False
        sure = any(name in _CONTINUOUS for name, _ in first)
        for _ in range(_PASSES if first else 0):
            other = _drawn(model, x)
            same = [index for index in same if len(other) > index and torch.equal(other[index][1], first[index][1])]
            took = took or not all(map(equal_states, left, generator_states(x.device)))
            if sure or took or not same:
                break
    if any(first[index][0] in _CONTINUOUS for index in same):
        return _Drawn(any=True, fresh=False)
    return _Drawn(any=bool(first), fresh=took or len(same) < len(first))


def _drawn(model: Model, x: Tensor) -> list[tuple[str, Tensor]]:
    with _Drawing() as mode:
        checked_logits(model, x)
    return mode.drawn
