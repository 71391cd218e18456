"""Whether a model is random: the one rule, for attacks and evaluations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from learn2perturb.engine.random import isolated_rng, seed_everything

# Passes over a few images that are compared: several, because rare or shared draws may repeat. Together they cost less
# than one pass over a batch of 256.
_PROBES = 8
_PROBED_IMAGES = 16


@contextlib.contextmanager
def apart(*purpose: int | str) -> Iterator[None]:
    """Draw from a stream of its own, without gradients: what is drawn later does not depend on having asked."""
    with torch.no_grad(), isolated_rng():
        seed_everything(*purpose)
        yield


def passes_differ(logits_of: Callable[[Tensor], Tensor], x: Tensor, seed: int = 0) -> bool:
    """Tell whether passes over the same images differ: exactly on the CPU, beyond rounding elsewhere."""
    # Kernels of accelerators may add in another order each time; that is no noise.
    tolerance = 0.0 if x.device.type == "cpu" else 1e-4
    with apart(seed, "probe"):
        # A copy each time: the model may work on its input in place.
        first, *others = (logits_of(x[:_PROBED_IMAGES].clone()) for _ in range(_PROBES))
        return not all(torch.allclose(other, first, rtol=tolerance, atol=tolerance) for other in others)
