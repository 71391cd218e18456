"""Fingerprints: the same text for the same weights or the same images, on any device, in any process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.digests import BYTES, digest


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits that follow from the names, types, shapes and values of tensors, in their order.

    Strides and devices do not count: a network laid out as channels_last has the fingerprint it had before.
    """
    on_cpu = ((name, tensor.detach().cpu().contiguous()) for name, tensor in named)
    return digest((name, str(one.dtype), tuple(one.shape), _bytes(one)) for name, one in on_cpu)


def _bytes(values: Tensor) -> Any:
    return values.reshape(-1).view(torch.uint8).numpy().data


def fingerprint_of_weights(network: nn.Module) -> str:
    """Return the fingerprint of the tensors of ``network.state_dict()``: weights, noise scales, running statistics."""
    return fingerprint_of_state(network.state_dict())


def fingerprint_of_state(state: Mapping[str, Any]) -> str:
    """Return the fingerprint of the tensors of a state dict, that of the network it is loaded into."""
    return fingerprint((name, state[name]) for name in sorted(state) if isinstance(state[name], Tensor))


def fingerprint_of_images(images: Tensor, labels: Tensor) -> str:
    """Return the fingerprint of images (N, C, H, W) with their labels (N,)."""
    return fingerprint([("images", images), ("labels", labels)])


@final
class ImagesFingerprint:
    """The fingerprint of images that come in batches; how they are cut into batches does not count."""

    def __init__(self) -> None:
        self.count = 0
        self._images, self._labels = (hashlib.blake2b(digest_size=BYTES) for _ in range(2))

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Take a batch (N, C, H, W) with its labels (N,)."""
        self.count += len(labels)
        for image in images.detach().cpu().contiguous():
            self._images.update(f"{image.dtype}\x1f{tuple(image.shape)}\x1e".encode())
            self._images.update(_bytes(image))
        self._labels.update(labels.detach().cpu().long().contiguous().numpy().data)

    def hexdigest(self) -> str:
        """Return 16 hexadecimal digits for all that was taken."""
        both = self._images.digest() + self._labels.digest()
        return hashlib.blake2b(both, digest_size=BYTES).hexdigest()
