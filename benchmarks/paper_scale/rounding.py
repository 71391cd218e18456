"""Large networks made small enough to carry: float32 numbers rounded to fewer bits, in the same file formats.

A number of 24 bits is a float32 whose last byte is zero: relative error at most 2^-16, and that byte costs nothing once
compressed. Momenta are rounded to 16 bits, at most 2^-8: they are sums over some ten steps, and soon replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learn2perturb.runs.checkpoint import read_model, read_resume, resume_bytes, sealed


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Return a float32 tensor with all but the first ``bits`` bits rounded away; others, and NaN, as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    drop = 32 - bits
    words = tensor.contiguous().view(torch.int32)
    # To the nearest, halves away from zero: the sign is a bit of its own, so adding moves the size only.
    near = ((words + (1 << (drop - 1))) & -(1 << drop)).view(torch.float32)
    return torch.where(torch.isfinite(near) & torch.isfinite(tensor), near, tensor)


def rounded_model(path: Path, bits: int) -> bytes:
    """Return a ``.safetensors`` file with its weights rounded, and its header."""
    state, header = read_model(path)
    return sealed({key: rounded(value, bits) for key, value in state.items()}, header)


def rounded_resume(path: Path, weight_bits: int, momentum_bits: int) -> bytes:
    """Return a ``resume.pt`` with the float32 tensors of its optimisers, and any averaged weights, rounded."""

    def walk(value: Any, bits: int) -> Any:
        if isinstance(value, Tensor):
            return rounded(value, bits) if value.numel() > 1 else value
        if isinstance(value, dict):
            return {key: walk(item, momentum_bits if key == "optimizers" else bits) for key, item in value.items()}
        return [walk(item, bits) for item in value] if isinstance(value, list) else value

    return resume_bytes(walk(read_resume(path.parent), weight_bits))
