"""Adversarial weight perturbation (Wu, Xia, Wang 2020): the loss at the worst weights nearby, without moving any.

Adversarial Weight Perturbation Helps Robust Generalization, https://arxiv.org/abs/2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learn2perturb.noise import noise_parameters

Model = Callable[[Tensor], Tensor]


def perturbed_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is perturbed: trained parameters of at least two dimensions, as in the released code; no noise.

    Norms and biases are left alone, and so is theta: it is the defense's own, not a weight of the network.
    """
    noise = {id(parameter) for parameter in noise_parameters(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and id(parameter) not in noise
    }


def against_weights(model: nn.Module, gamma: float, loss: Callable[[Model], Tensor]) -> Model:
    """Return ``model`` at ``w + v``, ``v = gamma |w| / |g| g`` for each tensor w, with g the gradient of ``loss`` at w.

    v is a constant, so a gradient taken through the returned callable is the gradient at ``w + v`` and is accumulated
    in ``w.grad``. No weight is ever changed (the sum is put in their place for the length of a pass), so none has to
    be restored. The pass that finds g has noise of its own, and leaves the statistics of BatchNorm as they are.
    """
    weights = perturbed_weights(model)
    if not weights:
        return model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    slopes = torch.autograd.grad(loss(_replaced(model, buffers)), list(weights.values()), allow_unused=True)
    moved = {}
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        if slope is not None:
            length = torch.linalg.vector_norm(slope)
            tiny = torch.finfo(slope.dtype).tiny
            moved[name] = weight + gamma * torch.linalg.vector_norm(weight.detach()) / length.clamp_min(tiny) * slope
    return _replaced(model, moved)


def _replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Model:
    return lambda x: functional_call(model, dict(values), (x,))
