"""What a training leaves behind, and how it is read again: checkpoints, their header, the lock of a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learn2perturb.lazy import lazily

if TYPE_CHECKING:
    from learn2perturb.runs.files import locate
    from learn2perturb.runs.loading import load

__all__ = ["load", "locate"]

__getattr__ = lazily(__name__, {"load": "loading", "locate": "files"})
