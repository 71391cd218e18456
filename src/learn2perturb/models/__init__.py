"""Plain networks, no noise in them; built by name, inputs in [0, 1], normalisation as the first layer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from learn2perturb.errors import ConfigError
from learn2perturb.models.ensemble import RandomEnsemble
from learn2perturb.models.normalize import Normalize
from learn2perturb.registry import MODELS

__all__ = ["Normalize", "RandomEnsemble", "build_model", "list_models"]


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    normalization: Any = "paper",
    **options: Any,
) -> nn.Module:
    """Build the registered network ``name``: images (N, C, H, W) in [0, 1] to logits (N, ``num_classes``).

    Its weights come from torch's global generator, so ``torch.manual_seed`` decides them. ``normalization`` is
    ``"paper"``, ``"cifar10"``, ``"cifar100"``, ``"centered"``, ``None`` or ``(mean, std)``; ``options`` go to the
    network's builder. The network carries ``registered_name`` and ``build_arguments`` (fit for JSON), from which a
    checkpoint rebuilds it:
    ``build_model(network.registered_name, **network.build_arguments)``.

    Raises:
        UnknownNameError: no network, or no normalisation, of that name.
        ConfigError: an argument that is not allowed.
    """
    entry = MODELS.entry(name)
    builder = entry.load()
    allowed = set(inspect.signature(builder).parameters) - {"num_classes", "input_shape", "normalization"}
    for option in options:
        if option not in allowed:
            extra = ", ".join(sorted(allowed)) or "none"
            raise ConfigError(f"network {entry.name!r} has no option {option!r}; its options: {extra}")
    arguments = {**entry.arguments, **options}
    network: nn.Module = builder(
        num_classes=num_classes, input_shape=input_shape, normalization=normalization, **arguments
    )
    if normalization is not None and not isinstance(normalization, str):
        normalization = [[float(value) for value in values] for values in normalization]
    # Plain attributes, not buffers: the state dict stays the network's own.
    network.registered_name = entry.name  # type: ignore[assignment]
    network.build_arguments = {  # type: ignore[assignment]
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "normalization": normalization,
        **options,
    }
    return network


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the registered networks that match the glob ``pattern``."""
    return MODELS.names(pattern)
