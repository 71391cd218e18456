"""Defenses that hide gradients, or offer wrong ones: their robustness to gradient attacks is not real."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.literature.networks import SIDE


def levels(x: Tensor, count: int) -> Tensor:
    """Round [0, 1] to ``count`` levels: feature squeezing by bit depth (Xu, Evans, Qi 2018).

    False: rounding has a derivative of zero; through the straight-through estimator nearly all falls.
    """
    return torch.round(x * (count - 1)) / (count - 1)


def thermometer(x: Tensor, count: int = 8) -> Tensor:
    """Encode each pixel by ``count`` steps (N, count, H, W): thermometer code (Buckman et al. 2018).

    False: a step has a derivative of zero; a smooth step in the backward pass breaks it (Athalye et al. 2018).
    """
    edges = torch.arange(count, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) / count
    return (x > edges).to(x.dtype)


def soft_thermometer(x: Tensor, count: int = 8) -> Tensor:
    """Encode as :func:`thermometer` by smooth steps: what its adaptive attack differentiates."""
    edges = torch.arange(count, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) / count
    return torch.sigmoid((x - edges) * 2 * count)


def _cosines() -> Tensor:
    position = torch.arange(SIDE, dtype=torch.float32)
    matrix = torch.cos(math.pi / SIDE * (position + 0.5) * position.view(-1, 1)) * (2 / SIDE) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def jpeg(x: Tensor) -> Tensor:
    """Round the coefficients of the 8 x 8 cosine transform, coarser at high frequencies (Dziugaite 2016, Guo 2018).

    False: rounding has a derivative of zero; the transform taken for the identity breaks it.
    """
    cosines = _cosines().to(x)
    frequency = torch.arange(SIDE, device=x.device)
    step = 0.15 * (1 + 0.4 * (frequency.view(-1, 1) + frequency))
    coefficients = cosines @ x @ cosines.T
    return (cosines.T @ (torch.round(coefficients / step) * step) @ cosines).clamp(0, 1)


class KWTA(nn.Module):
    """Keep the ``share`` largest activations of a layer: k-winners-take-all (Xiao, Zhong, Zheng 2020).

    False: the function jumps everywhere, so its local gradient says nothing of the neighbourhood; averaged or
    gradient-free estimates break it (Tramer et al. 2020).
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, round(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Scaled(nn.Module):
    """Multiply the logits: a softmax of huge logits is constant in float32, and so is its cross-entropy.

    Papernot et al. 2016 trains at temperature T and answers at 1, which multiplies by T. False: a loss on logits sees
    through it (Carlini, Wagner 2017).
    """

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.network(x)


def saturating(x: Tensor) -> Tensor:
    """Activate by a steep sigmoid: biologically inspired saturation (Nayebi, Ganguli 2017).

    False: derivatives vanish in float32 (Brendel, Bethge 2017).
    """
    return torch.sigmoid(60 * x)


def median(x: Tensor) -> Tensor:
    """Smooth by the median of 3 x 3 (Xu, Evans, Qi 2018), in another library: no gradient.

    False: it differs little from the identity.
    """
    padded = F.pad(x.detach(), (1, 1, 1, 1), mode="reflect")
    windows = F.unfold(padded, 3).view(len(x), 9, -1)
    return windows.median(dim=1).values.view_as(x)


def total_variation(x: Tensor) -> Tensor:
    """Return the image of least total variation near each image (Guo et al. 2018), found by an optimiser of its own.

    False: no gradient comes through the optimiser, yet the result is near the image.
    """
    with torch.enable_grad():
        found = x.detach().clone().requires_grad_()
        for _ in range(8):
            across = (found.diff(dim=2).square() + 1e-4).sqrt().sum() + (found.diff(dim=3).square() + 1e-4).sqrt().sum()
            loss = 0.05 * across + (found - x.detach()).square().sum()
            (slope,) = torch.autograd.grad(loss, found)
            found = (found - 0.2 * slope).detach().requires_grad_()
    return found.detach().clamp(0, 1)


class Manifold(nn.Module):
    """Project onto the ``rank`` main directions of the training images (Defense-GAN 2018 with a linear generator).

    False: the released code finds the projection by an optimiser without gradient; the projection is linear.
    """

    def __init__(self, images: Tensor, rank: int = 24) -> None:
        super().__init__()
        flat = images.flatten(1)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("directions", torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:rank])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) - self.mean
        return (self.mean + flat @ self.directions.T @ self.directions).view_as(x)


class Stopped(nn.Module):
    """``transform`` without its gradient: values only."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.transform(x)


class Noisy(torch.autograd.Function):
    """The identity, with noise added to the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        return slope + ctx.size * slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * torch.randn_like(slope), None


def noisy_gradient(x: Tensor, size: float = 5.0) -> Tensor:
    """Answer truly and disturb the gradient (Lee et al. 2019, gradient noise against theft of models).

    False: the values are the undefended network's.
    """
    return Noisy.apply(x, size)


class Decoy(nn.Module):
    """Values of ``network``, gradients of ``shown``: a pass by value with a trap in the backward pass.

    False wherever ``network`` is weaker than an attack along the gradients of ``shown`` finds.
    """

    def __init__(self, network: nn.Module, shown: nn.Module) -> None:
        super().__init__()
        self.network, self.shown = network, shown

    def forward(self, x: Tensor) -> Tensor:
        shown = self.shown(x)
        return shown + (self.network(x) - shown).detach()


class Flattened(nn.Module):
    """A network trained on clean images, with a linear classifier of random weights to differentiate."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(SIDE * SIDE, 10, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


class Labels(nn.Module):
    """The label alone, ten times its one-hot code: a decision without gradient (Brendel et al. 2018 attack it).

    False: what is not said is not protected.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.one_hot(self.network(x).argmax(dim=1), 10).to(x.dtype)


class Binarised(torch.autograd.Function):
    """The sign, with a derivative of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return torch.zeros_like(slopes[0])


def blockwise(x: Tensor) -> Tensor:
    """Average each 2 x 2 block, rounded to four levels: pixel discretisation (Chen et al. 2019).

    False: rounding has a derivative of zero.
    """
    return levels(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), 4)


class Votes(nn.Module):
    """Hard votes of several networks (EMPIR, Sen et al. 2020, and Strauss et al. 2017): counts have no gradient.

    False: the members fall together.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.stack([F.one_hot(member(x).argmax(dim=1), 10) for member in self.members])
        return votes.sum(dim=0).to(x.dtype)


class FakedNoise(nn.Module):
    """Noise on the images whose draws come again (``seeded``: from the image's own pixels, else always the same).

    Robust to nothing: what looks random is a fixed function, or a pass that everybody can repeat.
    """

    def __init__(self, network: nn.Module, size: float, *, seeded: bool) -> None:
        super().__init__()
        self.network, self.size, self.seeded = network, size, seeded

    def forward(self, x: Tensor) -> Tensor:
        seeds = [int((1e6 * image).sum().round()) if self.seeded else 0 for image in x.detach().double()]
        rows = [torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return self.network(x + self.size * torch.stack(rows).to(x))


class PooledNoise(nn.Module):
    """Noise from a pool that is run through again and again: an average over draws soon averages nothing new."""

    def __init__(self, network: nn.Module, size: float, pool: int = 12) -> None:
        super().__init__()
        self.network, self.pass_, self.size = network, 0, size
        self.register_buffer("pool", torch.randn(pool, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        self.pass_ += 1
        return self.network(x + self.size * self.pool[self.pass_ % len(self.pool)])
