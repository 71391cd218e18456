from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from learn2perturb import records
from learn2perturb.errors import CheckpointError
from learn2perturb.records import PackedBits, PackedIntegers, atomic_write, from_json, to_json


@dataclass(frozen=True)
class Part:
    name: str
    size: float | None = None


@dataclass(frozen=True)
class Whole:
    FORMAT: ClassVar[str] = "learn2perturb.test"
    VERSION: ClassVar[int] = 2

    parts: tuple[Part, ...]
    pair: tuple[int, float]
    by_count: dict[int, float]
    free: dict[str, Any]
    flag: bool
    kind: Literal["wilson", "bootstrap"] = "wilson"
    later: str = "default"


WHOLE = Whole((Part("a", 0.1), Part("b")), (1, 1 / 3), {1: 0.5, 10: 0.25}, {"x": [1, "y", None]}, True)


def test_round_trip_keeps_every_value_and_type() -> None:
    again = from_json(to_json(WHOLE), Whole)
    assert again == WHOLE
    assert type(again.parts) is tuple
    assert type(next(iter(again.by_count))) is int


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 5e-324, 0.1 + 0.2, -0.0])
def test_floats_survive_bit_for_bit_in_strict_json(value: float) -> None:
    text = to_json(dataclasses.replace(WHOLE, pair=(1, value)))
    json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert np.float64(from_json(text, Whole).pair[1]).tobytes() == np.float64(value).tobytes()


def test_a_field_with_a_default_may_be_missing() -> None:
    payload = json.loads(to_json(WHOLE))
    del payload["later"], payload["checksum"]  # as files of before are
    assert from_json(json.dumps(payload), Whole) == WHOLE


def test_a_value_that_was_edited_is_noticed_whatever_it_is_and_layout_is_free() -> None:
    payload = json.loads(to_json(WHOLE))
    assert from_json(json.dumps(payload, sort_keys=True), Whole) == WHOLE
    edited = json.dumps(payload | {"later": "another"})
    with pytest.raises(CheckpointError, match="not those that were written"):
        from_json(edited, Whole)


BAD = [
    ("not json", lambda p: "{", "not valid JSON"),
    ("cut off", lambda p: json.dumps(p)[:-20], "not valid JSON"),
    ("a list", lambda p: "[1]", "has format 'list'"),
    ("other format", lambda p: json.dumps(p | {"format": "other"}), "has format 'other'"),
    ("newer", lambda p: json.dumps(p | {"version": 3}), "version 3 .* upgrade"),
    ("no version", lambda p: json.dumps(p | {"version": None}), "version None"),
    ("version is a bool", lambda p: json.dumps(p | {"version": True}), "version True"),
    ("unknown field", lambda p: json.dumps(p | {"surprise": 1}), "unknown fields surprise"),
    ("missing field", lambda p: json.dumps({k: v for k, v in p.items() if k != "parts"}), "lacks parts"),
    ("text for a number", lambda p: json.dumps(p | {"pair": [1, "1.0"]}), r"pair\[1\]"),
    ("bool for an int", lambda p: json.dumps(p | {"pair": [True, 1.0]}), r"pair\[0\]"),
    ("wrong length", lambda p: json.dumps(p | {"pair": [1]}), "a list of 2"),
    ("int for a bool", lambda p: json.dumps(p | {"flag": 1}), "record.flag"),
    ("no such choice", lambda p: json.dumps(p | {"kind": "guess"}), "one of 'wilson', 'bootstrap'"),
    ("object for a list", lambda p: json.dumps(p | {"parts": {}}), "a list"),
    ("wrong part", lambda p: json.dumps(p | {"parts": [3]}), r"parts\[0\]"),
    ("count is no number", lambda p: json.dumps(p | {"by_count": {"x": 1}}), "invalid literal"),
]


@pytest.mark.parametrize(("make", "match"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_a_bad_file_is_one_typed_error_that_names_it(tmp_path, make, match) -> None:
    path = tmp_path / "bad.json"
    path.write_text(make(json.loads(to_json(WHOLE))))
    with pytest.raises(CheckpointError, match=match) as caught:
        records.load(path, Whole)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_typed_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.json"):
        records.load(tmp_path / "none.json", Whole)


def test_a_bad_record_never_replaces_a_good_file(tmp_path) -> None:
    path = records.save(tmp_path / "r.json", WHOLE)
    good = path.read_bytes()
    with pytest.raises(CheckpointError, match="JSON cannot hold"):
        records.save(path, dataclasses.replace(WHOLE, free={"x": object()}))
    with pytest.raises(CheckpointError):
        records.save(path, dataclasses.replace(WHOLE, pair=("one", 2.0)))
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["r.json"]


def test_atomic_write_leaves_the_old_file_when_the_write_fails(tmp_path, monkeypatch) -> None:
    path = atomic_write(tmp_path / "deep" / "er" / "file.txt", "old\n")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(CheckpointError, match=r"cannot write .*file\.txt: No space left"):
                atomic_write(path, "new")
        assert path.read_text() == "old\n"
        assert os.listdir(path.parent) == ["file.txt"]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_atomic_write_syncs_the_file_before_the_rename_and_the_folder_after(tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a))[1])
    atomic_write(tmp_path / "x", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_atomic_write_follows_a_link_and_gives_ordinary_permissions(tmp_path) -> None:
    (tmp_path / "real").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "b"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5), (10, 33), (2, 0)])
def test_bits_round_trip(shape) -> None:
    bits = np.random.rand(*shape) < 0.5
    packed = PackedBits.pack(bits)
    assert len(packed.data) <= 4 * ((bits.size + 7) // 8 + 2) / 3
    np.testing.assert_array_equal(packed.unpack(), bits)
    assert packed.unpack().shape == shape


@pytest.mark.parametrize(
    ("top", "dtype"), [(9, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "int64")]
)
def test_integers_round_trip_in_the_smallest_type(top, dtype) -> None:
    values = np.random.randint(0, top + 1, (4, 9))
    values[0, 0] = top
    packed = PackedIntegers.pack(values)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed.unpack(), values)
    negative = PackedIntegers.pack(np.array([-1, 3]))
    assert negative.unpack().tolist() == [-1, 3]


def test_damaged_arrays_are_typed_errors() -> None:
    bits, numbers = PackedBits.pack(np.ones(20, bool)), PackedIntegers.pack(np.arange(20))
    bad = [
        dataclasses.replace(bits, shape=(200,)),
        dataclasses.replace(bits, data="?"),
        dataclasses.replace(numbers, shape=(19,)),
        dataclasses.replace(numbers, shape=(21,)),
        dataclasses.replace(numbers, data="AAAA"),
        dataclasses.replace(numbers, dtype="object"),
        # A bomb: a million zeros under the shape of 20 numbers.
        dataclasses.replace(PackedIntegers.pack(np.zeros(10**6, int)), shape=(20,)),
    ]
    for packed in bad:
        with pytest.raises(CheckpointError, match="damaged"):
            packed.unpack()


def test_records_know_no_torch() -> None:
    code = "import sys, learn2perturb.records; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_turns_anything_into_json() -> None:
    value = records.plain({"a": Part("p", float("inf")), 1: (1, {2}), "t": True})
    assert value == {"a": {"name": "p", "size": "inf"}, "1": [1, "{2}"], "t": True}
    json.dumps(value)
