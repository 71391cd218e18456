"""What every evaluation asks of a model: checked logits, whether its passes differ, where it runs and on what."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from learn2perturb import __version__
from learn2perturb.attacks import probing
from learn2perturb.engine.answers import logits_of
from learn2perturb.engine.devices import checked_device
from learn2perturb.engine.execution import ExecutionMode
from learn2perturb.errors import ConfigError

Model = Callable[[Tensor], Tensor]

PROBABILITIES = (
    "the model's output looks like probabilities (rows >= 0 that sum to 1), but logits are expected: a softmax "
    "inside the model weakens gradients, so that attacks look too weak; return the logits before it"
)
# In the current execution mode: float32 outside of an attack, since evaluations keep out the caller's autocast.
checked_logits = logits_of


def are_probabilities(logits: Tensor) -> bool:
    """Tell whether an output (N, classes) looks like probabilities: rows >= 0 that sum to 1."""
    return bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all())


def classes_of(model: Model, x: Tensor) -> int:
    """Return how many classes ``model`` tells, by its checked logits of the first of ``x``."""
    with torch.no_grad():
        return checked_logits(model, x[:1]).shape[1]


def passes_differ(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether passes over the same images differ, so that the model is random."""
    return probing.passes_differ(lambda images: checked_logits(model, images), x, seed)


def device_of(model: Model, device: str | torch.device | None) -> torch.device:
    """Return where to evaluate: where the model's weights are.

    Raises:
        ConfigError: ``device`` is another place, or there is no such device.
    """
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    asked = None if device is None else checked_device(device)
    if not weights:
        return asked or torch.device("cpu")
    own = weights[0].device
    if asked is not None and (asked.type != own.type or asked.index not in (None, own.index)):
        raise ConfigError(f"the model is on {own}, but device is {device!r}; move it first: model.to({device!r})")
    return own


def circumstances(device: torch.device, mode: ExecutionMode) -> dict[str, Any]:
    """Return versions, the package's first, device, execution mode and hardware, for the metadata of a record."""
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "learn2perturb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "engine": mode.name,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
    }
