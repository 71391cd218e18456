"""Files of weights: read without executing anything, prefixes left out, refused with what does not fit."""

from __future__ import annotations

import lzma
import pathlib
import tempfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from learn2perturb import reading
from learn2perturb.errors import CheckpointError
from learn2perturb.models import build_model, load_weights
from learn2perturb.models.foreign import Foreign
from learn2perturb.runs.checkpoint import model_bytes
from learn2perturb.runs.loading import load
from learn2perturb.training.beginning import begin_from


def network(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("digits_cnn", classes, input_shape=(1, 8, 8))


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def before(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "as it is": (dict, ()),
    "DataParallel": (before("module."), ("module.",)),
    "compiled": (before("_orig_mod."), ("_orig_mod.",)),
    "compiled DataParallel": (before("_orig_mod.module."), ("_orig_mod.", "module.")),
    "DataParallel, compiled": (before("module._orig_mod."), ("module.", "_orig_mod.")),
    "Lightning": (lambda state: {"state_dict": before("model.")(state), "epoch": 3, "lr": [0.1]}, ("model.",)),
    "model": (lambda state: {"model": state, "optimizer": {"state": {}}, "best": torch.tensor(0.5)}, ()),
    "net": (lambda state: {"net": OrderedDict(before("module.")(state)), "acc": 0.5}, ("module.",)),
    "nested twice": (lambda state: {"model": {"state_dict": state}}, ()),
    "a compiled part": (lambda state: {k.replace("block1.", "block1._orig_mod."): v for k, v in state.items()}, None),
    "counters of another tool": (lambda state: {**state, "block1.total_ops": torch.zeros(1)}, ()),
    "without batch counters": (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, ()),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_fit_however_they_were_wrapped(how, tmp_path):
    wrap, cut = WRAPPED[how]
    content = wrap(dict(network(0).state_dict()))
    places = [tmp_path / "w.pth"]
    torch.save(content, places[0])
    if all(isinstance(value, torch.Tensor) for value in content.values()):  # safetensors holds nothing else
        places.append(tmp_path / "w.safetensors")
        save_file(content, places[1])
    for place in places:
        _check_fit(place, cut)


def _check_fit(place, cut):
    other = network(1)
    fit = load_weights(other, place)
    assert same(network(0), other)
    assert fit.matched >= len([key for key in other.state_dict() if "num_batches" not in key])
    assert cut is None or fit.left_out == cut


def test_weights_of_a_bare_network_fit_the_one_that_normalises_it(tmp_path):
    torch.save(network(0).state_dict(), tmp_path / "w.pt")
    whole = Foreign(network(1), nn.Identity())
    load_weights(whole, tmp_path / "w.pt")
    assert same(network(0), whole.network)


class Touches:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"state_dict": network().state_dict(), "x": Touches(tmp_path / "executed")}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="would run code of the file; save the state dict alone"):
        load_weights(network(), tmp_path / "w.pt")
    assert not (tmp_path / "executed").exists()


def _renamed(state):
    return {key.replace("bn1", "norm1"): value for key, value in state.items()}


DAMAGED = {
    "missing.pt": (None, "weights .*missing.pt cannot be read.*give a file of a state dict"),
    "whole.pt": (lambda net: net, "would run code of the file"),
    "list.pt": (lambda net: [1, 2], "hold a list and no state dict.*torch.save"),
    "numbers.pt": (lambda net: {"epoch": 3}, "entries 'epoch' and no state dict"),
    "short.pt": (lambda net: dict(list(net.state_dict().items())[:-2]), "'fc.weight', 'fc.bias' missing"),
    "more.pt": (lambda net: {**net.state_dict(), "mu": torch.zeros(3)}, "'mu' unexpected"),
    "names.pt": (lambda net: _renamed(net.state_dict()), "near names: norm1.weight for bn1.weight"),
    "classes.pt": (
        lambda net: network(0, 7).state_dict(),
        r"fc.weight is \[7, .*there and \[10, .*here: .*; build the net",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_refused_and_the_network_stays_as_it_was(name, tmp_path):
    make, words = DAMAGED[name]
    if make is not None:
        torch.save(make(network(0)), tmp_path / name)
    net = network(1)
    with pytest.raises(CheckpointError, match=words):
        load_weights(net, tmp_path / name)
    assert same(network(1), net)


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"PK\x03\x04" + b"\0" * 40])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".safetensors.xz"])
def test_damaged_files_are_one_line(content, suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read|would run code"):
        load_weights(network(), tmp_path / f"w{suffix}")


def test_a_head_of_other_classes_starts_anew_only_where_that_is_asked_for(tmp_path):
    torch.save(network(0, 7).state_dict(), tmp_path / "w.pt")
    net = network(1)
    fit = load_weights(net, tmp_path / "w.pt", new_head=True)
    assert fit.fresh == ("fc.bias", "fc.weight")
    assert "start anew" in str(fit)
    assert torch.equal(net.fc.weight, network(1).fc.weight)
    assert torch.equal(net.conv1.weight, network(0, 7).conv1.weight)


def packed(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    path = folder / "model.safetensors.xz"
    path.write_bytes(content)
    return path


def test_packed_weights_are_those_that_were_packed_in_every_place_and_nothing_stays_behind(tmp_path, monkeypatch):
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    trained = network(1)
    path = packed(tmp_path, lzma.compress(model_bytes(trained, {"input_shape": [1, 8, 8], "defense": "none"})))
    fitted, begun = network(2), network(3)
    load_weights(fitted, path)
    begin_from(begun, str(path))
    for found in (fitted, begun, load(path), load(tmp_path)):
        assert same(trained, found)
    assert list((tmp_path / "aside").iterdir()) == []


WHOLE = lzma.compress(b"no tensors are in this")
PACKED = {
    "cut off": (WHOLE[:-20], "it is cut off"),
    "more behind it": (WHOLE + b"more", "more behind its end"),
    "larger than it looks": (lzma.compress(bytes(2000)), "unpacked it has more than 1,000 bytes"),
    "other content": (WHOLE, "Safetensor"),
    "another bit": (WHOLE[:30] + bytes([WHOLE[30] ^ 1]) + WHOLE[31:], "Error"),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("read", [load, lambda path: load_weights(network(), path)], ids=["load", "load_weights"])
def test_damaged_packed_weights_are_one_line(name, read, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_UNPACKED", 1000)
    content, reason = PACKED[name]
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(packed(tmp_path, content))
    assert "\n" not in str(caught.value) and "model.safetensors.xz" in str(caught.value)
