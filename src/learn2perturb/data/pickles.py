"""Read CIFAR's pickles without trusting them: numbers, strings, lists, dicts and byte arrays, and nothing that runs."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from learn2perturb.errors import DataError


class _PickledDType:
    """Stands in for ``numpy.dtype``: remembers the code it was given."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like: only bytes are read here."""


class _PickledArray:
    """Stands in for an array under construction; numpy's own unpickling never runs on data from outside."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Return the array, uint8 of any shape."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _PickledDType) or dtype.code not in ("u1", "|u1"):
            raise ValueError("an array that is not of dtype uint8")
        if not isinstance(raw, (bytes, bytearray)) or len(raw) != math.prod(shape):
            raise ValueError(f"an array whose bytes do not fill its shape {shape}")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array.state = (1, shape, dtype, order == "F", buffer)
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Python 3 writes bytes into old protocols as text; any other codec is not ours to look up.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("only latin1 bytes are allowed")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _PickledDType,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves a name only by looking it up whole in the table of stand-ins: nothing is imported, no attribute read."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image file needs") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in the pickle ``path``, keys as text, arrays as uint8 numpy arrays; execute nothing.

    Raises:
        DataError: the file cannot be read, is no such dict, or asks for anything but bytes and arrays of bytes.
    """
    try:
        with path.open("rb") as file:
            content = _RestrictedUnpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        return {
            _text(key): value.array() if isinstance(value, _PickledArray) else value for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"cannot read {path}: {error}; remove its folder and fetch the data set again (download=True)"
        ) from error


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
