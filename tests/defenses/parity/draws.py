"""What the transcriptions of defenses share: every draw of ours, in order, so that they can use the same."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from learn2perturb.noise import base


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that every fresh draw of a noise module is appended to."""
    found: list[Tensor] = []
    draw = base.draw

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        eps = draw(*args, **kwargs)
        found.append(eps.clone())
        return eps

    monkeypatch.setattr(base, "draw", noted)
    return found
