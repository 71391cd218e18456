"""What a training leaves behind, and how it is read again: checkpoints, their header, the lock of a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learn2perturb.runs.loading import load, locate

__all__ = ["load", "locate"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the command line knows of runs without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from learn2perturb.runs import loading

    return getattr(loading, name)
