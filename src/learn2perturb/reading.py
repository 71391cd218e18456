"""Files of strangers as plain values: bounded in size, time and memory; a fault is one typed line. Knows no torch.

Nothing that a file can hold ends in anything but a value or the error that the caller names.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.errors import Learn2PerturbError

if TYPE_CHECKING:
    import yaml

MOST_SETTINGS = 200_000  # bytes of a YAML file; PyYAML reads about 100 kB a second
MOST_NODES = 50_000  # values in it, once its aliases are written out
MOST_RECORD = 256 << 20  # bytes of a record
PACKED = ".xz"  # the ending of a file that is packed, as the weights of the zoo are
SAFETENSORS = (".safetensors", ".safetensors" + PACKED)
MOST_UNPACKED = 64 << 20  # bytes that such a file may hold: a few hundred packed ones could fill the memory
_MOST_MEMORY = 128 << 20  # bytes that unpacking may take; the strongest packing of xz asks for half of it
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


@contextmanager
def reading(what: str, fix: str, error: type[Learn2PerturbError]) -> Iterator[None]:
    """Turn whatever goes wrong in the body into ``error``: what is read, the reason, the fix; nothing else gets out.

    Errors of this package pass, as do signals. Deep nesting (RecursionError) and sizes beyond the memory are faults of
    the file, not of the program.
    """
    try:
        yield
    except Learn2PerturbError:
        raise
    except Exception as fault:
        raise error(f"{what}: {_reason(fault)}; {fix}") from None


def _reason(fault: Exception) -> str:
    if isinstance(fault, RecursionError):
        return "it is nested too deeply"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    text = " ".join(str(fault).split())[:200]
    return text if isinstance(fault, ValueError) and text else f"{type(fault).__name__} {text}".strip()


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and no file: reading a pipe waits for ever, a device never ends.

    A pipe without a name, as the shell makes for ``<(command)``, is one that somebody writes to.

    Raises:
        OSError, ValueError: it is missing, or something else than a file.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))):
        return
    raise ValueError(f"it is {next((name for is_kind, name in _KINDS if is_kind(mode)), 'no file')}")


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Return what a file holds.

    Raises:
        OSError, ValueError: it cannot be read, is no file, or holds more than ``most`` bytes.
    """
    check_regular(path)
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield ``path`` or, where it ends in ``.xz``, a file of what it holds, which is gone afterwards.

    Raises:
        OSError, ValueError, LZMAError: it is no file, damaged, or holds more than ``MOST_UNPACKED`` bytes.
    """
    if path.suffix != PACKED:
        yield path
        return
    import lzma  # with tempfile 3 ms of a verb's --help, which unpacks nothing
    import tempfile

    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    content = reader.decompress(read_bytes(path, MOST_UNPACKED), MOST_UNPACKED + 1)
    if len(content) > MOST_UNPACKED:
        raise ValueError(f"unpacked it has more than {MOST_UNPACKED:,} bytes")
    if not reader.eof or reader.unused_data:
        raise ValueError("it is cut off" if not reader.eof else "there is more behind its end")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, path.stem)
        plain.write_bytes(content)
        yield plain


def starts_with(path: str | os.PathLike[str], count: int) -> bytes:
    """Return the first ``count`` bytes of a file, none of what is no file."""
    try:
        check_regular(path)
        with Path(path).open("rb") as file:
            return file.read(count)
    except (OSError, ValueError):
        return b""


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text, in which no key of an object may come twice.

    Raises:
        ValueError, RecursionError: it is no such text.
    """
    return json.loads(text, object_pairs_hook=_without_doubles)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double!r} comes twice")
    return found


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text: plain values only, no key twice, aliases only as far as they stay small.

    Raises:
        Exception: of many types, where it is no such text; call it within :func:`reading`.
    """
    import yaml  # a sixth of the time of --help, which reads none

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is built: nine lines of aliases of aliases stand for a billion values.
        if _size(node, {}) > MOST_NODES:
            raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(_first_line(error)) from None
    finally:
        loader.dispose()


def _first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{where}"


def _size(node: Any, known: dict[int, int | None]) -> int:
    """Return how many values a node of YAML stands for; each node is counted once, however often it is referred to."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("a value contains itself")
        return size
    known[id(node)] = None
    size = 1
    if node.id == "sequence":
        size += sum(_size(item, known) for item in node.value)
    elif node.id == "mapping":
        _without_doubles([(f"{key.value}", None) for key, _ in node.value if key.id == "scalar"])
        size += sum(_size(key, known) + _size(value, known) for key, value in node.value)
    known[id(node)] = size
    return size
