"""Code of the user's own that was changed is not taken for the same: on resume, by `compare`, by a study."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import learn2perturb as l2p
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import compare
from learn2perturb.evaluation.keeping import Unfinished
from learn2perturb.evaluation.own_parts import own_parts
from learn2perturb.experiments.store import run_address
from learn2perturb.plugins import codes_of
from learn2perturb.registry import ATTACKS, DEFENSES, NOISES

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from learn2perturb.attacks import Attack
from learn2perturb.defenses import Defense
from learn2perturb.noise.base import NoiseModule
from learn2perturb.registry import ATTACKS, DEFENSES, NOISES


def flip(image):
    return image.flip(-1)


def joined(items):
    x, y = zip(*items)
    return torch.stack(x), torch.stack(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.last = nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.flat(x))


def net():
    return Net()


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True, kw_only=True)
class Own(Defense):
    """Plain training by another name."""
    stochastic: ClassVar[bool] = False


class Law(NoiseModule):
    """A fixed size."""
    settings = ()

    def noisy(self, value, eps):
        return value + 0.1 * eps

    def scale(self):
        return "size", self.scale_shape


@dataclass(frozen=True)
class Up(Attack):
    """All pixels up."""
    def perturb(self, query, x, y):
        return x + self.eps


DEFENSES.register("code_own", "mine_code:Own", "plain")
ATTACKS.register("code_up", "mine_code:Up", "up")
'''
TRAIN = {
    "recipe": "fast", "limit": 32, "batch_size": 16, "monitor": 0, "tensorboard": False, "device": "cpu",
    "engine": "plain", "dataset": "digits", "model": "digits_cnn", "defense": "none",
}  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Give a function that writes the module, some of its text replaced, and imports it anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(old: str = "", new: str = ""):
        assert old in MODULE
        (tmp_path / "mine_code.py").write_text(MODULE.replace(old, new) if old else MODULE)
        monkeypatch.delitem(sys.modules, "mine_code", raising=False)
        for registry, name in ((DEFENSES, "code_own"), (ATTACKS, "code_up")):
            registry._entries.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("mine_code")

    yield write
    for registry, name in ((DEFENSES, "code_own"), (ATTACKS, "code_up"), (NOISES, "code/law")):
        registry._entries.pop(name, None)


def loader(module):
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,)))
    return DataLoader(data, batch_size=16, collate_fn=module.joined)


# What is changed -> settings of a training that uses it, its data and network, the change, what the refusal calls it.
PARTS = {
    "transform": ({"transforms": "mine_code:flip"}, None, None, "flip(-1)", "flip(-2)", "transform mine_code:flip"),
    "defense": ({"defense": "code_own"}, None, None, "stochastic: ClassVar[bool] = False",
                "stochastic: ClassVar[bool] = bool(0)", "defense code_own"),
    "collate_fn": ({}, loader, lambda module: module.build(), "torch.stack(x), ", "torch.stack(x) * 0.5, ",
                   "collate_fn joined"),
    "network": ({}, None, lambda module: module.Net(), "self.last(self.flat(x))", "-self.last(self.flat(x))",
                "module Net"),
    "network by name": ({"model": "mine_code:net"}, None, None, "self.last(self.flat(x))", "-self.last(self.flat(x))",
                        "module Net"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_a_training_goes_on_with_the_same_code_only(kind, written, tmp_path):
    settings, data, network, old, new, named = PARTS[kind]

    def train(module, epochs: int):
        return l2p.train(
            l2p.TrainConfig(**TRAIN | settings, epochs=epochs), out=tmp_path / "run", progress=False,
            data=None if data is None else data(module), model=None if network is None else network(module),
        )  # fmt: skip

    torch.manual_seed(0)
    run = train(written(), 1)
    assert run.metrics
    assert named in [f"{part['kind']} {part['name']}" for part in _header(tmp_path / "run")["parts"]]
    with pytest.raises(CheckpointError, match=f"trained with other code of {named} .*another --out"):
        train(written(old, new), 2)
    torch.manual_seed(0)
    assert len(train(written("def flip(image):", "def flip(image):  # turn it"), 2).metrics) == 2


def _header(run):
    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.files import locate

    return read_model(locate(str(run)))[1]


@pytest.mark.parametrize("kind", ["transform", "defense", "network by name"])
def test_a_study_trains_anew_where_the_code_is_another(kind, written):
    settings, _, _, old, new, _ = PARTS[kind]
    addresses = []
    for change in ((), (old, new), ("def flip(image):", "def flip(image):  # turn it")):
        written(*change)
        addresses.append(run_address(l2p.TrainConfig(**TRAIN | settings, epochs=1).resolve(), "data"))
    assert addresses[0] == addresses[2] != addresses[1]


def test_an_address_without_parts_of_ones_own_is_as_it_was():
    from learn2perturb.experiments.store import _FREE, address

    config = l2p.TrainConfig(**TRAIN, epochs=1).resolve()
    settings = {key: value for key, value in config.deciding().items() if key not in _FREE}
    assert run_address(config, "data") == address(kind="run", config=settings, data="data")


def evaluated(module, keep=None, **changes):
    torch.manual_seed(0)
    model = changes.pop("model", None) or module.Net().eval()
    data = l2p.load_data("digits", "test", limit=20)
    attacks = {"up": module.Up(eps=0.1), "fgsm": l2p.attacks.FGSM(0.1)}
    return l2p.evaluate(model, data, attacks, draws=1, device="cpu", engine="plain", progress=False, keep=keep)


def test_rows_of_an_own_attack_are_compared_only_if_its_code_is_the_same(written):
    first = evaluated(written())
    second = evaluated(written("return x + self.eps", "return x - self.eps"))
    found = compare(first, second)
    assert [one.first for one in found.differences] == ["clean", "fgsm 0.1"]
    assert "attack Up is of other code in the two" in found.notes
    assert any("up" in line and "differs in its code" in line for line in found.left_out)
    named = compare(first, second, pairs=[("up", "up")])
    assert any("not the same attack: other code" in note for note in named.notes)
    same = compare(first, evaluated(written("All pixels up", "Up")))
    assert len(same.differences) == 3 and not any("code" in note for note in same.notes)


def test_finished_rows_are_of_the_same_code(written, tmp_path):
    class Stop(Exception):
        pass

    class Once(Unfinished):
        def keep(self, found, images=None):
            super().keep(found, images)
            raise Stop

    def begun(module, folder):
        keep = Once(folder)
        with pytest.raises(Stop), keep:
            evaluated(module, keep=keep)
        return keep.path

    first = begun(written(), tmp_path / "kept")
    changed = begun(written("self.last(self.flat(x))", "-self.last(self.flat(x))"), tmp_path / "kept")
    assert first != changed, "its weights are the same, and its pass is another"
    assert begun(written("def flip(image):", "def flip(image):  # turn it"), tmp_path / "kept") == first


def test_every_function_that_numbers_follow_from_is_told(written):
    module, attacks = written(), l2p.attacks
    around = attacks.BPDA(attack=attacks.PGD(eps=0.1, steps=1), modules="0", surrogate=module.flip)
    given = [around, attacks.from_function(module.joined, eps=0.1)]
    found = own_parts(abs, attacks=given, others=[module.flip, module.Net()])
    told = set(codes_of(found))
    assert {"function BPDA.surrogate flip", "function flip", "module Net"} <= told
    assert any(name.endswith(" joined") for name in told)
    part = own_parts(others=[module.flip])["parts"][0]
    assert (part["kind"], part["file"], len(part["sha256"]), len(part["code"])) == ("function", "mine_code.py", 64, 16)
