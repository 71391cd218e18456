"""Seeds and random streams: every stream is a function of named parts, so that any of them can be replayed alone."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a fixed function of ``parts``, e.g. ``derive_seed(seed, "step", epoch, batch)``.

    A hash, not a sum: neighbouring seeds, epochs and batches give unrelated streams.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(*parts: int | str) -> None:
    """Seed torch's default generators (CPU and every accelerator) from ``parts``."""
    torch.manual_seed(derive_seed(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seed torch, numpy and ``random``; for code of the user (data sets) that may draw from any of them."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def isolated_rng(*, torch_only: bool = False) -> Iterator[None]:
    """Leave torch's (and numpy's and Python's) random state as it was found, also when the body fails."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    others = None if torch_only else (np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if others is not None:
            np.random.set_state(others[0])
            random.setstate(others[1])


def kept_generators() -> dict[str, Any]:
    """Return the states of the default generators as plain values and tensors, for :func:`put_back_generators`."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def put_back_generators(states: dict[str, Any]) -> None:
    """Make the default generators go on from where :func:`kept_generators` has found them."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def generator_states(device: torch.device) -> list[Any]:
    """Return the states of the default generators that code on ``device`` may draw from; see :func:`equal_states`."""
    states: list[Any] = [torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def equal_states(one: Any, other: Any) -> bool:
    """Tell whether two states of one generator are the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))
