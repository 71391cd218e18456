"""What every evaluation asks of a model: checked logits, whether its passes differ, where it runs and on what."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from learn2perturb.engine.devices import checked_device
from learn2perturb.engine.gears import Gear
from learn2perturb.engine.random import seed_everything
from learn2perturb.errors import ConfigError, InputError

Model = Callable[[Tensor], Tensor]

PROBABILITIES = (
    "the model's output looks like probabilities (rows >= 0 that sum to 1), but logits are expected: a softmax "
    "inside the model weakens gradients, so that attacks look too weak; return the logits before it"
)
# Passes compared to tell whether an unknown model draws noise: several, because a rare draw may repeat once.
_PROBES = 4


def checked_logits(model: Model, x: Tensor) -> Tensor:
    """Return the logits (N, classes) of one pass, float32 at least.

    Raises:
        InputError: the model's output is no finite float tensor of that shape.
    """
    # A copy: a model may work on its input in place, and the next draw must see the same images.
    logits = model(x.clone())
    if not isinstance(logits, Tensor):
        mend = "; return its first element: lambda x: model(x)[0]" if isinstance(logits, (tuple, list)) else ""
        raise InputError(f"the model returned a {type(logits).__name__}, must be logits of shape (N, classes){mend}")
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise InputError(
            f"the model returned shape {tuple(logits.shape)} for {len(x)} images, must be ({len(x)}, classes >= 2)"
        )
    if not logits.is_floating_point():
        raise InputError(f"the model returned {logits.dtype}, must be float logits; return them before the argmax")
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise InputError("the model returned NaN or infinite logits; check its weights and its input scale, [0, 1]")
    return logits if logits.dtype == torch.float64 else logits.float()


def are_probabilities(logits: Tensor) -> bool:
    """Tell whether an output (N, classes) looks like probabilities: rows >= 0 that sum to 1."""
    return bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all())


def passes_differ(model: Model, x: Tensor, seed: int) -> bool:
    """Tell whether passes over the same images differ: exactly on the CPU, beyond rounding elsewhere."""
    # Kernels of accelerators may add in another order each time; that is no noise.
    tolerance = 0.0 if x.device.type == "cpu" else 1e-4
    first: Tensor | None = None
    with torch.no_grad():
        for probe in range(_PROBES):
            seed_everything(seed, "probe", probe)
            logits = checked_logits(model, x)
            if first is None:
                first = logits
            elif not torch.allclose(logits, first, rtol=tolerance, atol=tolerance):
                return True
    return False


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


def circumstances(device: torch.device, gear: Gear) -> dict[str, Any]:
    """Return versions, device, gear and hardware, for the metadata of a record."""
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "engine": gear.name,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
    }
