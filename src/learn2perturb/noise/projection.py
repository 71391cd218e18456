"""Filters of a convolution that are drawn anew in every pass, beside others that are learned (RPF)."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.errors import ConfigError
from learn2perturb.noise.base import NoiseModule

_TINY = 1e-5  # added to the deviation of a filter, as in the released code


@final
class RandomProjection(NoiseModule):
    """The last ``share`` of the filters are ``N(0, 1 / k^2)``; the others are learned, ``w / std(w) / k`` each.

    Dong, Xu, Adversarial Robustness via Random Projection Filters, CVPR 2023; k is the width of the kernel, std that of
    one filter. What those filters of the weight hold plays no part. With the noise off they are one draw that was made
    when the noise was inserted, so that the network is still the one that was trained.

    Args:
        shape: of the weight, (outputs, inputs, k, k).
        share: of the filters that are random, in (0, 1); at least one is random and one learned.

    Raises:
        ConfigError: share is none.
    """

    kind: ClassVar[str] = "projection"
    settings = ("share",)
    keeps: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, ...], *, share: float = 0.75, place: str = "weight", **others: Any) -> None:
        super().__init__(shape, place=place, **others)
        real = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not real or not 0 < share < 1:
            raise ConfigError(f"share is {share!r}; it must be a number between 0 and 1, such as 0.75")
        self.share = float(share)
        filters = self.shape[0]
        self.random = min(max(round(self.share * filters), 1), filters - 1)
        self.projection: Tensor
        self.register_buffer("projection", torch.randn(self.random, *self.shape[1:]) / self.shape[-1])

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return the learned filters, normalised, and then those of the draw."""
        return self._joined(value, eps[self._learned :] / value.shape[-1])

    def quiet(self, value: Tensor) -> Tensor:
        """Return the learned filters, normalised, and then the fixed draw."""
        return self._joined(value, self.projection)

    @property
    def _learned(self) -> int:
        return self.shape[0] - self.random

    def _joined(self, value: Tensor, random: Tensor) -> Tensor:
        learned = value[: self._learned]
        spread = learned.flatten(1).std(dim=1).view(-1, *[1] * (value.dim() - 1))
        return torch.cat([learned / (spread + _TINY) / value.shape[-1], random.to(value.dtype)])

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return nothing: what is drawn has a fixed scale."""
        return []

    def scale(self) -> tuple[str, Tensor]:
        """Return 1 / k, the standard deviation of what is drawn."""
        return "sigma", torch.tensor(1 / self.shape[-1])

    def extra_repr(self) -> str:
        """Show how many filters are random."""
        return f"{self.place}, {self.random} of {self.shape[0]} filters"
