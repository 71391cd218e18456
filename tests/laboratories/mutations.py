"""Seeded damage to a file: bits, blocks, lengths; for text of a known kind, values and keys as well."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml


def flip_bit(content: bytearray, draw: random.Random) -> None:
    """Flip one bit."""
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def flip_many(content: bytearray, draw: random.Random) -> None:
    """Flip two to fifty bits."""
    for _ in range(draw.randint(2, 50)):
        flip_bit(content, draw)


def truncate(content: bytearray, draw: random.Random) -> None:
    """Cut the end off."""
    del content[draw.randrange(len(content)) :]


def zero_block(content: bytearray, draw: random.Random) -> None:
    """Write zeros over a block, or over the whole rest."""
    start, length = _range(content, draw)
    content[start : start + length] = bytes(length)


def repeat_range(content: bytearray, draw: random.Random) -> None:
    """Insert a copy of a range behind it."""
    start, length = _range(content, draw)
    content[start + length : start + length] = content[start : start + length]


def drop_range(content: bytearray, draw: random.Random) -> None:
    """Leave out a range."""
    start, length = _range(content, draw)
    del content[start : start + length]


def swap_ranges(content: bytearray, draw: random.Random) -> None:
    """Exchange two ranges of equal length."""
    length = max(1, min(len(content) // 2, draw.choice((1, 8, 512, 4096))))
    one, other = draw.randrange(len(content) - length + 1), draw.randrange(len(content) - length + 1)
    first, second = content[one : one + length], content[other : other + length]
    content[one : one + length], content[other : other + length] = second, first


def insert_bytes(content: bytearray, draw: random.Random) -> None:
    """Insert random bytes."""
    start = draw.randrange(len(content) + 1)
    content[start:start] = draw.randbytes(draw.choice((1, 2, 7, 64)))


def append_bytes(content: bytearray, draw: random.Random) -> None:
    """Append random bytes, or the file once more."""
    content += draw.choice((draw.randbytes(draw.randint(1, 100)), bytes(content)))


def _range(content: bytearray, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content))
    return start, min(len(content) - start, draw.choice((1, 16, 512, 4096, len(content))))


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bit, flip_many, truncate, zero_block, repeat_range, drop_range, swap_ranges, insert_bytes, append_bytes,
)  # fmt: skip


def damaged_bytes(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return other bytes than ``content``, and what was done."""
    while True:
        change = draw.choice(BYTES)
        changed = bytearray(content)
        change(changed, draw)
        if changed != content:
            return bytes(changed), change.__name__


# --- values


_STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 10**30, 1e300, float("nan"), float("inf"), "", "x", "../..", [], {}, [1, 2], {"a": 1},
)  # fmt: skip


def damaged_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """Return ``value`` (of JSON or YAML) with one place in it changed, and what was done."""
    result = copy.deepcopy(value)
    places = list(_places(result))
    if not places:
        return draw.choice(_STRANGE), "other value"
    holder, key = draw.choice(places)
    old = holder[key]
    how = draw.choice(("near", "near", "strange", "drop", "rename", "double"))
    if how == "drop" or (how == "rename" and isinstance(holder, list)):
        del holder[key]
        return result, "drop a value"
    if how == "rename":
        holder[f"{key}_"] = holder.pop(key)
        return result, "rename a key"
    if how == "double" and isinstance(holder, list):
        holder.insert(key, old)
        return result, "double an item"
    holder[key] = _near(old, draw) if how == "near" else draw.choice(_STRANGE)
    return result, f"{how} value"


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _near(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw.choice((-1, 1, 10))
    if isinstance(value, float):
        return value * draw.choice((0.5, 0.99, 1.01, -1.0)) + draw.choice((0.0, 0.1))
    if isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + chr(33 + draw.randrange(90)) + value[at + 1 :]
    return draw.choice(_STRANGE)


def damaged_json(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return JSON that says something else."""
    while True:
        changed, how = damaged_value(json.loads(content), draw)
        text = json.dumps(changed, indent=1).encode()
        if json.loads(text) != json.loads(content):
            return text, f"JSON: {how}"


def damaged_lines(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return lines of JSON of which one says something else, is left out, doubled or moved."""
    lines = content.splitlines(keepends=True)
    at, how = draw.randrange(len(lines)), draw.choice(("value", "value", "drop", "double", "move"))
    if how == "value":
        changed, how = damaged_value(json.loads(lines[at]), draw)
        lines[at] = (json.dumps(changed) + "\n").encode()
    elif how == "drop":
        del lines[at]
    elif how == "double":
        lines.insert(at, lines[at])
    else:
        lines.append(lines.pop(at))
    return b"".join(lines), f"lines: {how}"


def damaged_yaml(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Return YAML that says something else."""
    changed, how = damaged_value(yaml.safe_load(content), draw)
    return yaml.safe_dump(changed, sort_keys=False).encode(), f"YAML: {how}"
