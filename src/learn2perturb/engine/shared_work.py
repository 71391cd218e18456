"""Work in numbered pieces that several processes share: each does some of them, and all have what came of all."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from learn2perturb.engine.ranks import Ranks

T = TypeVar("T")


def each(work: Callable[[int], T], count: int, ranks: Ranks, device: torch.device) -> list[T]:
    """Return what ``work`` gives for each number below ``count``, in their order, on every process the same.

    Args:
        work: gives tensors, numbers, None, and tuples, lists or dicts of them, which follow from the number alone: it
            seeds what it draws.
        count: pieces of work; this process does every ``ranks.world``-th.
        ranks: the processes that share it.
        device: where the tensors that others have found are to be.
    """
    if ranks.alone:
        return [work(number) for number in range(count)]
    own = {number: work(number) for number in range(ranks.rank, count, ranks.world)}
    found: dict[int, T] = {}
    for content in ranks.gathered(_packed(own)):
        found |= torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return [found[number] for number in range(count)]


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
