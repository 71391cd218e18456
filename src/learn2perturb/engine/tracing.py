"""What the traces of a forward pass share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among ``values``, also those inside tuples and lists (``cat``, ``stack``, ``unbind``)."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found
