"""What a record is of: the name and the weights of the network, the step it was trained to, and the images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from learn2perturb.data import ImageData
from learn2perturb.definitions import code_of, is_installed
from learn2perturb.engine.identity import ImagesFingerprint, fingerprint, fingerprint_of_weights
from learn2perturb.evaluation.passes import Model
from learn2perturb.plugins import file_of, is_ours


def weights_of(model: Model) -> str | None:
    """Return the hash of the weights; None for a function, whose weights cannot be seen."""
    return fingerprint_of_weights(model) if isinstance(model, nn.Module) else None


def identity_of(model: Model) -> tuple[Any, ...] | None:
    """Return all that is seen of what a network answers by, as plain values: None for a function, which shows nothing.

    Its weights, its text, numbers and tensors that its modules hold beside them, and the source of their classes where
    they are none of torch's or of this package.
    """
    if not isinstance(model, nn.Module):
        return None
    held = {name: _held(module) for name, module in model.named_modules()}
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in map(type, model.modules())}
    sources = [_source(kinds[name]) for name in sorted(kinds) if not is_ours(name) and not name.startswith("torch.")]
    return weights_of(model), f"{type(model)} {model}", {name: own for name, own in held.items() if own}, sources


def _source(kind: type) -> tuple[str, Any]:
    """Return the code of a class: of the user's own its definition, of an installed package the whole file."""
    home = kind.__module__
    return kind.__qualname__, file_of(home) if is_installed(home) else code_of(kind)


def _held(module: nn.Module) -> dict[str, Any]:
    """Return the plain values and tensors among the attributes of a module, but for what every module has."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[name] = fingerprint([(name, value)])
        elif name not in _COMMON and _is_plain(value):
            found[name] = value
    return found


_COMMON = set(vars(nn.Module()))


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


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
    step, trained, file = getattr(model, "trained", (None, None, None))
    # Weights that have changed since they were loaded are of no step that is known, and of no file.
    if weights is None or trained != weights:
        return found
    return found | ({} if step is None else {"step": step}) | ({} if file == weights else {"file": file})
