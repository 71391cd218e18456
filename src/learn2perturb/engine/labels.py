"""Class numbers, whatever form labels come in: of any whole type, as a column, or one-hot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn2perturb.errors import InputError


def class_numbers(labels: Any, n: int, *, one_hot: bool = False) -> Tensor:
    """Return ``labels`` of ``n`` images as class numbers (n,) int64.

    ``labels``: a tensor, array or list of whole numbers (n,) or (n, 1) of any type, and with ``one_hot``, as some
    libraries have them, also one-hot rows (n, classes) of any type. Anything else would have to be guessed at.

    Raises:
        InputError: they are none of these, or a class is negative.
    """
    y = _tensor(labels)
    if y.is_complex() or tuple(y.shape[:1]) != (n,) or y.ndim > 2 or 0 in y.shape:
        raise _error(y, n)
    if one_hot and y.ndim == 2 and y.shape[1] > 1:
        return _from_one_hot(y, n)
    if y.is_floating_point() or y.dtype == torch.bool or y.numel() != n:
        raise _error(y, n)
    numbers = y.reshape(n).to(torch.int64)
    lowest = int(numbers.min())
    if lowest < 0:
        raise InputError(f"labels go down to {lowest}; they must be class numbers from 0 on")
    return numbers


def _from_one_hot(y: Tensor, n: int) -> Tensor:
    ones = y == 1
    if not bool((ones.sum(dim=1) == 1).all()) or not bool((ones | (y == 0)).all()):
        raise InputError(
            f"labels of shape {tuple(y.shape)} are not one-hot: a row is not one 1 among zeros; give one class number "
            "an image (y.argmax(dim=1) of soft labels)"
        )
    return ones.to(torch.int64).argmax(dim=1)


def _tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels.detach()
    try:
        array = np.asarray(labels)
        if array.dtype.kind == "u" and array.dtype.itemsize == 8:
            array = array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except (TypeError, ValueError):
        raise InputError(
            f"labels are a {type(labels).__name__} that is no array of numbers; give one class number an image"
        ) from None


def _error(y: Tensor, n: int) -> InputError:
    fix = "; y.argmax(dim=1) makes them so if they are one-hot" if y.ndim == 2 and len(y) == n else ""
    return InputError(
        f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be whole numbers of shape ({n},){fix}"
    )
