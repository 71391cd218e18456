"""Hostile state: resume files, tensors, headers, settings and records that lie, multiply, or hold code."""

from __future__ import annotations

import base64
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator

import torch
from safetensors.torch import save

from tests.laboratories import fixtures
from tests.laboratories.hostile_parts import SMALL, TOUCH, Build, Runs, doubling, file_of, in_run


def every() -> Iterator[tuple[str, Build]]:
    """Yield (name, builder)."""
    for name, content in _resumes():
        yield f"resume state: {name}", in_run("resume.pt", content)
    for name, content in _tensors():
        yield f"safetensors: {name}", file_of("net.safetensors", content, ["evaluate", "net.safetensors", *SMALL])
    for name, header in _headers():
        yield f"header: {name}", _header(header)
    for name, content in _yamls():
        yield f"YAML of --config: {name}", file_of("c.yaml", content, ["train", "--config=c.yaml", "--out=new"])
        yield f"config.yaml: {name}", in_run("config.yaml", content)
    for name, content in _jsons():
        yield f"record: {name}", file_of("r.json", content, ["compare", "r.json", "r.json"])
        yield f"metrics: {name}", in_run("metrics.jsonl", content)
    for name, content in _records():
        yield f"record: {name}", file_of("r.json", content, ["compare", "r.json", "r.json"])


def _header(header: object) -> Build:
    def build(folder: pathlib.Path) -> list[str]:
        text = header if isinstance(header, str) else json.dumps(header)
        (folder / "net.safetensors").write_bytes(save({"w": torch.zeros(2)}, metadata={"learn2perturb": text}))
        return ["evaluate", "net.safetensors", *SMALL]

    return build


# --- files of tensors


def _resumes() -> Iterator[tuple[str, bytes]]:
    yield "code", fixtures.pickled(Runs(os.system, TOUCH))
    yield "plain pickle with code", pickle.dumps(Runs(os.system, TOUCH))
    yield "empty", b""
    yield "text", b"\x1b[31mred"
    yield "a tensor", fixtures.pickled(torch.zeros(2))
    yield "a dict of nothing", fixtures.pickled({})
    known = {"format": "learn2perturb.resume", "version": 1}
    yield "a dict without parts", fixtures.pickled(known)
    yield "a version of text", fixtures.pickled({**known, "version": "one"})
    yield "a version of nothing", fixtures.pickled({**known, "version": None})
    yield "a list for a format", fixtures.pickled({"format": [], "version": 1})
    full = {
        **known, "epoch": 0, "batch": 1, "stage": 0, "batches": 4, "gear": "plain", "optimizers": {}, "totals": {},
        "seconds": 0.0, "metrics_bytes": 0,
    }  # fmt: skip
    yield "no optimisers", fixtures.pickled(full)
    for key, value in (
        ("epoch", -1), ("epoch", 10**12), ("epoch", "x"), ("batch", None), ("stage", 99), ("stage", "x"),
        ("metrics_bytes", -5), ("metrics_bytes", 10**15), ("totals", []), ("totals", {"loss": "x"}),
        ("optimizers", {"weights": {"state": {}, "param_groups": []}}), ("optimizers", 5), ("seconds", "x"),
        ("batches", "four"), ("gear", 7),
    ):  # fmt: skip
        yield f"{key} is {value!r:.30}", fixtures.pickled({**full, key: value})
    yield "a zip of nothing", _zip({})
    yield "a zip bomb", _zip({"archive/data.pkl": bytes(1 << 29)})
    yield "a zip with a path upwards", _zip({"../mine/notes.txt": b"x"})
    yield "a pickle of doubling tuples", _zip({"archive/data.pkl": doubling(60), "archive/version": b"3\n"})


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def _tensors() -> Iterator[tuple[str, bytes]]:
    def lying(header: object, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    yield "empty", b""
    yield "seven bytes", b"1234567"
    yield "a header of 2**63 bytes", struct.pack("<Q", 1 << 63) + b"{}"
    yield "a header of 90 MB", struct.pack("<Q", 90_000_000) + b"{}"
    yield "no JSON", lying(b"{{{{")
    yield "a list", lying([])
    yield "100,000 brackets", lying(b"[" * 100_000)
    yield "no text", lying(b"\xff\xfe\xfd")
    for name, entry in (
        ("an unknown type", {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}),
        ("a shape of 2**62", {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}),
        ("a negative shape", {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}),
        ("offsets backwards", {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
        ("offsets beyond", {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]}),
    ):  # fmt: skip
        yield name, lying({"w": entry}, bytes(4))
    yield "numbers in the metadata", lying({"__metadata__": {"learn2perturb": 1}})
    yield "a pickle", pickle.dumps(Runs(os.system, TOUCH))
    yield "torch.save", fixtures.pickled(Runs(os.system, TOUCH))
    yield "no header of ours", save({"w": torch.zeros(1)})


def _headers() -> Iterator[tuple[str, object]]:
    yield "no JSON", "{"
    yield "a list", []
    yield "a number", 5
    yield "null", None
    yield "100,000 brackets", "[" * 100_000
    yield "an integer of 5,000 digits", '{"version": ' + "9" * 5000 + "}"
    arguments = {"num_classes": 10, "input_shape": [1, 8, 8]}
    good = {"version": 1, "registered_name": "digits_cnn", "build_arguments": arguments}
    for key, value in (
        ("version", "one"), ("version", None), ("version", []), ("version", -1), ("registered_name", "os:system"),
        ("registered_name", 5), ("registered_name", {}), ("registered_name", "\x1b[31m"), ("registered_name", "../x"),
        ("build_arguments", 5), ("build_arguments", "x"), ("build_arguments", [1]), ("build_arguments", {"a": 1}),
        ("build_arguments", {"num_classes": 10**13, "input_shape": [1, 8, 8]}),
        ("build_arguments", {"num_classes": 10, "input_shape": [1, 10**9, 10**9]}),
        ("build_arguments", {"num_classes": -1, "input_shape": [1, 8, 8]}),
        ("build_arguments", {"num_classes": "x", "input_shape": None}),
        ("noise", 5), ("noise", "x"), ("noise", [1]), ("noise", {"a": {}}), ("noise", {"\x1b[31m": {}}),
        ("config", 5), ("config", {"data_dir": 5}), ("config", {"eps": "x"}), ("dataset", "../../x"), ("dataset", 5),
        ("dataset", "\x1b[31m"), ("input_shape", "x"), ("input_shape", [1, None]), ("predictor", 5),
        ("predictor", "\x1b[31m"), ("members", "x"), ("members", -1), ("members", 10**12), ("defense", 5),
        ("format", 5),
    ):  # fmt: skip
        yield f"{key} is {value!r:.60}", {**good, key: value}


# --- text


def _yamls() -> Iterator[tuple[str, bytes]]:
    yield "code", b"model: !!python/object/apply:os.system [touch canary]\n"
    yield "code, new", b"model: !!python/object/new:os.system [touch canary]\n"
    yield "a module", b"model: !!python/module:os\n"
    yield "a name", b"model: !!python/name:os.system\n"
    yield "an unknown tag", b"model: !evil x\n"
    yield "aliases that double", _alias_bomb(40)
    yield "aliases that multiply", _alias_bomb(9, width=9)
    yield "an alias of itself", b"options: &a {x: *a}\n"
    yield "an undefined alias", b"model: *b\n"
    yield "20,000 brackets", b"[" * 20_000
    yield "5,000 brackets, closed", b"options: " + b"[" * 5_000 + b"]" * 5_000
    yield "binary", b"\x00\x01\x02\xff"
    yield "UTF-16", "model: resnet20\n".encode("utf-16")
    yield "two documents", b"seed: 1\n---\nseed: 2\n"
    yield "doubled keys", b"seed: 1\nseed: 2\n"
    yield "a list", b"- 1\n- 2\n"
    yield "keys of numbers", b"1: 2\n"
    yield "keys of lists", b"? [1]\n: 2\n"
    yield "keys of nothing", b"~: 1\n"
    yield "escapes in a key", b'"\\e[31m": 1\n'
    yield "escapes in a value", b'model: "\\e[31mred"\n'
    yield "NUL in a path", b'data_dir: "a\\0b"\n'
    yield "a date", b"seed: 2020-01-01\n"
    yield "a wrong date", b"seed: 2020-99-99\n"
    yield "an integer of 5,000 digits", b"seed: " + b"9" * 5000 + b"\n"
    yield "base 60", b"seed: " + b"59:" * 3000 + b"59\n"
    yield "not a number", b"lr: .nan\n"
    yield "endless", b"lr: .inf\n"
    yield "a merge of nothing", b"<<: 5\n"
    yield "bytes", b"model: !!binary aGVsbG8=\n"
    yield "wrong bytes", b"model: !!binary '!!'\n"
    yield "a set", b"model: !!set {a, b}\n"
    yield "empty", b""


def _alias_bomb(depth: int, width: int = 2) -> bytes:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * width)}]" for at in range(1, depth)]
    return ("\n".join(lines) + f"\noptions: {{x: *a{depth - 1}}}\n").encode()


def _jsons() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "100,000 brackets", b"[" * 100_000
    yield "100,000 brackets, closed", b"[" * 100_000 + b"]" * 100_000
    yield "an integer of 5,000 digits", b'{"kind": ' + b"9" * 5000 + b"}"
    yield "NUL", b"\0" * 4096
    yield "no text", b"\xff\xfe\xfd"
    yield "UTF-16", '{"kind": "epoch"}'.encode("utf-16")
    yield "a BOM", b'\xef\xbb\xbf{"kind": "epoch"}'
    yield "a list", b"[1, 2]\n"
    yield "a number", b"5\n"
    yield "null", b"null\n"
    yield "no kind", b'{"a": 1}\n'
    yield "an unhashable kind", b'{"kind": [1]}\n'
    yield "an epoch of nothing", b'{"kind": "epoch"}\n'
    yield "lone surrogates", b'{"kind": "\\ud800"}\n'
    yield "escapes", b'{"format": "\\u001b[31m", "kind": "\\u001b[2J"}\n'


def _records() -> Iterator[tuple[str, bytes]]:
    bomb = _base64(zlib.compress(bytes(1 << 26), 9))
    good = {
        "format": "learn2perturb.evaluation", "version": 1, "rows": [],
        "labels": {"shape": [2], "dtype": "uint8", "data": _base64(zlib.compress(b"\0\1"))},
        "num_classes": 2, "seed": 0,
    }  # fmt: skip
    for key, value in (
        ("rows", []), ("rows", [{}]), ("rows", 5), ("version", "x"), ("version", 10**30), ("format", []), ("seed", "x"),
        ("labels", {"shape": [10**12], "dtype": "int64", "data": ""}),
        ("labels", {"shape": [-2], "dtype": "uint8", "data": ""}),
        ("labels", {"shape": [2], "dtype": "O", "data": ""}),
        ("labels", {"shape": [1 << 26], "dtype": "uint8", "data": bomb}),
        ("labels", {"shape": [2], "dtype": "uint8", "data": bomb}),
        ("labels", {"shape": [], "dtype": "uint8", "data": "!"}),
        ("metadata", {"model": "\x1b[31mred", "data": "|x|"}), ("num_classes", -1), ("num_classes", 10**30),
        ("confidence", 5.0), ("confidence", "nan"), ("resamples", 10**12), ("resamples", -1),
    ):  # fmt: skip
        yield f"{key} is {value!r:.60}", json.dumps({**good, key: value}).encode()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
