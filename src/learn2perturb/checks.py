"""Checks of single values that several layers make, so that they are refused in the same words. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from learn2perturb.errors import ConfigError

MOST = 2**63 - 1  # of anything that is counted: what 64 bits hold


def check_count(name: str, value: Any, lowest: int = 1, *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least ``lowest``, or None where it is ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
    if value > MOST:
        raise ConfigError(f"{name} must be a whole number of at most {MOST}, got one of {value.bit_length()} bits")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is True or False, or None where it is ``optional``."""
    if not (isinstance(value, bool) or (value is None and optional)):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str], *, optional: bool = False) -> None:
    """Raise ConfigError unless ``value`` is among ``allowed``, or None where it is ``optional``."""
    if not (isinstance(value, str) and value in allowed) and not (value is None and optional):
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def check_size(name: str, value: Any, *, norm: str = "linf", zero: bool = False) -> None:
    """Raise ConfigError unless ``value`` can be a radius or a step: finite, above 0 (or ``zero``), in l_inf <= 1."""
    if isinstance(value, str):
        raise ConfigError(f"{name} must be a number in [0, 1] pixel scale, got {value!r}; write 8/255, without quotes")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number in [0, 1] pixel scale, got {value!r}; write 8/255")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "more than 0"
        raise ConfigError(f"{name} must be finite and {bound}, in [0, 1] pixel scale, got {value!r}; write 8/255")
    if norm == "linf" and value > 1:
        raise ConfigError(
            f"{name}={value!r} is more than a pixel's whole range: {name} is in [0, 1] pixel scale, write 8/255, not 8"
        )


def check_step(name: str, value: Any, eps: float, *, norm: str = "linf") -> None:
    """Raise ConfigError unless ``value`` can be a step in a ball of radius ``eps``: at most its diameter."""
    check_size(name, value, norm=norm)
    if 0 < 2 * eps < value:
        raise ConfigError(
            f"{name}={value!r} is more than twice eps={eps!r}, so every step crosses the whole ball; eps / 4 is usual"
        )


def fitting_step(step: float, eps: float, radius: float) -> float:
    """Return the step for a ball of ``radius``, of one made for ``eps``: the same, in proportion where it is larger."""
    return step if step <= radius or radius == 0 else step * (radius / eps)


def fraction(value: Any) -> float:
    """Return a number written as a number or as a fraction such as ``8/255``.

    Raises:
        ConfigError: it is neither.
    """
    text = str(value).strip()
    try:
        top, slash, bottom = text.partition("/")
        number = float(top) / float(bottom) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{value!r} is not a number; write 0.03 or 8/255") from None
    if not math.isfinite(number):
        raise ConfigError(f"{value!r} is not a finite number; write 0.03 or 8/255")
    return number
