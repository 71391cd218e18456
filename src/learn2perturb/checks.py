"""Checks of single values that several layers make, so that they are refused in the same words. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from learn2perturb.errors import ConfigError


def check_count(name: str, value: Any, lowest: int = 1, *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least ``lowest``, or None where it is ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"{name} must be a whole number of at least {lowest}, got {value!r}")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is True or False, or None where it is ``optional``."""
    if not (isinstance(value, bool) or (value is None and optional)):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str], *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is among ``allowed``, or None where it is ``optional``."""
    if value not in allowed and not (value is None and optional):
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
