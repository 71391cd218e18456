"""Noise on a vector of features whose elements are correlated: ``h + L eps`` (WCA-Net)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.checks import check_choice
from learn2perturb.engine.by_row import draws_by_row
from learn2perturb.noise.base import NoiseModule

VARIANCES = ("anisotropic", "isotropic")


@final
@draws_by_row
class CorrelatedNoise(NoiseModule):
    """``h + L eps`` with L a lower triangular matrix, or a diagonal (Eustratiadis, Gouk, Li, Hospedales 2021).

    Args:
        shape: of one example's features; their last dimension is what L mixes.
        variance: ``anisotropic``, a full L from ``tril(U(0, 1))``; ``isotropic``, ``L = diag(softplus(s))``, s from
            U(0, 1).

    Raises:
        ConfigError: a choice is unknown.
    """

    kind: ClassVar[str] = "correlated"
    settings = ("variance",)

    def __init__(self, shape: tuple[int, ...], *, variance: str = "anisotropic", **place: Any) -> None:
        super().__init__(shape, **place)
        check_choice("variance", variance, VARIANCES)
        self.variance = variance
        width = self.shape[-1]
        first = torch.rand(width, width).tril() if variance == "anisotropic" else torch.rand(width)
        self.factor = nn.Parameter(first)

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return ``h + L eps``."""
        if self.variance == "isotropic":
            return value + (F.softplus(self.factor) * eps).to(value.dtype)
        return value + (eps.to(self.factor.dtype) @ self.factor.T).to(value.dtype)

    def covariance(self) -> Tensor:
        """Return ``L L^T``, with a graph."""
        if self.variance == "isotropic":
            return F.softplus(self.factor).square().diag()
        return self.factor @ self.factor.T

    def scale(self) -> tuple[str, Tensor]:
        """Return the standard deviation of the noise on each feature."""
        return "sigma", self.covariance().diagonal().clamp_min(0.0).sqrt()

    @torch.no_grad()
    def project(self) -> None:
        """Keep L lower triangular, after a step of the optimiser."""
        if self.variance == "anisotropic":
            self.factor.tril_()

    def extra_repr(self) -> str:
        """Show how large L is."""
        return f"{tuple(self.factor.shape)}, {self.variance}, {self.sharing}, place={self.place}"
