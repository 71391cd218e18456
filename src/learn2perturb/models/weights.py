"""Weights of others, from a file of a state dict: read without executing anything, fitted by name, or refused."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from learn2perturb.errors import CheckpointError
from learn2perturb.reading import SAFETENSORS, check_regular, reading, unpacked

# Where training scripts put the state dict of the network, in the order in which they are looked for.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights", "params")
# What wrappers put before every key: DataParallel, torch.compile, Lightning, and a network inside another.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "backbone.", "encoder.")
# Counters that change no answer.
_NO_MATTER = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
_SHOWN = 4


@final
@dataclass(frozen=True)
class Fit:
    """How the tensors of a file fit a network.

    Attributes:
        where: the file.
        matched: how many tensors of the network were found.
        left_out: parts of the keys that were left out, such as ``module.``.
        missing: keys of the network that the file lacks.
        unexpected: keys of the file that the network lacks.
        shapes: what has another shape: key, shape in the file, shape in the network.
        fresh: keys of the last layer that start anew, as the file's are of another number of classes.
    """

    where: str
    matched: int
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.matched} tensors fit"]
        parts += [f"{' and '.join(map(repr, self.left_out))} left out of the keys"] if self.left_out else []
        parts += [f"{_listed(self.missing)} missing"] if self.missing else []
        parts += [f"{_listed(self.unexpected)} unexpected"] if self.unexpected else []
        parts += [f"{key} is {list(there)} there and {list(here)} here" for key, there, here in self.shapes[:_SHOWN]]
        parts += [f"{_listed(self.fresh)} start anew, as the file is of other classes"] if self.fresh else []
        near = self._near()
        return "; ".join([*parts, *([f"near names: {near}"] if near else [])])

    def _near(self) -> str:
        pairs = []
        for key in self.missing[:_SHOWN]:
            close = difflib.get_close_matches(key, self.unexpected, n=1, cutoff=0.7)
            pairs += [f"{close[0]} for {key}"] if close else []
        return ", ".join(pairs)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(map(repr, found[:_SHOWN])) + more


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file; nothing in it is executed.

    A ``.safetensors`` file may be packed by ``xz``, as those of the zoo are.
    A state dict inside another dict (``{"state_dict": ...}``) is found.

    Raises:
        CheckpointError: it is missing, no such file, or holds no state dict.
    """
    path = Path(path)
    what = f"weights {path} cannot be read"
    if not path.is_file():
        with reading(what, "give a file of a state dict: .pt, .pth or .safetensors", CheckpointError):
            check_regular(path)
    if path.name.endswith(SAFETENSORS):
        with reading(what, "give another file", CheckpointError), unpacked(path) as plain:
            return load_file(str(plain))
    with reading(what, "save them again by torch.save(model.state_dict(), FILE)", CheckpointError):
        check_regular(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"weights {path} hold more than tensors (a whole network, or objects of a class), which to load would "
                "run code of the file; save the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from None
    return _state_in(content, str(path))


def _state_in(content: Any, where: str) -> dict[str, Tensor]:
    """Return the state dict in what a file holds."""
    depth = 0
    while isinstance(content, Mapping) and depth < 5:
        inner = next((content[key] for key in _NESTED if _holds_tensors(content.get(key))), None)
        if inner is None:
            break
        content, depth = inner, depth + 1
    if not _holds_tensors(content):
        kinds = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            kinds = f"entries {_listed(map(str, content))}"
        raise CheckpointError(
            f"weights {where} hold {kinds} and no state dict; save it by torch.save(model.state_dict(), FILE), or "
            f"under one of {', '.join(_NESTED)}"
        )
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping):
        return False
    if any(isinstance(item, Tensor) for item in value.values()):
        return True
    return depth > 0 and any(_holds_tensors(value.get(key), depth - 1) for key in _NESTED)


def load_weights(network: nn.Module, path: str | os.PathLike[str], *, new_head: bool = False) -> Fit:
    """Load a file of weights into ``network``, in place; see :func:`fit_weights`."""
    return fit_weights(network, read_state(path), f"weights {path}", new_head=new_head)


def fit_weights(network: nn.Module, state: Mapping[str, Tensor], where: str, *, new_head: bool = False) -> Fit:
    """Load a state dict into ``network``, in place, prefixes of wrappers left out; return how it fits.

    Args:
        network: gets the weights.
        state: key -> tensor.
        where: what the state dict is of, for messages.
        new_head: let the last layer keep its own weights where the file's are of another number of classes.

    Raises:
        CheckpointError: a key is missing, unexpected, or of another shape; the network is as it was.
    """
    own = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    found, left_out = _renamed(dict(state), set(own), [f"{name}." for name, _ in network.named_children()])
    other = {key for key in own if key in found and found[key].shape != own[key].shape}
    fresh = _head(network, other, found, own) if new_head else ()
    shapes = tuple((key, tuple(found[key].shape), tuple(own[key].shape)) for key in sorted(other - set(fresh)))
    missing = tuple(key for key in own if key not in found and not key.endswith(_NO_MATTER))
    unexpected = tuple(key for key in found if key not in own and not key.endswith(_NO_MATTER))
    matched = {key: value for key, value in found.items() if key in own and key not in other}
    fit = Fit(where, len(matched), left_out, missing, unexpected, shapes, tuple(fresh))
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{fit}: that does not fit; build the network that they were trained with, with its number of classes"
        )
    with reading(f"{where} do not fit", "give the weights of this network", CheckpointError):
        network.load_state_dict(own | matched)
    return fit


def _head(network: nn.Module, other: set[str], found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return the keys among ``other`` that are of the last layer and differ in the number of classes alone."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1:]
    keys = {f"{name}.{kind}" for name in last for kind in ("weight", "bias")}
    return sorted(key for key in other & keys if found[key].shape[1:] == own[key].shape[1:])


def _renamed(state: dict[str, Tensor], own: set[str], holders: list[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state with keys as the network has them, as far as prefixes make the difference, and what was cut."""
    cut: list[str] = []
    changes = [(prefix, _without(prefix)) for prefix in _PREFIXES]
    changes += [("._orig_mod", lambda key: key.replace("._orig_mod.", "."))]
    added = {f"before {holder}": _before(holder) for holder in holders}
    changes += added.items()
    best = len(own & set(state))
    waiting: list[str] = []
    current = state
    while changes:
        tried = {name: {change(key): value for key, value in current.items()} for name, change in changes}
        scores = {name: len(own & set(keys)) for name, keys in tried.items() if len(keys) == len(current)}
        name = max(scores, key=lambda one: scores[one], default=None)
        if name is None or scores[name] <= best:
            # Two wrappers, one in the other: cutting the outer one alone matches nothing yet.
            outer = next((p for p in _PREFIXES if p not in waiting and all(k.startswith(p) for k in current)), None)
            if outer is None or not current:
                break
            waiting.append(outer)
            current = tried[outer]
            continue
        cut += [*waiting, name]
        waiting, state, current, best = [], tried[name], tried[name], scores[name]
    return state, tuple(part for part in cut if part not in added)


def _without(prefix: str) -> Callable[[str], str]:
    return lambda key: key.removeprefix(prefix)


def _before(prefix: str) -> Callable[[str], str]:
    return lambda key: prefix + key
