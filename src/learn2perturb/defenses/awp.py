"""Adversarial weight perturbation (Wu, Xia, Wang 2020): the loss at the worst weights nearby, without moving any.

Adversarial Weight Perturbation Helps Robust Generalization, https://arxiv.org/abs/2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learn2perturb.engine.answers import fitting
from learn2perturb.engine.weights import slots
from learn2perturb.noise import noise_parameters

Model = Callable[[Tensor], Tensor]


def perturbed_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return what is perturbed: trained parameters of at least two dimensions, as in the released code; no noise.

    Norms and biases are left alone, and so is theta: it is the defense's own, not a weight of the network.
    """
    noise = {id(parameter) for parameter in noise_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in noise]


def against_weights(model: nn.Module, gamma: float, loss: Callable[[Model], Tensor]) -> Model:
    """Return ``model`` at ``w + v``, ``v = gamma |w| / |g| g`` for each tensor w, with g the gradient of ``loss`` at w.

    v is a constant, so a gradient taken through the returned callable is the gradient at ``w + v`` and is accumulated
    in ``w.grad``. No weight is ever changed (the sum is put in their place for the length of a pass), so none has to
    be restored. The pass that finds g has noise of its own, and leaves the statistics of BatchNorm as they are.

    A weight that several layers share is one weight, and moves in all of them.
    """
    weights = perturbed_weights(model)
    if not weights:
        return model
    buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
    slopes = torch.autograd.grad(loss(_replaced(model, buffers)), weights, allow_unused=True)
    moved = {}
    for weight, slope in zip(weights, slopes, strict=True):
        if slope is not None:
            length = torch.linalg.vector_norm(slope)
            tiny = torch.finfo(slope.dtype).tiny
            moved[id(weight)] = (
                weight + gamma * torch.linalg.vector_norm(weight.detach()) / length.clamp_min(tiny) * slope
            )
    return _replaced(model, moved)


def _replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Model:
    """Return ``model`` with the tensors of these ids replaced for the length of each pass."""
    # Each place is named once. By the names of its own, functional_call would swap a module that is registered twice
    # two times, and give it the replacement back.
    places = {name: values[id(tensor)] for name, tensor in slots(model) if id(tensor) in values}
    return lambda x: functional_call(model, places, (fitting(model, x),), tie_weights=False)
