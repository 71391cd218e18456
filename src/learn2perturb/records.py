"""Results on disk: frozen dataclasses <-> versioned JSON, packed arrays, atomic writes.  Knows no torch."""

from __future__ import annotations

import base64
import binascii
import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import types
import typing
import zlib
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, final

from learn2perturb.errors import CheckpointError
from learn2perturb.reading import MOST_RECORD, parse_json, read_bytes

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

MOST_ENTRIES = 200_000_000  # of a packed array: a megabyte of zlib can unfold into a gigabyte
_SUM = "checksum"
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.[0-9a-f]{8}\.tmp")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Record(Protocol):
    """A dataclass that names its file format and the version of it that this package writes."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


class Saved(ABC):
    """A record that saves and loads itself: base of frozen dataclasses with a ``FORMAT`` and a ``VERSION``."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]

    def save(self, path: str | os.PathLike[str], *, new: bool = False) -> Path:
        """Write this record as JSON, atomically; with ``new`` only where there is no file yet.

        Raises:
            CheckpointError: it cannot be written; a file that was there is left as it was.
            FileExistsError: ``new`` is set and a file is there, even if it has come about in this moment.
        """
        return save(path, typing.cast(Record, self), new=new)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record of this type.

        Raises:
            CheckpointError: missing, damaged, inconsistent, of another format, or of a newer version.
        """
        record = load(path, typing.cast(Any, cls))
        try:
            record = record._checked()
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {_short(error)}; restore it from a copy") from error
        return typing.cast("Self", record)

    def _checked(self) -> Self:
        """Return the record as its raw data give it; raise CheckpointError where fields contradict them."""
        self._check()
        return self

    def _check(self) -> None:
        """Raise CheckpointError where fields contradict each other."""


def atomic_write(path: str | os.PathLike[str], content: bytes | str, *, new: bool = False) -> Path:
    """Write ``content`` so that ``path`` holds either what it held before or all of ``content``, whatever happens.

    A temporary file in the same folder, fsync, rename, fsync of the folder; missing folders are made, and a link
    is followed rather than replaced.  Text is written as UTF-8, line ends unchanged.  With ``new``, of several that
    write to one ``path`` at once one does.

    Raises:
        FileExistsError: ``new`` is set and ``path`` exists.
        CheckpointError: the file cannot be written (folder not writable, disk full); the old file is left as it was.
    """
    _check_path(path)
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(target)
    try:
        make_folder(target.parent)
        try:
            # Not tempfile: it gives mode 600, and a result is to be as readable as any other file of the user.
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new:
                _place_new(temporary, target)
            else:
                os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if new and isinstance(error, FileExistsError) and os.path.lexists(target):
            raise
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; free the disk or choose another place"
        ) from error
    _sync_folder(target.parent)
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check, before work whose result goes there, that ``path`` can be written: a small file beside it is, and goes.

    Raises:
        CheckpointError: it cannot; the reason and the fix.
    """
    _check_path(path)
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        make_folder(target.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(bytes(4096))  # a full disk still makes empty files
                file.flush()
                os.fsync(file.fileno())
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; nothing was computed; free the disk or choose another "
            "place"
        ) from error


def _temporary(target: Path) -> Path:
    """Return a name beside ``target`` that no other process uses."""
    return target.with_name(f".{target.name}.{os.getpid()}.{binascii.hexlify(os.urandom(4)).decode()}.tmp")


def _place_new(temporary: Path, target: Path) -> None:
    """Give a file its name, unless another has it: a link to it is made or refused in one step."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken first, then filled
        with open(target, "xb"):
            pass
        os.replace(temporary, target)
    else:
        temporary.unlink()


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"{path!r} is no path; give the path of a file, as text or pathlib.Path")


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, so that a power cut does not take them away again; return it.

    Raises:
        OSError: it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)
    return folder


def clear_temporaries(folder: Path) -> None:
    """Remove what :func:`atomic_write` left in ``folder`` in processes that have ended; others are left alone."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and not is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def is_alive(process: int) -> bool:
    """Tell whether a process of this number runs on this machine."""
    if os.name == "nt":
        return True  # there signal 0 is no question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost in a power cut.  Some file systems cannot sync a folder: no harm done.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@final
@dataclasses.dataclass(frozen=True)
class PackedBits:
    """Booleans, eight to a byte (``numpy.packbits``), in base64."""

    shape: tuple[int, ...]
    data: str

    @classmethod
    def pack(cls, bits: NDArray[np.bool_]) -> PackedBits:
        """Pack a boolean array of any shape."""
        import numpy as np

        array = np.asarray(bits, dtype=bool)
        return cls(array.shape, base64.b64encode(np.packbits(array.reshape(-1)).tobytes()).decode("ascii"))

    def unpack(self) -> NDArray[np.bool_]:
        """Return the booleans, shaped ``shape``.

        Raises:
            CheckpointError: the text is not what ``shape`` bits give.
        """
        import numpy as np

        count = _entries(self.shape)
        raw = _from_base64(self.data)
        if len(raw) != (count + 7) // 8:
            raise CheckpointError(_damaged_array(f"{(count + 7) // 8} bytes", f"{len(raw)}", self.shape))
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=count).astype(bool).reshape(self.shape)


@final
@dataclasses.dataclass(frozen=True)
class PackedIntegers:
    """Class numbers (uint8, uint16 or int64, the smallest that holds them), little-endian, zlib, base64."""

    shape: tuple[int, ...]
    dtype: str
    data: str

    @classmethod
    def pack(cls, values: NDArray[np.integer[Any]]) -> PackedIntegers:
        """Pack an integer array of any shape."""
        import numpy as np

        array = np.asarray(values)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        dtype = "int64" if low < 0 or high >= 2**16 else "uint8" if high < 2**8 else "uint16"
        little = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
        return cls(array.shape, dtype, base64.b64encode(zlib.compress(little.tobytes(), 9)).decode("ascii"))

    def unpack(self) -> NDArray[np.int64]:
        """Return the integers as int64, shaped ``shape``.

        Raises:
            CheckpointError: the text is not what ``shape`` numbers of ``dtype`` give.
        """
        import numpy as np

        if self.dtype not in ("uint8", "uint16", "int64"):
            raise CheckpointError(_damaged_array("dtype uint8, uint16 or int64", repr(self.dtype), self.shape))
        dtype = np.dtype(self.dtype).newbyteorder("<")
        size = _entries(self.shape) * dtype.itemsize
        try:
            # max_length: a damaged or hostile file must not unfold into more memory than its shape announces.
            raw = zlib.decompressobj().decompress(_from_base64(self.data), size + 1)
        except zlib.error as error:
            raise CheckpointError(_damaged_array("zlib data", str(error), self.shape)) from error
        if len(raw) != size:
            raise CheckpointError(_damaged_array(f"{size} bytes", f"{len(raw)}", self.shape))
        return np.frombuffer(raw, dtype=dtype).astype(np.int64).reshape(self.shape)


def _entries(shape: tuple[int, ...]) -> int:
    """Return how many entries an array of ``shape`` has, if such an array may be made."""
    if len(shape) > 8 or any(not 0 <= size <= MOST_ENTRIES for size in shape) or math.prod(shape) > MOST_ENTRIES:
        raise CheckpointError(
            f"packed array of shape {_short(shape)} is damaged: sizes are at least 0, and {MOST_ENTRIES:,} entries the "
            "most; restore the file"
        )
    return math.prod(shape)


def _short(value: object) -> str:
    """Return ``value`` as it may stand in a message, however long it is."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CheckpointError(f"packed array is damaged: {error}; restore the file or evaluate again") from error


def _damaged_array(expected: str, received: str, shape: tuple[int, ...]) -> str:
    return f"packed array of shape {shape} is damaged: {expected} expected, {received} found; restore the file"


def to_json(record: Record) -> str:
    """Return ``record`` as JSON text: ``{"format": ..., "version": ..., <fields>}``, numbers exactly as they are.

    Non-finite floats, which JSON lacks, become the strings ``"nan"``, ``"inf"`` and ``"-inf"``.

    Raises:
        CheckpointError: a field holds something that JSON cannot.
    """
    payload = {"format": type(record).FORMAT, "version": type(record).VERSION, **_encode(record, "record")}
    payload[_SUM] = _checksum(payload)
    return json.dumps(payload, indent=1, allow_nan=False) + "\n"


def _checksum(payload: Mapping[str, Any]) -> str:
    """Return a checksum of the values of a record, however they are laid out as text."""
    text = json.dumps({key: value for key, value in payload.items() if key != _SUM}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def from_json(text: str | bytes, cls: type[R], *, source: str = "record") -> R:
    """Return the record of type ``cls`` that ``to_json`` wrote; ``source`` names the file in errors.

    Raises:
        CheckpointError: not JSON, another format, a newer version, or a field missing, unknown or of the wrong type.
    """
    fix = "restore it from a copy or write it anew"
    try:
        payload = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: not valid JSON ({error}); {fix}") from error
    if not isinstance(payload, dict) or payload.get("format") != cls.FORMAT:
        found = _short(payload.get("format")) if isinstance(payload, dict) else repr(type(payload).__name__)
        raise CheckpointError(f"{source} has format {found}, not {cls.FORMAT!r}; give a file of that format")
    version = payload.get("version")
    if isinstance(version, int) and version > cls.VERSION:
        raise CheckpointError(
            f"{source} has version {version} of {cls.FORMAT!r}, this package reads up to {cls.VERSION}; "
            "upgrade it: pip install --upgrade learn2perturb"
        )
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{source} is damaged: version {_short(version)} is no positive integer; {fix}")
    fields = {key: value for key, value in payload.items() if key not in ("format", "version", _SUM)}
    upgraded = getattr(cls, "upgraded", None)
    try:
        fields = fields if upgraded is None else upgraded(fields, version)
        record = typing.cast(R, _decode(fields, cls, "record"))
    except Exception as error:  # also what the classes of the fields raise for values that they never write
        raise CheckpointError(f"{source} is damaged: {_short(error)}; {fix}") from error
    # Records of before have none. It tells what recomputing the numbers cannot: a name, a setting, a sentence.
    if _SUM in payload and payload[_SUM] != _checksum(payload):
        raise CheckpointError(f"{source} is damaged: its values are not those that were written; {fix}")
    return record


def save(path: str | os.PathLike[str], record: Record, *, new: bool = False) -> Path:
    """Write ``record`` to ``path`` atomically, after reading it back: a bad record never replaces a good file.

    Raises:
        FileExistsError: ``new`` is set and ``path`` exists.
        CheckpointError: the record does not survive the round trip, or the file cannot be written.
    """
    text = to_json(record)
    if to_json(from_json(text, type(record), source=f"the record for {path}")) != text:
        raise CheckpointError(f"the record for {path} does not survive a round trip through JSON; nothing was written")
    return atomic_write(path, text, new=new)


def load(path: str | os.PathLike[str], cls: type[R]) -> R:
    """Read a record of type ``cls``.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, of another format, or of a newer version.
    """
    _check_path(path)
    try:
        text = read_bytes(path, MOST_RECORD)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {reason}; check the path") from error
    return from_json(text, cls, source=str(path))


def plain(value: Any) -> Any:
    """Return ``value`` as something JSON holds: dataclasses become dicts, code its name, the rest its ``repr``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "__qualname__"):  # a class or function: its repr may hold an address
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _encode(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _encode(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold; give numbers, text or lists")


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(value: Any, hint: Any, where: str) -> Any:
    """Build what ``hint`` says out of parsed JSON; types are checked, never coerced (an int may serve as a float)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(value, arguments, where)
    if origin is typing.Literal:
        _require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        return _decode_tuple(value, arguments, where)
    if origin in (dict, Mapping, collections.abc.Mapping):
        _require(isinstance(value, dict), where, "an object", value)
        key_type, item = arguments
        return {
            (int(key) if key_type is int else key): _decode(entry, item, f"{where}[{key!r}]")
            for key, entry in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(value, hint, where)
    if hint is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), where, "an integer", value)
        return value
    _require(isinstance(value, type(None) if hint is None else hint), where, getattr(hint, "__name__", hint), value)
    return value


def _decode_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is not type(None):
            try:
                return _decode(value, option, where)
            except (TypeError, ValueError) as error:
                failures.append(str(error))
    raise ValueError("; ".join(failures))


def _decode_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    _require(isinstance(value, list), where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value))
    _require(len(value) == len(arguments), where, f"a list of {len(arguments)}", value)
    pairs = zip(value, arguments, strict=True)
    return tuple(_decode(item, kind, f"{where}[{index}]") for index, (item, kind) in enumerate(pairs))


def _decode_dataclass(value: Any, cls: type, where: str) -> Any:
    _require(isinstance(value, dict), where, "an object", value)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = _hints(cls)
    return cls(**{name: _decode(item, hints[name], f"{where}.{name}") for name, item in value.items()})


def _require(condition: bool, where: str, expected: Any, value: Any) -> None:
    if not condition:
        text = repr(value)
        raise ValueError(f"{where} is {text if len(text) <= 60 else text[:57] + '...'}, not {expected}")
