"""Hostile pickles: nothing runs, nothing hangs, nothing fills the memory; one line says what is wrong."""

from __future__ import annotations

import contextlib
import pickle
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from learn2perturb.data.pickles import read_pickle
from learn2perturb.errors import DataError


def nested(depth: int) -> bytes:
    """Return the code of a tuple of tuples of ``depth`` levels, each twice the one before, shared by the memo."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


def encoded(times: int, size: int = 1000) -> bytes:
    text = b"X" + struct.pack("<I", size) + b"a" * size
    once = b"h\x00h\x01R"
    return b"\x80\x02c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01](" + once * times + b"e."


BOMBS = {
    "key of nested tuples": b"\x80\x02}" + nested(64) + b"K\x01s.",
    "value of nested tuples as shape": (
        b"\x80\x02}U\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\n)R"
        b"(K\x01" + nested(64) + b"cnumpy\ndtype\n"
        b"U\x02u1\x85R\x89U\x00tbs."
    ),
    "key of a nested list": b"\x80\x02}]K\x01s.",
    "frozenset": b"\x80\x04}(" + nested(40)[0:] + b"\x91K\x01s.",
    "one text encoded again and again": encoded(200),
    "long number": b"\x80\x02}U\x01a\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01s.",
    "bytes that are not there": b"\x80\x04}\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "get of nothing": b"\x80\x02h\x05.",
    "marks": b"(" * 1000 + b".",
    "no stop": b"\x80\x02}",
    "pops": b"0" * 100,
    "append to a number": b"K\x01K\x02a.",
    "item of a list": b"]K\x01K\x02s.",
    "build of a dict": b"}}b.",
    "call of a text": b"U\x01a)R.",
    "call of the array class": b"cnumpy\nndarray\n)R.",
    "dup": b"\x80\x02}" + b"2" * 100 + b".",
    "persistent id": b"\x80\x02Pabc\n.",
    "extension": b"\x80\x02\x82\x01.",
    "object": b"(cnumpy\nndarray\no.",
    "not utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_one_line_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(BOMBS[kind])
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        read_pickle(path)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert "batch" in message and message.isprintable() and len(message) < 500 + len(str(tmp_path))


def test_the_smallest_bomb_would_hang_pythons_own_unpickler(tmp_path: Path) -> None:
    assert len(BOMBS["key of nested tuples"]) < 400
    path = tmp_path / "batch"
    # Depth 18 ends, and takes Python twice as long as depth 17: the machine here refuses both alike.
    path.write_bytes(b"\x80\x02}" + nested(18) + b"K\x01s.")
    with pytest.raises(DataError, match="a key is a tuple"):
        read_pickle(path)


def test_a_file_too_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**40)  # sparse: it has no such bytes
    with pytest.raises(DataError, match="more than"):
        read_pickle(large)
    with pytest.raises(DataError, match="no file"):
        read_pickle(tmp_path)


def test_a_memo_of_four_thousand_million_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    assert read_pickle(tmp_path / "batch") == {}


def batch(n: int = 20) -> dict:
    pixels = np.arange(n * 30, dtype=np.uint8).reshape(n, 30)
    names = [f"{i}.png" for i in range(n)]
    return {
        b"data": pixels,
        b"labels": list(range(n)),
        b"filenames": names,
        b"batch_label": b"one of one",
        b"none": b"",
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_it_reads_is_what_python_reads(protocol: int, order: str, tmp_path: Path) -> None:
    content = batch()
    content[b"data"] = np.asarray(content[b"data"], order=order)  # type: ignore[call-overload]
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol))
    read = read_pickle(tmp_path / "batch")
    assert np.array_equal(read["data"], content[b"data"])
    assert {key: read[key] for key in read if key != "data"} == {
        key.decode(): value for key, value in content.items() if key != b"data"
    }


def test_garbled_files_are_read_or_refused(tmp_path: Path) -> None:
    whole, chance = pickle.dumps(batch(), 2), random.Random(0)
    path = tmp_path / "batch"
    refused = 0
    for _ in range(400):
        garbled = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4])):
            garbled[chance.randrange(len(garbled))] = chance.randrange(256)
        path.write_bytes(garbled[: chance.choice([len(garbled)] * 3 + [chance.randrange(len(garbled))])])
        with contextlib.suppress(DataError):
            read_pickle(path)
            continue
        refused += 1
    assert refused > 100
