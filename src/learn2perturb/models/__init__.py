"""Plain networks, no noise in them; built by name, inputs in [0, 1], normalisation as the first layer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from learn2perturb.errors import ConfigError
from learn2perturb.models.ensemble import RandomEnsemble
from learn2perturb.models.foreign import build_foreign
from learn2perturb.models.normalize import Normalize
from learn2perturb.models.weights import Fit, load_weights
from learn2perturb.naming import network_name
from learn2perturb.registry import MODELS

__all__ = ["Fit", "Normalize", "RandomEnsemble", "build_model", "list_models", "load_weights"]


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    normalization: Any = "paper",
    output: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Build the network ``name``: images (N, C, H, W) in [0, 1] to logits (N, ``num_classes``).

    Args:
        name: a registered network; ``timm:NAME`` or ``torchvision:NAME`` of those libraries, with ``?pretrained`` for
            the weights that they publish; or ``module:function``, a function without arguments that returns yours.
        num_classes: of the logits.
        input_shape: channels, height and width of an image.
        normalization: ``"paper"`` (of another library, what the network was trained with), ``"cifar10"``,
            ``"cifar100"``, ``"centered"``, ``None`` or ``(mean, std)``.
        output: where a foreign network gives several things, which of them is the logits: the key of a dict, the name
            of a field, or the number of an element.
        weights: a file of a state dict (``.pt``, ``.pth``, ``.safetensors``), which must fit.
        options: of the network's builder.

    Its first weights come from torch's global generator, so ``torch.manual_seed`` decides them. The network carries
    ``registered_name`` and ``build_arguments`` (fit for JSON), from which a checkpoint rebuilds it:
    ``build_model(network.registered_name, **network.build_arguments)``; one of the user's own function carries neither,
    since loading a file must not call what the file names.

    Raises:
        UnknownNameError: no network, or no normalisation, of that name.
        ConfigError: an argument that is not allowed.
        MissingDependencyError: the library is not installed.
        CheckpointError: published weights cannot be fetched, or the file of weights cannot be read or does not fit.
    """
    named = network_name(name)
    if named.foreign:
        network = build_foreign(
            named, num_classes, input_shape=input_shape, normalization=normalization, output=output, **options
        )
    else:
        network = _registered(named.name, num_classes, input_shape, normalization, output, options)
    if normalization is not None and not isinstance(normalization, str):
        normalization = [[float(value) for value in values] for values in normalization]
    if named.kind != "function":
        # Plain attributes, not buffers: the state dict stays the network's own.
        network.registered_name = named.text if named.foreign else named.name  # type: ignore[assignment]
        network.build_arguments = {  # type: ignore[assignment]
            "num_classes": num_classes,
            "input_shape": list(input_shape),
            "normalization": normalization,
            **({} if output is None else {"output": output}),
            **options,
        }
    if weights is not None:
        load_weights(network, weights)
    return network


def _registered(
    name: str, num_classes: int, input_shape: Sequence[int], normalization: Any, output: str | None, options: Any
) -> nn.Module:
    """Build a network of the registry."""
    entry = MODELS.entry(name)
    builder = entry.load()
    if output is not None:
        raise ConfigError(f"output is {output!r}, and network {name!r} gives its logits alone; leave it out")
    allowed = set(inspect.signature(builder).parameters) - {"num_classes", "input_shape", "normalization"}
    for option in options:
        if option not in allowed:
            extra = ", ".join(sorted(allowed)) or "none"
            raise ConfigError(f"network {entry.name!r} has no option {option!r}; its options: {extra}")
    network: nn.Module = builder(
        num_classes=num_classes, input_shape=input_shape, normalization=normalization, **entry.arguments | options
    )
    return network


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the registered networks that match the glob ``pattern``."""
    return MODELS.names(pattern)
