"""What noise is drawn from: zero mean and unit variance, so that theta is a standard deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learn2perturb.engine.draws import standard_normal
from learn2perturb.engine.fused import register_quantiles
from learn2perturb.errors import ConfigError, UnknownNameError

Transform = Callable[[Tensor], Tensor]


def _laplace(u: Tensor) -> Tensor:
    """Map U(0, 1) to Laplace(0, 1/sqrt 2) by the inverse of its distribution function; variance 2 b^2 = 1."""
    centred = u - 0.5
    # 1 - 2|u - 1/2| lies in [0, 1]; at 0 the logarithm is infinite, so the smallest positive float32 step bounds it.
    tail = (1 - 2 * centred.abs()).clamp_min(2.0**-24)
    return -centred.sign() * tail.log() / math.sqrt(2)


def _uniform(u: Tensor) -> Tensor:
    """Map U(0, 1) to U(-sqrt 3, sqrt 3), of variance 1."""
    return (2 * u - 1) * math.sqrt(3)


# What maps U(0, 1) to each distribution; None is the normal one, which has a generator of its own.
DISTRIBUTIONS: dict[str, Transform | None] = {"gaussian": None, "laplace": _laplace, "uniform": _uniform}


def register_distribution(name: str, from_uniform: Transform) -> None:
    """Make a distribution known: ``from_uniform`` maps U(0, 1) to it, element by element, and is increasing.

    Raises:
        ConfigError: the name is taken, or what it gives has not mean 0 and variance 1, within one per cent.
    """
    if name in DISTRIBUTIONS:
        raise ConfigError(f"distribution {name!r} is known already; register it under another name")
    values = from_uniform((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    mean, variance = float(values.mean()), float(values.var(correction=0))
    if not (abs(mean) <= 0.01 and abs(variance - 1) <= 0.01):
        raise ConfigError(
            f"distribution {name!r} has mean {mean:.3g} and variance {variance:.3g}; it must have 0 and 1, so that a "
            "scale is a standard deviation: subtract the mean, divide by the deviation"
        )
    register_quantiles(name, values.numpy())
    DISTRIBUTIONS[name] = from_uniform


def check_distribution(name: str) -> str:
    """Return ``name`` if it is a known distribution.

    Raises:
        UnknownNameError: it is not.
    """
    if name not in DISTRIBUTIONS:
        raise UnknownNameError.of("distribution", name, DISTRIBUTIONS)
    return name


def draw(name: str, shape: Sequence[int], device: torch.device, *, channels_last: bool = False) -> Tensor:
    """Draw float32 numbers of zero mean and unit variance from the default generator of ``device``."""
    transform = DISTRIBUTIONS[name]
    if transform is None:
        return standard_normal(shape, device, channels_last=channels_last)
    return transform(torch.rand(tuple(shape), device=device))


def is_channels_last(tensor: Tensor) -> bool:
    """Tell whether a tensor is laid out as NHWC and in no other way; noise for it is then drawn so too."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def draw_seeded(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draw on the CPU from a generator of its own, seeded: the same numbers on every machine's every pass."""
    generator = torch.Generator().manual_seed(seed)
    transform = DISTRIBUTIONS[name]
    if transform is None:
        return torch.randn(tuple(shape), generator=generator)
    return transform(torch.rand(tuple(shape), generator=generator))
