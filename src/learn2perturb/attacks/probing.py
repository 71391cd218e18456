"""Whether a model is random: the one rule, for attacks and evaluations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from learn2perturb.engine.random import equal_states, generator_states, isolated_rng, seed_everything

# Passes over a few images that are compared: several, because rare or shared draws may repeat. Together they cost less
# than one pass over a batch of 256. A model that is seen to draw from a default generator is asked more often, until an
# answer differs: one draw in ten that matters is missed by 8 passes in nearly half of all cases, by 64 in a thousandth.
_PROBES = 8
_PROBES_OF_A_DRAWING_MODEL = 64
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
        before = generator_states(x.device)
        first = logits_of(x[:_PROBED_IMAGES].clone())
        drew = not all(map(equal_states, before, generator_states(x.device)))
        return any(
            not torch.allclose(logits_of(x[:_PROBED_IMAGES].clone()), first, rtol=tolerance, atol=tolerance)
            for _ in range((_PROBES_OF_A_DRAWING_MODEL if drew else _PROBES) - 1)
        )
