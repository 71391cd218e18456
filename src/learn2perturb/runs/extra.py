"""What modules keep beside tensors (``get_extra_state``), written as plain data: nothing that is loaded executes."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from learn2perturb.errors import ConfigError

_PLAIN = (type(None), bool, int, float, str)


def split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state dict, and the rest as JSON can hold it; tensors within the rest join the first.

    Raises:
        ConfigError: an extra state holds anything but plain data and tensors.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    rest = {key: _encoded(value, key, tensors) for key, value in state.items() if key not in tensors}
    return tensors, rest


def joined(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict that :func:`split` was given.

    Raises:
        ValueError: ``rest`` is not as it was written.
    """
    if not rest:
        return dict(tensors)
    left = dict(tensors)
    try:
        decoded = {key: _decoded(value, left) for key, value in rest.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"extra state is not as it was written ({type(error).__name__})") from None
    return left | decoded


def check_extra_state(network: nn.Module) -> None:
    """Refuse a network whose extra state cannot be saved: before a training, not at its first checkpoint.

    Raises:
        ConfigError: a module's ``get_extra_state`` gives anything but plain data and tensors.
    """
    split(network.state_dict())


def _encoded(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [_encoded(item, key, tensors) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(item, key, tensors) for item in value]}
    if type(value) in (dict, OrderedDict):
        pairs = [[_encoded(name, key, tensors), _encoded(item, key, tensors)] for name, item in value.items()]
        return {"dict": pairs}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Tensor):
        name = f"{key}#{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    raise ConfigError(
        f"{key!r} of the network's state holds a {type(value).__name__}, which a checkpoint cannot: give tensors, "
        "numbers, text, bytes, lists, tuples and dicts of these from get_extra_state()"
    )


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in inner)
    if kind == "dict":
        return {_decoded(name, tensors): _decoded(item, tensors) for name, item in inner}
    if kind == "bytes":
        return base64.b64decode(inner, validate=True)
    if kind == "tensor":
        return tensors.pop(inner)
    raise ValueError(kind)
