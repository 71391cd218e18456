"""The least time that the work can take here: what the algorithm needs over what this machine was measured to do.

``seconds = max(FLOPs / matmul rate + draws / generator rate, bytes / copy rate)``. The FLOPs are those of convolutions
and matrix products, counted by torch; bytes are the outputs of these layers and their gradients, each written once and
read once; normalisation, activations, weights, optimisers and the host are free. No program reaches it; the share
that one does reach can be compared between machines and networks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from learn2perturb.cli.bench.timing import synchronize
from learn2perturb.noise import noise_modules

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DRAWS_PER_WORD = 4  # 16 random bits are the least that a normal number with honest tails is made of


@final
@dataclass(frozen=True)
class Work:
    """What an algorithm needs.

    Attributes:
        flops: of convolutions and matrix products; a multiply-add is two.
        values: numbers written to and read from memory.
        draws: random normal numbers.
    """

    flops: float = 0.0
    values: float = 0.0
    draws: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.values + other.values, self.draws + other.draws)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.values * times, self.draws * times)


def one_pass(model: nn.Module, images: Tensor, *, weights: bool) -> Work:
    """Count what a forward and backward pass of one image needs, the average over ``images``.

    ``weights`` says which gradients are wanted: those of the weights, as in training, or that of the images alone, as
    in an attack. Each output of a layer is written and read once on the way forward, its gradient on the way back.
    ``model`` is left with or without gradients as counted.
    """
    outputs = 0

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    model.requires_grad_(weights)
    leaf = images.detach().clone().requires_grad_(not weights)
    handles = [layer.register_forward_hook(after) for layer in model.modules() if isinstance(layer, _LAYERS)]
    try:
        with FlopCounterMode(display=False) as counter:
            model(leaf).sum().backward()  # torch's counter refuses autograd.grad
    finally:
        for handle in handles:
            handle.remove()
    return Work(counter.get_total_flops(), 4 * outputs) * (1 / len(images))


def noise_numbers(model: nn.Module) -> int:
    """Return how many normal numbers the noise of one row takes in one pass, over all sites of ``model``."""
    return sum(math.prod(module.shape) for module in noise_modules(model) if module.where.of_features)


@final
@dataclass(frozen=True)
class Rates:
    """What this machine was measured to do, each at its best of a few short tries.

    Attributes:
        dtype: of the matrix product, and of the values moved.
        flops: a second, in a product of square matrices.
        bytes: a second, read and written by a copy.
        draws: 16-bit random numbers a second, one generator a thread.
    """

    dtype: torch.dtype
    flops: float
    bytes: float
    draws: float

    def roofline(self, work: Work) -> dict[str, Any]:
        """Return the roofline of ``work``, its parts, and what it was computed from."""
        moved = work.values * self.dtype.itemsize
        arithmetic, noise, traffic = work.flops / self.flops, work.draws / self.draws, moved / self.bytes
        return {
            "seconds": max(arithmetic + noise, traffic),
            "arithmetic_seconds": arithmetic,
            "noise_seconds": noise,
            "traffic_seconds": traffic,
            "flops": work.flops,
            "draws": work.draws,
            "bytes": moved,
            "dtype": str(self.dtype).removeprefix("torch."),
            "flops_per_second": self.flops,
            "draws_per_second": self.draws,
            "bytes_per_second": self.bytes,
        }


def _best(call: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    call()
    best = math.inf
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _fill(words: Tensor, generator: torch.Generator) -> Tensor:
    return words.random_(generator=generator)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of ``device``; less than a second."""
    large = device.type == "cuda"
    size = 8192 if large else 1024
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = _best(lambda: a @ b, device)
    source = torch.zeros((1 << 30) if large else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = _best(lambda: target.copy_(source), device)
    parts = 1 if device.type != "cpu" else torch.get_num_threads()
    words = [torch.empty((1 << 26) if large else (1 << 20), dtype=torch.int64, device=device) for _ in range(parts)]
    if parts == 1:
        drawn = _best(lambda: words[0].random_(), device)
    else:
        generators = [torch.Generator().manual_seed(part) for part in range(parts)]
        with ThreadPoolExecutor(parts) as pool:
            drawn = _best(lambda: list(pool.map(_fill, words, generators)), device)
    return Rates(
        dtype,
        flops=2 * size**3 / product,
        bytes=2 * source.numel() / copy,
        draws=_DRAWS_PER_WORD * parts * words[0].numel() / drawn,
    )
