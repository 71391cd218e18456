"""What noise is drawn from: zero mean and unit variance, so that theta is a standard deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learn2perturb.engine.draws import standard_normal
from learn2perturb.errors import UnknownNameError

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


_FROM_UNIFORM: dict[str, Transform] = {"laplace": _laplace, "uniform": _uniform}
DISTRIBUTIONS = ("gaussian", *_FROM_UNIFORM)


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
    if name == "gaussian":
        return standard_normal(shape, device, channels_last=channels_last)
    return _FROM_UNIFORM[name](torch.rand(tuple(shape), device=device))


def is_channels_last(tensor: Tensor) -> bool:
    """Tell whether a tensor is laid out as NHWC and in no other way; noise for it is then drawn so too."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def draw_seeded(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Draw on the CPU from a generator of its own, seeded: the same numbers on every machine's every pass."""
    generator = torch.Generator().manual_seed(seed)
    if name == "gaussian":
        return torch.randn(tuple(shape), generator=generator)
    return _FROM_UNIFORM[name](torch.rand(tuple(shape), generator=generator))
