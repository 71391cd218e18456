"""Every default and every number of the defenses, by value, with its source: a change of one is a change of results."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from learn2perturb.defenses.objectives import Clock, Losses, TradesAdversary
from learn2perturb.defenses.settings import OpenSettings, Settings, later_settings
from learn2perturb.errors import ConfigError
from learn2perturb.registry import DEFENSES
from learn2perturb.training import TrainConfig

OWN: dict[str, dict[str, Any]] = {
    "NoDefense": {},
    "PGDTraining": {},
    "Madry": {},
    "Trades": {},
    # Wang et al. 2020: lambda 5 (code for ResNet-18).
    "MART": {"kl_weight": 5.0},
    # Rade, Moosavi-Dezfooli 2022: x + 2r, beta 2.5, gamma 0.5 (readme of the code).
    "HAT": {"helper": None, "reach": 2.0, "kl_weight": 2.5, "helper_weight": 0.5},
    # Jeddi et al. 2020: gamma 1e-4, noise from epoch 20, algorithm 1; theta from 0.25, at least 0.01 (released code).
    "Learn2Perturb": {
        "gamma": 1e-4, "noise_from_loss": True, "noise_ascends": False, "noise_delay": 20, "theta_step": "combined",
        "weight_steps": 1, "noise_steps": 1, "theta_lr": 1.0, "noise_target": None, "gamma_through_optimizer": True,
        "tau": "harmonic", "init": 0.25, "init_share": 0.25, "minimum": 0.01, "sharing": "per_example",
        "granularity": "element", "distribution": "gaussian",
        "placement": "block_ends", "sites": None,
    },
    # He et al. 2019: PNI-W, one alpha a layer, from 0.25.
    "PNI": {"variant": "weight", "granularity": "layer", "init": 0.25, "sites": None},
    # Liu et al. 2018 (Adv-BNN), released code: 0.1 for both, and 0.02 in its readme.
    "AdvBNN": {"prior": 0.1, "init": 0.1, "kl_weight": 0.02, "mean_init": "network", "stage_lengths": ()},
    # Liu et al. 2018 (RSE): noise of 0.2 before the first convolution, 0.1 before the others.
    "RSE": {"sigma_init": 0.2, "sigma_inner": 0.1, "adversarial": False, "restarts": False},
    # Salman et al. 2019: the smallest of its four sigmas.
    "SmoothAdv": {"sigma": 0.12},
    # Eustratiadis et al. 2021: L lower triangular.
    "WCA": {"variance": "anisotropic", "adversarial": False, "sharing": "per_example"},
    # Dong, Xu 2023: 48 of 64 filters, weight decay 1e-2 on the others (released code).
    "RPF": {"share": 0.75, "filter_decay": 1e-2},
    # Dong et al. 2022, released code: BatchNorm, or a GroupNorm of one channel a group.
    "RNA": {"channels": (1,)},
    # Ma et al. 2023, released code: the sum of sigma at least 2,048 of 3,072.
    "CTRW": {"least": 2 / 3, "sharing": "per_batch"},
    # Pinot et al. 2020: two members, drawn .9 and .1.
    "BAT": {"count": 2, "weight": 0.1},
    # Dbouk, Shanbhag 2023: five members, ARC of ten rounds (released code).
    "BARRE": {"count": 5, "osp_steps": 10, "osp_lr": 0.1, "arc_steps": 10},
    # Lecuyer et al. 2019: (1, 0.05)-differential privacy for changes up to 0.1.
    "PixelDP": {
        "bound": 0.1, "epsilon": 1.0, "delta": 0.05, "mechanism": "gaussian", "sensitivity": "measured",
        "parseval_loops": 10, "parseval_step": 3e-4, "ramp": True,
    },
}  # fmt: skip
BOTH = ("mixed", "trades")
# Predictor, its members, objectives. RSE and Adv-BNN report the mean softmax of 50 draws.
KIND: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "NoDefense": ("single", 10, ()),
    "PGDTraining": ("single", 10, BOTH),
    "Madry": ("single", 10, ("mixed",)),
    "Trades": ("single", 10, ("trades",)),
    "MART": ("single", 10, ()),
    "HAT": ("single", 10, ()),
    "Learn2Perturb": ("single", 10, BOTH),
    "PNI": ("single", 10, BOTH),
    "AdvBNN": ("mean_probability", 50, BOTH),
    "RSE": ("mean_probability", 50, BOTH),
    "SmoothAdv": ("mean_probability", 50, BOTH),
    "WCA": ("single", 10, BOTH),
    "RPF": ("single", 10, BOTH),
    "RNA": ("single", 10, BOTH),
    "CTRW": ("single", 10, BOTH),
    "BAT": ("single", 10, ()),
    "BARRE": ("single", 10, ()),
    "PixelDP": ("mean_probability", 50, ()),
}
ARGUMENTS = {
    "learn2perturb_r": {"noise_from_loss": False},
    "rse": {"adversarial": False},
    "rse_at": {"adversarial": True},
    "wca": {"adversarial": False},
    "wca_at": {"adversarial": True},
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "base.Alternation": {
        "kind": "combined", "weight_steps": 1, "noise_steps": 1, "noise_from_loss": True, "noise_ascends": False,
        "regulariser_through_optimizer": True,
    },
    "base.sgd_optimizers": {"noise_lr": 1.0, "noise_decay": 0.0},
    "base.build_defense": {"options": None},
    "base.list_defenses": {"pattern": "*"},
    "pixeldp.noise_deviation": {
        "sensitivity": 1.0, "bound": 0.1, "epsilon": 1.0, "delta": 0.05, "mechanism": "gaussian",
    },
}  # fmt: skip
CHOICES = {
    "base.ALTERNATIONS": ("combined", "sequential", "released"),
    "learn2perturb.PLACEMENTS": ("block_ends", "every_convolution"),
    "learn2perturb.TAUS": ("harmonic", "released"),
    "adv_bnn.MEAN_INITS": ("network", "released"),
    "pixeldp.MECHANISMS": ("gaussian", "laplace"),
    "pixeldp.SENSITIVITIES": ("measured", "assumed"),
    "pni.VARIANTS": ("weight", "output", "input"),
    "settings.SCHEDULES": ("step", "one_cycle", "cosine", "constant"),
    "settings.LABELS": ("predicted", "true"),
    "settings.MODES": ("eval", "train"),
    "settings.OBJECTIVES": BOTH,
    "settings.ATTACK_DRAWS": ("fresh", "held"),
    "settings.PREDICTIONS": ("single", "averaged"),
}
CLASSES = {entry.load().__name__: entry.load() for entry in DEFENSES}


def found(name: str) -> Any:
    module, attribute = name.split(".")
    return getattr(importlib.import_module(f"learn2perturb.defenses.{module}"), attribute)


def defaults(call: Any) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters
    return {key: each.default for key, each in parameters.items() if each.default is not inspect.Parameter.empty}


def test_every_registered_defense_has_its_row():
    assert set(CLASSES) == set(OWN) == set(KIND), "a new defense: write its defaults down here, with their source"


@pytest.mark.parametrize("name", OWN)
def test_options_of_a_defense(name):
    assert defaults(CLASSES[name]) == OWN[name]


@pytest.mark.parametrize("name", KIND)
def test_kind_of_a_defense(name):
    defense = CLASSES[name]
    assert (defense.predictor, defense.members, defense.objectives) == KIND[name]


def test_whose_steps_can_be_recorded():
    """All but PixelDP's, whose noise follows a ramp, HAT, of two networks, and what holds the adversary's draws."""
    assert [entry.name for entry in DEFENSES if not entry.facts.get("recordable")] == [
        "hat", "rpf", "rna", "ctrw", "bat", "barre", "pixeldp",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_options_are_given_by_name(name):
    assert all(item.kw_only for item in dataclasses.fields(CLASSES[name]))
    assert all(item.kw_only for item in dataclasses.fields(Settings))


@pytest.mark.parametrize("entry", list(DEFENSES), ids=lambda entry: entry.name)
def test_what_a_name_sets(entry):
    assert dict(entry.arguments) == ARGUMENTS.get(entry.name, {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_of_a_function(name):
    assert defaults(found(name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    assert found(name) == CHOICES[name]


def test_settings_say_nothing_until_a_recipe_does():
    assert set(defaults(OpenSettings).values()) == {None}
    assert OpenSettings().missing() == [item.name for item in dataclasses.fields(Settings)]
    with pytest.raises(ConfigError, match="epochs, .*are open; set them"):
        OpenSettings().closed()


def test_what_a_recipe_closes_is_what_is_open():
    closed = {item.name: f"{item.type} | None" for item in dataclasses.fields(Settings)}
    assert closed == {item.name: item.type for item in dataclasses.fields(OpenSettings)}
    # What came later is off where nothing is said, so that a training of before is what it was.
    assert later_settings() == {
        "norm": "linf", "optimizer": "sgd", "optimizer_options": {}, "warmup_epochs": 0.0, "clip_norm": 0.0,
        "accumulate": 1, "label_smoothing": 0.0, "consistency": 0.0,
    }  # fmt: skip
    config = TrainConfig(recipe="common", lr=0.03).resolve()
    assert {item.name: getattr(config, item.name) for item in dataclasses.fields(Settings)} == dataclasses.asdict(
        config.closed()
    )
    assert config.closed().lr == 0.03


def test_the_adversary_of_trades():
    # Zhang et al. 2019: 10 steps of 0.007, on CIFAR-10.
    attack = TradesAdversary()
    assert (attack.eps, attack.step_size, attack.steps, attack.norm) == (8 / 255, 0.007, 10, "linf")


def test_a_clock_starts_at_0_and_is_compared_by_its_numbers():
    assert Clock(2, 3, 5) == Clock(2, 3, 5, 0, 0, 0)
    assert hash(Clock(2, 3, 5)) == hash(Clock(2, 3, 5))
    assert Clock(2, 3, 5).step == 13
    empty = Losses(1.0)
    assert (empty.clean, empty.adversarial, empty.clean_correct, empty.adversarial_correct) == (None,) * 4
    assert empty.extra == {}
