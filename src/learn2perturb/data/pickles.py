"""Read CIFAR's pickles without trusting them: a small machine of our own, which runs nothing and does bounded work.

Python's unpickler, even when it may import nothing, hashes what a file says it should: a few hundred bytes of tuples in
tuples keep it busy for years, in C, deaf to Ctrl-C. This one knows the opcodes that numbers, strings, lists, dicts and
byte arrays need. Keys are strings, nothing is compared or printed, and what a file may make is bounded by its length;
so the time is too, and Ctrl-C is heard after each opcode.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np

from learn2perturb.data.files import read_whole, reason_of
from learn2perturb.errors import DataError

# CIFAR-100's training file has some 600,000: labels and file names, each put into the memo.
_MOST_STEPS = 3_000_000


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in the pickle ``path``, keys as text, arrays as uint8 numpy arrays; execute nothing.

    Raises:
        DataError: the file cannot be read, is no such dict, or asks for anything but bytes and arrays of bytes.
    """
    try:
        content = _Machine(read_whole(path)).run()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        return {
            _text(key): value.array() if isinstance(value, _PickledArray) else value for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"cannot read {path}: {reason_of(error)}; remove its folder and fetch the data set again (download=True)"
        ) from error


@final
class _PickledDType:
    """Stands in for ``numpy.dtype``: remembers the code it was given; byte order and the like do not matter."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def build(self, state: Any) -> None:
        """Ignore byte order and the like: only bytes are read here."""


@final
class _PickledArray:
    """Stands in for an array under construction; numpy's own unpickling never runs on data from outside."""

    state: Any = None

    def build(self, state: Any) -> None:
        """Take shape, dtype, order and bytes."""
        self.state = state

    def array(self) -> np.ndarray:
        """Return the array, uint8 of any shape."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without its five parts")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _PickledDType) or dtype.code not in ("u1", "|u1"):
            raise ValueError("an array that is not of dtype uint8")
        if not isinstance(shape, tuple) or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array whose shape is no tuple of sizes")
        if not isinstance(raw, (bytes, bytearray)) or len(raw) != math.prod(shape):
            raise ValueError("an array whose bytes do not fill its shape")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran is True else "C")


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array.state = (1, shape, dtype, order == "F" if isinstance(order, str) else False, buffer)
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Python 3 writes bytes into old protocols as text; any other codec is not ours to look up.
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("only latin1 bytes are allowed")
    return text.encode("latin1")


def _bytes(*nothing: Any) -> bytes:
    if nothing:
        raise ValueError("bytes are made of nothing only")
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _PickledDType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _bytes,  # how old protocols write empty bytes
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


@final
class _Machine:
    """Runs one pickle: a stack, the stacks below its marks, a memo, and how many bytes may still be made."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # Each text of a file is encoded once; a file that asks for more wants to fill the memory.
        self._bytes_left = len(content)

    def run(self) -> Any:
        """Return what the pickle makes.

        Raises:
            ValueError, IndexError: it is damaged, or asks for something that no image file needs.
        """
        for step, (opcode, argument, _) in enumerate(pickletools.genops(self._content)):
            if step >= _MOST_STEPS:
                raise ValueError(f"it has more than {_MOST_STEPS} steps")
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _LITERALS:
                self._stack.append(_LITERALS[name](argument))
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise ValueError(f"it has the opcode {name}, which no image file needs")
        raise ValueError("it ends before its end")

    # -- actions ----------------------------------------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def pop_mark(self, _: Any) -> None:
        self._since_mark()

    def put(self, slot: Any) -> None:
        self._memo[slot] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, slot: Any) -> None:
        if slot not in self._memo:
            raise ValueError(f"it asks for memo {slot}, which is empty")
        self._stack.append(self._memo[slot])

    def list_of(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def tuple_of(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def tuple_of_last(self, n: int) -> None:
        if len(self._stack) < n:
            raise ValueError("a tuple of more than there is")
        items = tuple(self._stack[-n:])
        self._stack[-n:] = [items]

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("it appends to what is no list")
        self._stack[-1].extend(items)

    def dict_of(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._fill(items)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._fill([key, value])

    def set_items(self, _: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes)):
                raise ValueError(f"a key is a {type(key).__name__}, not a text")
            target[key] = value

    def find(self, names: Any) -> None:
        module, _, name = str(names).partition(" ")
        self._find(module, name)

    def find_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._find(module, name)

    def _find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _ALLOWED:
            what = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a thing without a name"
            raise ValueError(f"it asks for {what[:80]}, which no image file needs")
        self._stack.append(_ALLOWED[module, name])

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple) or not any(function is known for known in _ALLOWED.values()):
            raise ValueError("it calls what is no function of a file of images")
        if function is _encode and arguments and isinstance(arguments[0], str):
            self._bytes_left -= len(arguments[0])
            if self._bytes_left < 0:
                raise ValueError("it makes more bytes than it has")
        if function is None:
            raise ValueError("it calls numpy.ndarray itself, which no image file needs")
        self._stack.append(function(*arguments))

    def build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, (_PickledArray, _PickledDType)):
            raise ValueError("it sets the state of what has none")
        target.build(state)


def _latin1(text: Any) -> bytes:
    # Python 2 wrote bytes as text; pickletools shows them decoded.
    return text if isinstance(text, bytes) else str(text).encode("latin1")


def _as_is(value: Any) -> Any:
    return value


_LITERALS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _as_is),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _as_is),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _as_is),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _latin1),
}

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "LIST": _Machine.list_of,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "TUPLE": _Machine.tuple_of,
    "TUPLE1": lambda machine, _: machine.tuple_of_last(1),
    "TUPLE2": lambda machine, _: machine.tuple_of_last(2),
    "TUPLE3": lambda machine, _: machine.tuple_of_last(3),
    "DICT": _Machine.dict_of,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
