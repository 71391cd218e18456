"""Standard normal numbers, fast and honest: independent over elements, rows, passes; no pool, no rolling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from learn2perturb.engine import execution, ranks

# Below this many numbers, waking threads costs more than it gains (measured on two cores).
_THREADED_FROM = 1 << 16
_pool: ThreadPoolExecutor | None = None


def _threaded_normal(flat: Tensor, threads: int) -> None:
    """Fill ``flat`` (float32, contiguous, CPU): one generator a thread, each seeded from torch's default generator.

    ``normal_`` runs on one thread and releases the interpreter's lock, so threads scale. Seeds come from the default
    generator, so its state alone still decides every draw, and a resumed run repeats them.
    """
    global _pool
    if _pool is None or _pool._max_workers < threads:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="draws")
    seeds = torch.randint(0, 2**63 - 1, (threads,)).tolist()
    parts = flat.chunk(threads)
    futures = [
        _pool.submit(part.normal_, generator=torch.Generator().manual_seed(seed))
        for part, seed in zip(parts, seeds, strict=False)
    ]
    for future in futures:
        future.result()


def standard_normal(shape: Sequence[int], device: torch.device, *, channels_last: bool = False) -> Tensor:
    """Draw float32 numbers from N(0, 1) out of the default generator of ``device``.

    ``channels_last`` fills memory in order and views it as NHWC: ``randn_like`` on such a tensor is several times
    slower. Compiled for CUDA, the draws are made in the kernel that uses them and never lie in memory.
    """
    if device.type == "cuda" and torch.compiler.is_compiling():
        return torch.randn(tuple(shape), device=device)  # the compiler lays it out, and fuses no normal_()
    last = channels_last and len(shape) == 4
    layout = [shape[0], *shape[2:], shape[1]] if last else list(shape)
    numbers = torch.empty(layout, device=device)
    threads = torch.get_num_threads()
    threaded = execution.current().threaded_draws and device.type == "cpu" and threads > 1
    # On a share of a batch the rows of all of it are drawn, from one stream.
    if threaded and math.prod(shape) >= _THREADED_FROM and ranks.current_share() is None:
        _threaded_normal(numbers.view(-1), threads)
    else:
        numbers.normal_()
    return numbers.permute(0, 3, 1, 2) if last else numbers
