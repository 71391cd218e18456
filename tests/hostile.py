"""The kinds of file that the package reads, each with a good one and its reader; and ways to damage any of them."""

from __future__ import annotations

import json
import pathlib
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from learn2perturb.evaluation import Evaluation
from learn2perturb.runs import load
from learn2perturb.training import TrainConfig, read_config
from learn2perturb.training.folder import check_folder


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, how a good one is made, what reads it."""

    name: str
    make: Callable[[pathlib.Path], bytes]
    read: Callable[[pathlib.Path], Any]


def _config() -> TrainConfig:
    return TrainConfig(
        defense="none", model="digits_cnn", dataset="digits", recipe="fast", epochs=1, limit=16, batch_size=8,
        monitor=0, tensorboard=False, device="cpu", engine="plain",
    ).resolve()  # fmt: skip


def _settings(_: pathlib.Path) -> bytes:
    from learn2perturb.training.folder import settings_text

    return settings_text(_config()).encode()


def _record(folder: pathlib.Path) -> bytes:
    import torch

    from learn2perturb.evaluation import evaluate

    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 1, 4, 4, generator=generator), torch.arange(12) % 3
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    return evaluate(network, (images, labels), draws=2).save(folder / "record.json").read_bytes()


def _network(_: pathlib.Path) -> bytes:
    from learn2perturb.models import build_model
    from learn2perturb.noise import perturb
    from learn2perturb.runs.checkpoint import model_bytes

    network = perturb(build_model("digits_cnn", input_shape=(1, 8, 8)), input_shape=(1, 8, 8))
    return model_bytes(network, {"config": {"eps": 0.1}, "input_shape": [1, 8, 8], "defense": "learn2perturb"})


def _read_folder(path: pathlib.Path) -> None:
    run = path.parent / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes(path.read_bytes())
    check_folder(run, _config())


def _read_settings(path: pathlib.Path) -> TrainConfig:
    return TrainConfig.from_dict(read_config(path)).resolve()


KINDS = [
    Kind("config.yaml given", _settings, _read_settings),
    Kind("config.yaml of a run", _settings, _read_folder),
    Kind("evaluation record", _record, lambda path: str(Evaluation.load(path))),
    Kind("model.safetensors", _network, load),
]

# What a stranger would put into a place for a value: YAML and JSON read most of these.
VALUES = [
    "null", "true", "-1", "0", "1e999", "-1e999", "NaN", "9" * 400, "9" * 5000, '""', '"\\u001b[2J"', "[]", "{}",
    "[" * 3000, '{"a":' * 3000, '"x"', "[1, [2]]", '{"a": 1, "a": 2}', "2001-99-99", "!!int ''", "!!binary x",
    "99999999999999999999", "0.1", '"nan"', "[1000000000, 1000000000]", "[-1]", "&a [*a]", "\x00", "\ud800",
]  # fmt: skip


def mutations(good: bytes, seed: int) -> Iterator[bytes]:
    """Give spoilt copies of ``good`` without end: bytes flipped, cut, doubled, and values replaced by strange ones."""
    rng = random.Random(seed)
    while True:
        kind = rng.randrange(5)
        at = rng.randrange(len(good))
        if kind == 0:
            yield good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        elif kind == 1:
            yield good[:at]
        elif kind == 2:
            end = at + rng.randrange(1, 200)
            yield good[:end] + good[at:end] + good[end:]
        else:
            yield _with_value(good, rng)


def _with_value(good: bytes, rng: random.Random) -> bytes:
    """Replace what stands behind a random colon; the length in the head of a safetensors file follows."""
    value = rng.choice(VALUES).encode("utf-8", "surrogatepass")
    if good[:1] != b"{" and good[8:9] == b"{":
        length = struct.unpack("<Q", good[:8])[0]
        header = json.loads(good[8 : 8 + length])
        own = json.loads(header["__metadata__"]["learn2perturb"])
        key = rng.choice(list(own))
        try:
            own[key] = json.loads(value)
        except (ValueError, RecursionError):
            own[key] = rng.choice([3, "x", [1], {"a": [[]]}, -1.5, True, 10**9])
        header["__metadata__"]["learn2perturb"] = json.dumps(own)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]
    colons = [index for index, byte in enumerate(good) if byte == ord(":")]
    at = rng.choice(colons) + 1
    ends = [index for mark in (b",", b"\n", b"}") if (index := good.find(mark, at)) > 0]
    return good[:at] + b" " + value + good[min(ends, default=len(good)) :]
