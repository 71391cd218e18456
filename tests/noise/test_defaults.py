"""Every default and every number of the noise, by value, with its source: a change of one is a change of results."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from torch import nn

from learn2perturb import noise
from learn2perturb.noise.laws import noise_law
from learn2perturb.noise.sites import CONVOLUTIONS, NORMS, SELECTORS
from learn2perturb.registry import NOISES

# Learn2Perturb: theta starts at 0.25 and stays above 0.01 (its released code), one theta an element, a draw an example.
THETA: dict[str, Any] = {"init": 0.25, "minimum": 0.01, "learned": True, "relative": False}
DRAWS: dict[str, Any] = {"place": "output", "sharing": "per_example", "distribution": "gaussian"}
DEFAULTS: dict[str, dict[str, Any]] = {
    # None is the granularity of the law: an element, but of PNI's.
    "base.NoiseModule": {**DRAWS, "granularity": None, "channel_dim": 0},
    "laws.Perturbation": THETA,
    "inject.add_noise": {"place": "output", "input_shape": (3, 32, 32), "sites": None},
    "inject.perturb": {**THETA, **DRAWS, "granularity": "element", "input_shape": (3, 32, 32), "sites": None},
    # PNI: one alpha a layer, from 0.25.
    "laws.WeightPerturbation": {"place": "weight", "init": 0.25},
    "inject.perturb_weights": {"sites": None, "granularity": "layer", "init": 0.25},
    # Adv-BNN: sigma_0 and the first standard deviation 0.1.
    "laws.VariationalWeight": {"place": "weight", "init": 0.1, "prior": 0.1},
    # Gaussian dropout of rate 1/17: sigma^2 = p / (1 - p).
    "laws.Multiplicative": {"init": 0.25},
    # The defenses since 2020, by their released code: L lower triangular; 48 of 64 filters; groups of one channel;
    # the sum of sigma at least 2,048 of 3,072; two members.
    "correlated.CorrelatedNoise": {"variance": "anisotropic"},
    "projection.RandomProjection": {"place": "weight", "share": 0.75},
    "norms.RandomNorm": {"channels": (1,)},
    "gain.RandomGain": {"least": 2 / 3},
    "members.RandomMember": {"count": 2},
    "inject.perturb_images": {"input_shape": (3, 32, 32)},
    "laws.register_noise": {"paper": "", "year": None},
    "inject.vary_weights": {"sites": None, "init": 0.1, "prior": 0.1},
    "inject.named_noise": {"every_name": False},
    "inject.fixed_noise": {"seed": 0},
    "distributions.draw": {"channels_last": False},
    "sensitivity.sensitivity": {"norm": "l2", "check": True},
    "sensitivity.input_scale": {"check": True},
}
CHOICES = {
    "distributions.DISTRIBUTIONS": ("gaussian", "laplace", "uniform"),
    "base.GRANULARITIES": ("element", "channel", "layer"),
    "base.SHARINGS": ("per_example", "per_batch"),
    "places.FEATURES": ("output", "input"),
    "sensitivity.NORMS": ("l1", "l2"),
}


def found(name: str) -> Any:
    module, attribute = name.split(".")
    return getattr(importlib.import_module(f"learn2perturb.noise.{module}"), attribute)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    parameters = inspect.signature(found(name)).parameters
    defaults = {key: each.default for key, each in parameters.items() if each.default is not inspect.Parameter.empty}
    assert defaults == DEFAULTS[name]


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    assert tuple(found(name)) == CHOICES[name]


def test_granularity_of_each_law():
    usual = {entry.name: noise_law(entry.name)((2,), site="a").granularity for entry in NOISES}
    assert usual.pop("weight") == "layer"
    assert set(usual) >= {"feature", "variational", "multiplicative", "correlated", "projection", "norms", "gain"}
    assert set(usual.values()) == {"element"}


def test_every_public_function_with_defaults_has_its_row():
    have = set()
    for name in noise.__all__:
        value = getattr(noise, name)
        if callable(value) and value.__module__.startswith("learn2perturb.noise"):
            empty = inspect.Parameter.empty
            if any(each.default is not empty for each in inspect.signature(value).parameters.values()):
                have.add(name)
    assert have <= {name.split(".")[1] for name in DEFAULTS}, "write its defaults down here, with their source"


def test_fresh_noise_is_on_and_not_replayed():
    module = noise.Perturbation((2,), site="a")
    assert module.enabled
    assert module.replay is None


def test_what_the_selectors_take():
    kinds = {
        "@convolutions": (nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Conv3d(1, 1, 1)),
        "@norms": (
            nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2),
            nn.LocalResponseNorm(2),
        ),
        "@linears": (nn.Linear(1, 1),),
    }  # fmt: skip
    assert set(SELECTORS) == set(kinds)
    for own, layers in kinds.items():
        for layer in layers:
            assert [name for name, takes in SELECTORS.items() if takes("", layer)] == [own]
    assert not any(takes("", nn.ReLU()) for takes in SELECTORS.values())
    assert all(isinstance(layer, NORMS) for layer in kinds["@norms"])
    assert all(isinstance(layer, CONVOLUTIONS) for layer in kinds["@convolutions"])
