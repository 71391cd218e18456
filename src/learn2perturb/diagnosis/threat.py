"""Norm and size of a diagnosis where they are not given: those that the network was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learn2perturb.diagnosis.claim import Claim
from learn2perturb.runs.trained import own_eps, own_norm


def threat_of_training(
    settings: Mapping[str, Any], *, norm: str | None = None, eps: float | None = None, claim: Any = None
) -> tuple[str | None, float | None]:
    """Return norm and size to diagnose in; None where the claim says it, or l_inf is what is usual.

    A size is of its norm: that of a training is never used in another. ``settings`` are those of the training.

    Raises:
        ConfigError: the network was not trained in the norm that is asked for, which has no usual size.
    """
    stated = claim if claim is None or isinstance(claim, Claim) else Claim.of(claim)
    said_norm, said_eps = (None, None) if stated is None else (stated.norm, stated.eps)
    if norm is None and said_norm is None and said_eps is None and own_norm(settings) != "linf":
        norm = own_norm(settings)
    sized = eps is not None or said_eps is not None
    return norm, eps if sized else own_eps(settings, norm or said_norm or "linf")
