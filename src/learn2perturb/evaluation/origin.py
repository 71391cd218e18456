"""What a record is of: the name and the weights of the network, the step it was trained to, and the images."""

from __future__ import annotations

from typing import Any

from torch import nn

from learn2perturb.data import ImageData
from learn2perturb.engine.identity import ImagesFingerprint, fingerprint_of_weights
from learn2perturb.evaluation.passes import Model


def weights_of(model: Model) -> str | None:
    """Return the hash of the weights; None for a function, whose weights cannot be seen."""
    return fingerprint_of_weights(model) if isinstance(model, nn.Module) else None


def origin(
    model: Model, data: Any, name: str | None, *, weights: str | None, seen: ImagesFingerprint
) -> dict[str, Any]:
    """Return what the metadata of a record say of the network and the images that it is of.

    Args:
        model: the network.
        data: what the images were read from.
        name: of the network, as its user calls it.
        weights: their hash when the work began, see :func:`weights_of`.
        seen: of all images that were used.
    """
    found = {
        "model": name or getattr(model, "registered_name", None) or getattr(model, "__name__", type(model).__name__),
        "data": getattr(data, "name", type(data).__name__),
        "weights": weights,
        "images": seen.hexdigest(),
        # All images of a split, or None: a part of one, or images of the user's own.
        "split": data.whole if isinstance(data, ImageData) and seen.count == len(data) else None,
    }
    step, trained = getattr(model, "trained", (None, None))
    # Weights that have changed since they were loaded are of no step that is known.
    return found | ({"step": step} if step is not None and trained == weights else {})
