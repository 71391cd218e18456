"""The network that a training begins with: built by its name; one of the user's own as it must be to be trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from learn2perturb.engine.modes import in_mode
from learn2perturb.errors import ConfigError, DataError, InputError
from learn2perturb.models import build_model
from learn2perturb.naming import HUB
from learn2perturb.noise import remove_noise
from learn2perturb.runs.loading import load
from learn2perturb.training.config import TrainConfig

_TYPES = (torch.float32, torch.float64)


def named_network(config: TrainConfig, classes: int | None, shape: tuple[int, ...]) -> nn.Module:
    """Return the network that ``config.model`` names, for images of ``shape``; of the hub, without its noise.

    Raises:
        DataError: the data do not say how many classes they have.
        ConfigError: an option says what follows from the data.
    """
    if config.model.startswith(HUB):
        if config.model_options:
            raise ConfigError(f"{config.model} is built already and takes no model_options; leave them out")
        return remove_noise(load(config.model)).train()
    if classes is None:
        raise DataError("the number of classes is not known from these data; give train() your own model")
    for name in ("num_classes", "input_shape"):
        if name in config.model_options:
            raise ConfigError(f"model_options has {name!r}, which follows from the data; leave it out")
    return build_model(config.model, num_classes=classes, input_shape=shape, **config.model_options)


def check_trainable(network: nn.Module) -> None:
    """Refuse weights that no training can go well with.

    Raises:
        InputError: they are half precision, or were made in inference mode.
    """
    for name, parameter in network.named_parameters():
        if parameter.is_inference():
            raise InputError(
                f"{name!r} was made inside torch.inference_mode(), where autograd cannot use it; build or load the "
                "network outside of it"
            )
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype not in _TYPES:
            raise InputError(
                f"{name!r} is {parameter.dtype}, in which small updates of a weight are lost; train in float32: "
                "network.float() (engine 'fast' computes in bfloat16 and keeps the weights in float32)"
            )


def materialise(network: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Give lazy layers (``nn.LazyLinear``) their weights, by one pass over black images.

    Raises:
        InputError: the network does not take images of ``input_shape``.
    """
    if not any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        return
    try:
        with in_mode(network, False), torch.no_grad():
            network(torch.zeros(2, *input_shape))
    except Exception as error:  # a stranger's network may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the network failed on images of shape {input_shape}: {reason}") from error
