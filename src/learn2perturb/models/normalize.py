"""Normalisation as the first layer of a network, so that every input, attack and eps lives in [0, 1] pixel scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
from learn2perturb.errors import ConfigError, InputError, UnknownNameError

# "paper": the constants of the released code, for CIFAR-100 too; its std is the mean of per-image deviations, a common
# slip that belongs to the paper's recipe. The others are the true statistics of the training pixels.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "paper": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@final
@exact_by_row
class Normalize(nn.Module):
    """Map ``x`` (N, C, H, W) to ``(x - mean) / std`` per channel; the constants are buffers outside the state dict.

    Raises:
        ConfigError: ``mean`` and ``std`` are not equally long lists of finite numbers, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = _checked("mean", mean), _checked("std", std)
        if len(mean) != len(std):
            raise ConfigError(f"normalisation has {len(mean)} means and {len(std)} stds; give one of each per channel")
        if min(std) <= 0:
            raise ConfigError(f"normalisation std {tuple(std)} has a value <= 0; every std must be positive")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised batch, same shape as ``x``.

        Raises:
            InputError: ``x`` has another number of channels; broadcasting would silently colour grey images.
        """
        if x.dim() != 4 or x.shape[1] != self.mean.shape[1]:
            raise InputError(
                f"images have shape {tuple(x.shape)}, {x.shape[1] if x.dim() > 1 else 0} channels; this network "
                f"takes (N, C, H, W) with {self.mean.shape[1]}: build it with the input_shape of the data"
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the constants when the network is printed."""
        numbers = ([round(float(v), 4) for v in buffer.flatten()] for buffer in (self.mean, self.std))
        return "mean={}, std={}".format(*numbers)


def normalization_layer(normalization: Any, channels: int) -> nn.Module:
    """Return the layer for ``normalization`` and images of ``channels`` channels.

    ``"paper"`` (for other than 3 channels: mean 0.5, std 0.5), ``"cifar10"``, ``"cifar100"``, ``"centered"`` ([-0.5,
    0.5]: mean 0.5, std 1), ``None`` (identity), or explicit ``(mean, std)``, one number per channel.

    Raises:
        UnknownNameError: a name that is none of these.
        ConfigError: constants that do not fit the channels or are not allowed.
    """
    if normalization is None:
        return nn.Identity()
    if isinstance(normalization, str):
        if normalization == "dataset":
            raise ConfigError(
                "normalization 'dataset' needs the data set's statistics: pass normalization=(data.mean, data.std)"
            )
        if normalization == "centered":
            return Normalize((0.5,) * channels, (1.0,) * channels)
        if normalization not in STATISTICS:
            raise UnknownNameError.of("normalization", normalization, (*STATISTICS, "centered"))
        mean, std = STATISTICS[normalization]
        if normalization == "paper" and channels != len(mean):
            mean, std = (0.5,) * channels, (0.5,) * channels
    else:
        try:
            mean, std = normalization
        except (TypeError, ValueError):
            raise ConfigError(
                f"normalization {normalization!r} is not allowed; give {', '.join(STATISTICS)}, centered, None or "
                "(mean, std)"
            ) from None
    layer = Normalize(mean, std)
    if layer.mean.numel() != channels:
        raise ConfigError(
            f"normalisation {normalization!r} is for {layer.mean.numel()} channels but the input shape has {channels}; "
            "give (mean, std) with one number per channel"
        )
    return layer


def _checked(what: str, values: Sequence[float]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ConfigError(f"normalisation {what} {values!r} is not a list of numbers, one per channel") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"normalisation {what} {values!r} must be finite numbers, one per channel")
    return numbers
