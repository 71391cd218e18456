"""Going ahead in the random stream of torch's CPU generator, past numbers that another process draws.

torch's generator is a Mersenne Twister that has no way ahead; numpy has the same one, and steps it in half the time
that drawing a normal number takes. The numbers behind are those that torch would have given.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_WORDS = 624
# Where a state of torch's generator says how many words are left, which is next, and what they are.
_LEFT, _NEXT, _KEY = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _WORDS)
# Normal numbers come in blocks, of so many uniform ones each: Box and Muller's formula on eight lanes.
_BLOCK = 16
# Below this many numbers, to hand the state over costs more than to draw them.
_WORTHWHILE = 1 << 15


def fill_between(target: Tensor, before: int, after: int, mean: float = 0.0, std: float = 1.0) -> bool:
    """Fill ``target`` as the middle part of a tensor that ``normal_`` fills, ``before`` and ``after`` being the others.

    Returns False, and nothing is done, where that is not known to give the same numbers, or is no faster.
    """
    known = target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous()
    whole_blocks = not any(count % _BLOCK for count in (before, target.numel(), after))
    if not (known and whole_blocks and target.numel() and before + after >= _WORTHWHILE and _is_as_known()):
        return False
    generator = torch.default_generator
    _pass_over(generator, before)
    target.normal_(mean, std)
    _pass_over(generator, after)
    return True


def _pass_over(generator: torch.Generator, count: int) -> None:
    """Leave out ``count`` words of 32 bits."""
    if not count:
        return
    state = generator.get_state()
    content = state.numpy()
    key = content[_KEY].view(np.uint64)
    left = content[_LEFT].view(np.int32)
    twister = _twister()
    # A list is taken over in a twentieth of the time that an array takes.
    twister.state = {"bit_generator": "MT19937", "state": {"key": key.tolist(), "pos": _WORDS + 1 - int(left[0])}}
    twister.random_raw(count, output=False)
    reached = twister.state["state"]
    key[:] = reached["key"]
    left[0] = _WORDS + 1 - reached["pos"]
    content[_NEXT].view(np.uint64)[0] = reached["pos"]
    generator.set_state(state)


@functools.cache
def _twister() -> np.random.MT19937:
    return np.random.MT19937(0)


@functools.cache
def _is_as_known() -> bool:
    """Try it: another version of torch may keep another state, or make its numbers otherwise."""
    rows = torch.empty(200, _BLOCK)
    try:
        whole, apart = (torch.Generator().manual_seed(17) for _ in range(2))
        rows.normal_(generator=whole)
        _pass_over(apart, 90 * _BLOCK)
        part = torch.empty(60, _BLOCK).normal_(generator=apart)
        _pass_over(apart, 50 * _BLOCK)
        return torch.equal(part, rows[90:150]) and torch.equal(apart.get_state(), whole.get_state())
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
