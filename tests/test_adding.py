"""What it takes to add something: each from a module in a folder of its own, then used by name like any other.

A check more is in ``tests/diagnosis/test_checks.py``, an option more in ``tests/test_configs.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.cli.main import main
from learn2perturb.noise import add_noise, noise_modules
from learn2perturb.registry import ATTACKS, DEFENSES, NOISES

# Two files each inside the package: this one, and the line of the registry that stands at its end here.
ATTACK = '''
"""An attack: the corner of the ball that every pixel's mean points to."""

from dataclasses import dataclass, field
from typing import ClassVar

from learn2perturb.attacks import Attack
from learn2perturb.registry import ATTACKS


@dataclass(frozen=True)
class Corner(Attack):
    """Move all pixels up, or down.

    Args:
        down: move them down.
    """

    down: bool = field(default=False, kw_only=True)
    needs_gradient: ClassVar[bool] = False

    def perturb(self, query, x, y):
        return x - self.eps if self.down else x + self.eps


ATTACKS.register("corner", "added_attack:Corner", "all pixels up or down", needs_gradient=False)
'''
DEFENSE = '''
"""A defense: training on clean images with smoothed labels."""

from dataclasses import dataclass

from torch.nn import functional as F

from learn2perturb.defenses import Defense, Losses, forward
from learn2perturb.registry import DEFENSES


@dataclass(frozen=True, kw_only=True)
class Smoothed(Defense):
    """Cross-entropy on clean images with label smoothing."""

    smoothing: float = 0.1

    def loss(self, model, x, y, clock, settings):
        return Losses(F.cross_entropy(forward(model, x), y, label_smoothing=self.smoothing))


DEFENSES.register("smoothed", "added_defense:Smoothed", "label smoothing", stochastic=False, adversarial=False)
'''
# One file, anywhere.
LAW = '''
"""A noise law: noise in proportion to a learned power of two."""

import torch
from torch import nn

from learn2perturb.noise import NoiseModule, register_noise


@register_noise("added/power")
class Power(NoiseModule):
    """``v + 2^p eps``."""

    settings = ("init",)

    def __init__(self, shape, *, init=-3.0, **place):
        super().__init__(shape, **place)
        self.init, self.power = init, nn.Parameter(torch.full(self.scale_shape, init))

    def noisy(self, value, eps):
        return value + self.power.exp2() * eps

    def scale(self):
        return "size", self.power.exp2()
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Give what puts a module's text into a file and imports it; all registries are put back."""
    monkeypatch.syspath_prepend(tmp_path)
    before = [dict(one._entries) for one in (ATTACKS, DEFENSES, NOISES)]

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        __import__(name)

    yield add
    for registry, entries in zip((ATTACKS, DEFENSES, NOISES), before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
    for name in ("added_attack", "added_defense", "added_law"):
        sys.modules.pop(name, None)


def test_an_attack_is_a_file_and_a_line(added, tmp_path, capsys):
    added("added_attack", ATTACK)
    data = l2p.load_data("digits", "test", limit=20)
    model = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    row = l2p.evaluate(model, data, {"corner": ATTACKS.entry("corner").load()(0.1, down=True)}).row("corner")
    assert (row.attack_type, row.linf, row.backward_passes) == ("Corner", pytest.approx(0.1), 0)
    assert main(["list", "attacks", "corner"]) == 0
    assert "down = False    move them down" in capsys.readouterr().out
    train = ["train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--epochs=0", "--device=cpu"]
    assert main([*train, "--monitor=0", "--tensorboard=false", "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--attack=corner:eps=0.1,down=true", "--limit=10"]) == 0
    assert "corner:eps=0.1,down=true" in capsys.readouterr().out


def test_a_defense_is_a_file_and_a_line(added, tmp_path):
    added("added_defense", DEFENSE)
    config = l2p.TrainConfig(
        defense="smoothed", options={"smoothing": 0.2}, model="digits_cnn", dataset="digits", recipe="fast", epochs=1,
        limit=64, batch_size=32, monitor=0, tensorboard=False, engine="plain", device="cpu",
    )  # fmt: skip
    run = l2p.train(config, out=tmp_path / "run")
    assert "smoothed" in l2p.list_defenses()
    again = l2p.load(tmp_path / "run")
    assert all(torch.equal(one, other) for one, other in zip(run.model.parameters(), again.parameters(), strict=True))


def test_a_noise_law_is_a_file(added):
    added("added_law", LAW)
    network = add_noise(
        l2p.build_model("digits_cnn", input_shape=(1, 8, 8)), "added/power", input_shape=(1, 8, 8), init=-2.0
    )
    x = torch.rand(2, 1, 8, 8)
    with l2p.fixed_noise(network, seed=0):
        assert torch.equal(network(x), network(x))
    assert not torch.equal(network(x), network(x))
    assert {float(module.scale()[1].detach().mean()) for module in noise_modules(network)} == {0.25}
    assert l2p.noise_parameters(network)
