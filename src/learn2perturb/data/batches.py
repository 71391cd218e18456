"""What a batch is: the protocol of its sources, and the checks that every batch goes through, whoever made it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from learn2perturb.engine.labels import class_numbers
from learn2perturb.errors import InputError

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class BatchSource(Protocol):
    """What training and evaluation read: epochs of batches, each a deterministic function of (seed, epoch)."""

    @property
    def num_examples(self) -> int:
        """Images in an epoch."""
        ...

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the last smaller one included."""
        ...

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width, where known."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, where known."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, ... as (x float32 (N, C, H, W) in [0, 1], y int64 (N,))."""
        ...


def as_pair(item: Any) -> Batch:
    """Return images and labels of one batch, checked: uint8, or float in [0, 1], (N, C, H, W), and int64 (N,).

    Labels may be of any whole type, and a column (N, 1).

    Raises:
        InputError: it is no such pair.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise InputError(
            f"a batch must be a pair (images, labels), but it is a {type(item).__name__}{size}; give the DataLoader a "
            "collate_fn that returns the pair"
        )
    x, y = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in item)
    if not isinstance(x, Tensor) or not isinstance(y, (Tensor, list, tuple)):
        raise InputError(
            f"a batch must be two tensors (images, labels), but it is ({type(x).__name__}, {type(y).__name__})"
        )
    check_pixels(x)
    return x, class_numbers(y, len(x))


def check_pixels(x: Tensor) -> None:
    """Check images: uint8, or float in [0, 1], (N, C, H, W).

    Raises:
        InputError: they are not so.
    """
    shape = tuple(x.shape)
    if x.ndim != 4 or 0 in shape:
        raise InputError(f"images have shape {shape}; they must be (N, C, H, W), none of the sizes 0")
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise InputError(f"images are {x.dtype}; they must be uint8, or float in [0, 1]")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise InputError(
            f"images run from {low:.4g} to {high:.4g}; floats must lie in [0, 1] (normalising is the network's, "
            "whose first layer it is)"
        )


def check_alike(x: Tensor, shape: tuple[int, ...] | None, batch: int) -> tuple[int, ...]:
    """Return the shape of an image of ``x``, which must be ``shape``, that of the batches before.

    Raises:
        InputError: it is another one.
    """
    own = tuple(x.shape[1:])
    if shape is not None and own != shape:
        raise InputError(f"images of batch {batch} are {own} and those before {shape}; make them all one size")
    return own


def check_labels(y: Tensor, classes: int) -> None:
    """Check that labels are classes of the network.

    Raises:
        InputError: one is not.
    """
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"label {wrong} is outside 0..{classes - 1}, the network's classes; check data and network")


def pixels(x: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)
