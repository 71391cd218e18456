"""Nothing that a file can hold ends in anything but a value or one typed line, within bounds."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import socket
import time

import pytest

from learn2perturb.checks import check_count
from learn2perturb.errors import CheckpointError, ConfigError, DataError, Learn2PerturbError
from learn2perturb.reading import parse_json, parse_yaml, read_bytes, reading
from learn2perturb.records import PackedBits, PackedIntegers
from learn2perturb.runs import load
from learn2perturb.training import TrainConfig, read_config
from tests.hostile import KINDS, Kind, mutations

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n" for before, name in itertools.pairwise("abcdefghij")
)
YAML = {
    "alias bomb": (BOMB, "its aliases stand for more than"),
    "merge bomb": (MERGES, "its aliases stand for more than"),
    "contains itself": ("epochs: &a [*a]", "contains itself"),
    "deep": ("[" * 10_000, "nested too deeply"),
    "deep mapping": ("{a: " * 10_000, "nested too deeply"),
    "double key": ("epochs: 1\nseed: 0\nepochs: 2", "'epochs' comes twice"),
    "huge whole number": (f"epochs: {'9' * 5000}", "digits"),
    "no date": ("epochs: 2001-99-99", "month"),
    "empty integer": ("epochs: !!int ''", "IndexError"),
    "no truth": ("epochs: !!bool x", "KeyError"),
    "no time": ("epochs: !!timestamp x", "AttributeError"),
    "code": ("epochs: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "many bytes": ("#" * 300_000, "more than 200,000 bytes"),
    "no text": ("epochs: \x07", "special characters"),
}


@pytest.mark.parametrize("case", list(YAML))
def test_yaml_of_any_content_is_a_typed_line_and_quick(case, tmp_path):
    text, reason = YAML[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match="config '.*config.yaml' .*; (fix the file|give a YAML file)") as error:
        read_config(path)
    assert reason in str(error.value)
    assert time.process_time() - start < 5


def test_anchors_and_merges_of_honest_settings_are_read():
    text = "base: &b {lr: 0.1, beta: 0}\none: {<<: *b, lr: 0.2}\ntwo: {<<: *b}\nlist: [*b, *b]"
    base = {"lr": 0.1, "beta": 0}
    assert parse_yaml(text) == {"base": base, "one": {"lr": 0.2, "beta": 0}, "two": base, "list": [base, base]}
    assert parse_yaml("") is None


def test_json_with_a_key_twice_is_refused():
    with pytest.raises(ValueError, match="'a' comes twice"):
        parse_json('{"b": 1, "a": 1, "a": 2}')
    assert parse_json('{"a": {"a": 1}, "b": {"a": 2}}') == {"a": {"a": 1}, "b": {"a": 2}}


def test_signals_and_errors_of_the_package_pass():
    for fault in (KeyboardInterrupt(), DataError("as it is")):
        with pytest.raises(type(fault)), reading("x", "y", ConfigError):
            raise fault
    with (
        pytest.raises(
            CheckpointError, match=r"^it cannot be read: nested|^it cannot be read: it is nested too deeply; z$"
        ),
        reading("it cannot be read", "z", CheckpointError),
    ):
        raise RecursionError


@pytest.mark.parametrize("reader", [read_config, load], ids=["config", "network"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_no_file_is_refused_without_waiting(reader, kind, tmp_path, monkeypatch):
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the paths of sockets are short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("thing")
    else:
        path = pathlib.Path("/dev/zero")
    with pytest.raises(Learn2PerturbError, match=f"{path}"):
        reader(path)


def test_the_pipe_that_a_shell_makes_is_read():
    read, write = os.pipe()
    os.write(write, b"epochs: 1")
    os.close(write)
    try:
        assert read_config(pathlib.Path(f"/dev/fd/{read}")) == {"epochs": 1}
    finally:
        os.close(read)


def test_no_more_is_read_than_allowed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bytes(path, 4)


@pytest.mark.parametrize(
    "shape", [(-1, -8), (10**30,), (0, 10**30), (10**9, 10**9), (1,) * 70, (4, -2)], ids=lambda shape: str(shape)[:20]
)
def test_packed_arrays_of_absurd_shapes_are_refused(shape):
    for packed in (PackedBits(shape, "AAAA"), PackedIntegers(shape, "uint8", "eJwDAAAAAAE=")):
        with pytest.raises(CheckpointError, match="packed array of shape"):
            packed.unpack()


def check(kind: Kind, path: pathlib.Path, spoilt: bytes) -> str:
    """Read a spoilt file; return the outcome, a value or a line. Anything else is what this looks for."""
    path.write_bytes(spoilt)
    start = time.process_time()
    try:
        kind.read(path)
        outcome = "value"
    except Learn2PerturbError as error:
        outcome = "line" if len(str(error)) < 3000 else "a line too long"
    assert time.process_time() - start < 10
    return outcome


def fuzz(kind: Kind, folder: pathlib.Path, count: int, seed: int) -> dict[str, int]:
    good, path = kind.make(folder), folder / "spoilt"
    assert check(kind, path, good) == "value"
    outcomes = {"value": 0, "line": 0}
    for spoilt in itertools.islice(mutations(good, seed), count):
        outcomes[check(kind, path, spoilt)] += 1
    return outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_spoilt_files_give_a_value_or_a_line(kind, tmp_path):
    outcomes = fuzz(kind, tmp_path, 50, seed=0)
    assert outcomes["line"] >= 10, outcomes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_spoilt_files_give_a_value_or_a_line(kind, tmp_path):
    assert fuzz(kind, tmp_path, 500, seed=1)["line"] >= 100


def test_a_header_cannot_ask_for_more_memory_than_its_file_holds(tmp_path):
    import torch
    from safetensors.torch import save_file

    header = {"version": 1, "registered_name": "resnet20", "build_arguments": {"num_classes": 10**9}}
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"learn2perturb": json.dumps(header)})
    with pytest.raises(CheckpointError, match="asks for a resnet20 of"):
        load(tmp_path / "x.safetensors")


def test_settings_are_refused_with_their_names():
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig(epochs="many")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2**63, 10**400])
def test_a_count_of_more_than_64_bits_is_refused(count):
    with pytest.raises(ConfigError, match="at most"):
        check_count("draws", count)
