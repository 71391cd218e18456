"""Where passes run: a device's name, checked before any work is done."""

from __future__ import annotations

import torch

from learn2perturb.engine.ranks import own_card
from learn2perturb.errors import ConfigError


def checked_device(name: str | torch.device) -> torch.device:
    """Return the device called ``name``, such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"device is {name!r}, which is not available here ({reason}); use cpu or cuda") from None
    return device


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA, then MPS, then the CPU. Each of several has one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return own_card(torch.device("cuda"))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return own_card(checked_device(name))
