"""Which data and which network a run is of: two of equal size and shape are still told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from learn2perturb.data import BatchSource
from learn2perturb.engine.identity import fingerprint, fingerprint_of_weights
from learn2perturb.engine.random import isolated_rng, seed_everything

# Items of a user's data set that are looked at: enough to meet any transform, few enough to cost no time.
_SAMPLED = 32
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def identity_of_data(source: BatchSource) -> str:
    """Return a fingerprint of what a training reads.

    Of images in memory: all of them, their labels, and how they are augmented. Of a user's data set or loader: its
    length, and the same 32 items as they come out of its transforms under a fixed seed. Of a stream or a source of the
    user's own, which reading would change: its length, image shape and type.
    """
    inner: Any = source
    while hasattr(inner, "source"):  # what checks, or joins, batches of another
        inner = inner.source
    facts = [type(inner).__name__, inner.num_examples, inner.input_shape, inner.num_classes]
    tensors: list[tuple[str, Tensor]] = []
    if isinstance(getattr(inner, "images", None), Tensor) and isinstance(getattr(inner, "labels", None), Tensor):
        facts += [getattr(inner, "flip", None), getattr(inner, "crop_padding", None)]
        transforms = getattr(inner, "transforms", None)
        facts += [] if transforms is None else [transforms.text]
        tensors = [("images", inner.images), ("labels", inner.labels)]
    elif hasattr(inner, "loader"):
        loader = inner.loader
        facts += [loader.batch_size, loader.drop_last, type(loader.dataset).__name__]
        tensors = _sample(loader.dataset)
    return fingerprint([(_plain(facts), torch.zeros(0)), *tensors])


def _sample(dataset: Any) -> list[tuple[str, Tensor]]:
    """Return tensors that stand for a data set; a stream has none, and neither has one that cannot be indexed."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return []
    found: list[tuple[str, Tensor]] = []
    with isolated_rng():
        try:
            length = len(dataset)
            for number in range(min(length, _SAMPLED)):
                index = number * length // min(length, _SAMPLED)
                seed_everything("identity", index)
                _flatten(dataset[index], str(index), found)
        except Exception:  # whatever a user's data set does, reading it for training will show
            return found
    return found


def _flatten(value: Any, name: str, found: list[tuple[str, Tensor]]) -> None:
    if isinstance(value, Tensor):
        found.append((name, value))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        found.append((f"{name} {value.dtype}", torch.from_numpy(np.ascontiguousarray(value).view(np.uint8).copy())))
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # an image of PIL
        found.append((f"{name} {value.size}", torch.frombuffer(bytearray(value.tobytes() or b"\0"), dtype=torch.uint8)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{name}.{key}", found)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for place, item in enumerate(value):
            _flatten(item, f"{name}.{place}", found)
    else:
        found.append((f"{name} {_plain(value)}", torch.zeros(0)))


def identity_of_network(network: nn.Module) -> dict[str, str]:
    """Return fingerprints of a network before its training: of its structure, and of the weights it starts from."""
    # As printed: layers with their settings. A network that prints where it lies in memory is cut there.
    return {
        "structure": fingerprint([(_ADDRESS.sub("", repr(network)), torch.zeros(0))]),
        "start": fingerprint_of_weights(network),
    }


def _plain(value: Any) -> str:
    return _ADDRESS.sub("", repr(value))
