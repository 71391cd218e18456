"""A short ``repr`` for results that hold images, bits and networks, for notebooks and logs. Knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MOST = 40  # characters of a value


def brief(record: Any) -> str:
    """Return the name of a dataclass with its fields, the large ones by their size; what is empty is left out."""
    values = ((item.name, getattr(record, item.name)) for item in dataclasses.fields(record) if item.repr)
    shown = ", ".join(f"{name}={_short(value)}" for name, value in values if not _empty(value))
    return f"{type(record).__name__}({shown})"


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Mapping, tuple, list)) and not value)


def _short(value: Any) -> str:
    if isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "shape") and not isinstance(value, type):
        sizes = " x ".join(map(str, value.shape)) or "a number"
        return f"<{sizes}>"
    if isinstance(value, (tuple, list, Mapping)):
        text = repr(value) if all(isinstance(one, (str, int, float)) for one in value) else ""
        kind = "entries" if isinstance(value, Mapping) else "items"
        return text if text and len(text) <= MOST else f"<{len(value)} {kind}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST else f"<{type(value).__name__}>"
