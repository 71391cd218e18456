"""Where the weights of a network lie: under several names, or computed from others before every pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# How a tensor that is computed becomes a parameter again, by what computes it.
_FIXES = {
    "a parametrization": "torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})",
    "a forward pre-hook": (
        "torch.nn.utils.remove_weight_norm(layer), remove_spectral_norm(layer) or prune.remove(layer, {tensor!r})"
    ),
    "a buffer": "layer.{tensor} = torch.nn.Parameter(layer._buffers.pop({tensor!r}))",
}  # fmt: skip


def maker(layer: nn.Module, tensor: str) -> str | None:
    """Return what gives ``layer`` its ``tensor``, if that is no parameter of its own; None also where there is none.

    Old ``weight_norm`` and ``spectral_norm``, and ``prune``, leave a plain attribute that a forward pre-hook computes
    anew; between an update and the next pass it is stale, and what is written into it is lost.
    """
    if parametrize.is_parametrized(layer, tensor):
        return "a parametrization"
    if isinstance(layer._buffers.get(tensor), Tensor):
        return "a buffer"
    return "a forward pre-hook" if isinstance(layer.__dict__.get(tensor), Tensor) else None


def advice(layer: nn.Module, tensor: str) -> str:
    """Return the call that makes ``tensor`` of ``layer`` a parameter again."""
    made = maker(layer, tensor)
    return "" if made is None else _FIXES[made].format(tensor=tensor)


def slots(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every place of a parameter or buffer once: a module under two names once, a shared tensor at each place."""
    for prefix, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def copied(network: nn.Module) -> nn.Module:
    """Return a deep copy; also of a network whose pre-hooks have left computed weights, which ``copy`` refuses."""
    memo: dict[int, Any] = {id(value): value.detach().clone() for _, _, value in _left_behind(network)}
    return copy.deepcopy(network, memo)


def settle(network: nn.Module) -> None:
    """Free ``network`` of the graphs of its last pass, so that it can be copied and saved; values do not change."""
    for module, name, value in list(_left_behind(network)):
        setattr(module, name, value.detach())


def _left_behind(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield module, name, value
