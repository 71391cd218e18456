"""The sets of allowed perturbations: for each norm a random start, the steepest step, the projection, the distance.

All functions take images (N, C, H, W), treat every image alone, and leave their arguments unchanged. None of them clips
to [0, 1]: that is the attack's business. ``eps`` and sizes are in [0, 1] pixel scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from learn2perturb.engine.shapes import Images, PerImage


class Norm(ABC):
    """A measure of perturbations."""

    @abstractmethod
    def distance(self, x_adv: Images, x: Images) -> PerImage:
        """Return the norm of ``x_adv - x`` of each image, shape (N,), float64."""


class Ball(Norm):
    """The norm ball of radius ``eps`` around an image."""

    @abstractmethod
    def random(self, x: Images, eps: float) -> Images:
        """Return a perturbation, shaped like ``x``, drawn uniformly from the ball of radius ``eps``."""

    @abstractmethod
    def step(self, gradient: Images, size: float) -> Images:
        """Return the perturbation of norm ``size`` of largest inner product with ``gradient``; 0 where that is 0."""

    @abstractmethod
    def project(self, x_adv: Images, x: Images, eps: float) -> Images:
        """Return the point nearest to ``x_adv`` (in l2) in the ball of radius ``eps`` around ``x``."""


@final
class Linf(Ball):
    """``max_i |d_i| <= eps``."""

    def random(self, x: Images, eps: float) -> Images:
        """Return independent ``U(-eps, eps)`` for every pixel."""
        # Contiguous on purpose: filling channels_last memory with random numbers is several times slower.
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).uniform_(-eps, eps)

    def step(self, gradient: Images, size: float) -> Images:
        """Return ``size sign(gradient)``."""
        return gradient.sign().mul_(size)

    def project(self, x_adv: Images, x: Images, eps: float) -> Images:
        """Return ``x + clip(x_adv - x, -eps, eps)``."""
        return torch.sub(x_adv, x).clamp_(-eps, eps).add_(x)

    def distance(self, x_adv: Images, x: Images) -> PerImage:
        """Return ``max_i |x_adv - x|_i``, shape (N,), float64."""
        return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), torch.inf, dim=1)


@final
class L2(Ball):
    """``sqrt(sum_i d_i^2) <= eps``."""

    def random(self, x: Images, eps: float) -> Images:
        """Return a uniform direction times ``eps U(0, 1)^(1/d)``, d numbers an image."""
        direction = torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_()
        # A radius of U^(1/d) fills the ball evenly: the volume inside radius r grows as r^d.
        radius = torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_().pow_(1 / x[0].numel()).mul_(eps)
        return direction.mul_(_per_image(radius / _norm(direction), x))

    def step(self, gradient: Images, size: float) -> Images:
        """Return ``size gradient / |gradient|_2``."""
        tiny = torch.finfo(gradient.dtype).tiny
        # Scaled by the largest entry first: squares of gradients near 1e-20 would underflow and the attack stand still.
        scaled = gradient / _per_image(gradient.flatten(1).abs().amax(dim=1).clamp_min_(tiny), gradient)
        return scaled.mul_(_per_image(size / _norm(scaled).clamp_min_(tiny), gradient))

    def project(self, x_adv: Images, x: Images, eps: float) -> Images:
        """Return ``x + d min(1, eps / |d|_2)`` with ``d = x_adv - x``."""
        delta = x_adv - x
        tiny = torch.finfo(delta.dtype).tiny
        return delta.mul_(_per_image((eps / _norm(delta).clamp_min_(tiny)).clamp_max_(1.0), x)).add_(x)

    def distance(self, x_adv: Images, x: Images) -> PerImage:
        """Return ``|x_adv - x|_2``, shape (N,), float64."""
        return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), 2, dim=1)


@final
class L0(Norm):
    """The number of places (row, column) at which any channel differs. A gradient does not say which to take."""

    def distance(self, x_adv: Images, x: Images) -> PerImage:
        """Return how many places of each image differ, shape (N,), float64."""
        return (x_adv != x).any(dim=1).flatten(1).sum(dim=1).double()


def _norm(delta: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), 2, dim=1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


BALLS: dict[str, Ball] = {"linf": Linf(), "l2": L2()}
NORMS: dict[str, Norm] = {"l0": L0(), **BALLS}
