"""Every default and every number of the attacks, by value, with its source: a change of one is a change of results."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from typing import Any

import pytest

from learn2perturb import attacks
from learn2perturb.registry import ATTACKS

# Of every attack, unless its own row says otherwise: 8/255 and l_inf are those of the literature on CIFAR-10.
SHARED: dict[str, Any] = {
    "eps": 8 / 255, "norm": "linf", "loss": "ce", "targeted": False, "eot": 1, "eot_average": "loss", "seed": None,
}  # fmt: skip
BOTH = ("linf", "l2")
EVERY = ("ce", "margin", "dlr")
# What an attack can do: needs gradients, looks for the least norm, has a targeted form, norms, losses.
ABLE: dict[str, tuple[bool, bool, bool, tuple[str, ...], tuple[str, ...]]] = {
    "FGSM": (True, False, True, BOTH, EVERY),
    "PGD": (True, False, True, BOTH, EVERY),
    "APGD": (True, False, True, BOTH, EVERY),
    "FAB": (True, True, True, BOTH, ("margin",)),
    "Square": (False, False, True, BOTH, ("margin", "ce")),
    "RayS": (False, False, True, ("linf",), ("margin",)),
    "SPSA": (False, False, True, BOTH, EVERY),
    "ARC": (True, False, False, BOTH, ("margin",)),
    "AutoAttack": (True, False, False, BOTH, ("margin",)),
    "CW": (True, True, True, ("l2",), ("margin",)),
    "FewPixel": (False, False, True, ("l0",), EVERY),
    "Transfer": (True, False, True, BOTH, EVERY),
    "BPDA": (True, True, True, BOTH, EVERY),
    "Surrogate": (False, False, True, BOTH, EVERY),
}
OWN: dict[str, dict[str, Any]] = {
    "FGSM": {},
    # Learn2Perturb, section 4: 7 steps of 0.01 (NaN: that, or what fits the radius).
    "PGD": {"step_size": math.nan, "steps": 7, "random_start": True, "restarts": 1, "eot_draws": "fresh"},
    # Dbouk, Shanbhag 2022, algorithm 2: 20 rounds; the step (NaN) is a quarter of the radius.
    "ARC": {
        "loss": "margin", "step_size": math.nan, "steps": 20, "targets": 3, "random_start": True, "restarts": 1,
    },
    # Croce, Hein 2020: 100 iterations, one run.
    "APGD": {"steps": 100, "targets": 0, "restarts": 1, "random_start": True, "early_stop": True},
    # The same, section 5: FAB-T with 9 target classes, 100 iterations.
    "FAB": {"eps": math.inf, "loss": "margin", "steps": 100, "targets": 9, "restarts": 1, "early_stop": False},
    # The same: 5000 queries; p = 0.8 as in AutoAttack.
    "Square": {"loss": "margin", "queries": 5000, "p_init": 0.8, "rescale": True, "restarts": 1},
    # Chen, Gu 2020: up to 40,000 decisions; here as many as Square.
    "RayS": {"loss": "margin", "queries": 5000},
    # Ours: a tenth of the radius a step (NaN); the running mean as in Ilyas et al. 2018.
    "SPSA": {
        "loss": "margin", "step_size": math.nan, "steps": 100, "directions": 32, "size": None, "momentum": 0.9,
        "sampling": "signs",
    },
    "AutoAttack": {
        "loss": "margin", "version": "standard", "steps": 100, "targets": 9, "queries": 5000, "draws": 20,
    },
    # Carlini, Wagner 2017: c from 1e-3 to 1e10 in 9 steps of a search, 1000 iterations; Learn2Perturb: 5e-4.
    "CW": {
        "eps": math.inf, "norm": "l2", "loss": "margin", "confidence": 0.0, "steps": 1000, "search_steps": 9,
        "lr": 5e-4, "initial_c": 1e-3, "largest_c": 1e10, "abort_early": True, "keep": "mean", "draws": 20,
    },
    # Su et al. 2019: 400 candidates; 75 generations as in its code.
    "FewPixel": {
        "eps": 1, "norm": "l0", "eot_average": "probability", "population": 400, "generations": 75,
        "strategy": "best1bin", "chunk": None,
    },
    "Transfer": {"eps": math.nan, "attack": None, "source": None},
    # Ours: what Square has, too.
    "Surrogate": {"queries": 5000, "attack": None, "data": None, "network": None},
    # NaN, 0 and "" are those of the attack inside.
    "BPDA": {"eps": math.nan, "eot": 0, "eot_average": "", "attack": None, "modules": "", "surrogate": None},
}  # fmt: skip

# Of what else is public.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "attacks.auto_attack_report": {"draws": 20, "batch_size": 256},
    "attacks.Attack.craft": {"mode": "eval"},
    "attacks.Source": {"name": None},
    "attacks.distil": {"draws": 1, "network": None, "progress": None, "eps": 8 / 255, "norm": "linf"},
    "attacks.bpda": {"surrogate": None},
    "attacks.list_attacks": {"pattern": "*"},
    "attacks.from_torchattacks": {"eps": None, "norm": "linf"},
    "attacks.from_adv_lib": {"eps": None, "norm": "linf"},
    "attacks.from_art": {"eps": None, "norm": "linf"},
    "attacks.from_function": {"eps": None, "norm": "linf"},
    "attacks.from_foolbox": {"eps": None, "norm": None},
    "attacks.gradients.input_gradient": {"eot": 1, "average": "loss", "at_once": 1},
    "attacks.gradients.value_and_gradient": {"eot": 1, "average": "loss", "at_once": 1},
    "attacks.gradients.fresh_values": {"eot": 1, "average": "loss", "at_once": 1},
    "attacks.gradients.each_draw": {"at_once": 1},
    "attacks.probing.passes_differ": {"seed": 0},
}
# Numbers inside the algorithms.
NUMBERS: dict[str, dict[str, Any]] = {
    "base": {"TOLERANCE": 1e-6},
    "gradients": {"_LARGEST_WEIGHT": 1e30},
    "arc": {"_BEYOND": 0.05},
    "apgd": {"_MOMENTUM": 0.75, "_RHO": 0.75},  # algorithm 1: alpha and rho
    "auto_attack": {"VERSIONS": ("standard", "rand")},
    "fab": {  # section 3: alpha_max, eta, beta, and the final search
        "_ALPHA": 0.1, "_OVERSHOOT": 1.05, "_BACK": 0.9, "_BISECTIONS": 8, "_WIDEST_START": {"linf": 0.3, "l2": 1.0},
    },
    # The paper's schedule, section 5 and its code.
    "square": {"_HALVED_AFTER": (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), "_RESCORE_EVERY": 10},
    "spsa": {"SAMPLINGS": ("signs", "gaussian"), "_ROWS": 256},
    "surrogate": {  # ours
        "_BATCH": 128, "_EPOCHS": 8, "_UPDATES": 50, "_LR": 2e-3, "_GAP": 4.0, "_STEPS": 3, "_WALK": 40, "_PROBED": 16,
    },
    "cw": {  # Kingma, Ba 2015 (Adam); the published code: a tenth of the steps, and 0.9999
        "_BETAS": (0.9, 0.999), "_TINY": 1e-8, "_INSIDE": 1 - 1e-6, "_CHECKS": 10, "_STUCK": 0.9999, "_PATIENCE": 3,
        "_JUDGEMENTS": 20, "_CONFIRMATION": 5, "_SMOOTHING": 0.9, "_FALLING": 0.99,
    },
    "ahead": {  # ours, measured
        "_POINTS_OF_A_PASS": {"cpu": 16_384}, "_POINTS_OF_A_PASS_ELSEWHERE": 1_048_576, "_BASE": 1.7,
        "_LARGEST_WINDOW": 0.2, "_LONGEST": 500,
    },
    "few_pixel": {"STRATEGIES": ("best1bin", "rand1"), "_ELITE": 0.1, "_FINAL_DRAWS": 20},
    "probing": {"_PROBES": 8, "_PROBED_IMAGES": 16, "_PROBES_OF_A_DRAWING_MODEL": 64},
    "rays": {"_OUTSIDE": 1.05},
    "foreign": {"_RADIUS_NAMES": ("eps", "ε", "epsilon"), "_OURS": ("targeted", "eot", "eot_average", "seed")},
}  # fmt: skip
# What a registered name sets.
ARGUMENTS = {
    "apgd_t": {"loss": "dlr", "targets": 9},
    "autoattack_rand": {"version": "rand", "eot": 20},
    "nes": {"sampling": "gaussian"},
}


def defaults(call: Any) -> dict[str, Any]:
    """Return the defaults of a function's or a class's arguments."""
    parameters = inspect.signature(call).parameters
    return {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Compare by text, since NaN is a default too; the order of arguments is not compared."""
    return {name: repr(value) for name, value in found.items()} == {name: repr(value) for name, value in wanted.items()}


def test_every_registered_attack_has_its_row():
    classes = {entry.load().__name__ for entry in ATTACKS}
    assert classes <= set(OWN), "a new attack: write its defaults down here, with their source"
    assert set(OWN) == set(ABLE)


@pytest.mark.parametrize("name", OWN)
def test_defaults_of_an_attack(name):
    attack = getattr(attacks, name)
    wanted = SHARED | OWN[name]
    assert same(defaults(attack), wanted), defaults(attack)
    assert {item.name for item in dataclasses.fields(attack)} == set(wanted)  # nothing without a default


@pytest.mark.parametrize("name", ABLE)
def test_what_an_attack_can_do(name):
    attack = getattr(attacks, name)
    able = attack.needs_gradient, attack.minimum_norm, attack.can_target, attack.norms, attack.losses
    assert able == ABLE[name]


@pytest.mark.parametrize("name", OWN)
def test_settings_besides_the_radius_and_the_steps_are_given_by_name(name):
    attack = getattr(attacks, name)
    by_place = [item.name for item in dataclasses.fields(attack) if not item.kw_only]
    assert by_place == {"PGD": ["eps", "step_size", "steps"], "APGD": ["eps", "steps"]}.get(name, ["eps"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_of_a_function(name):
    _, *path = name.split(".")
    found: Any = attacks
    for part in path:
        found = getattr(found, part)
    assert same(defaults(found), FUNCTIONS[name]), defaults(found)


@pytest.mark.parametrize("module", NUMBERS)
def test_numbers_of_an_algorithm(module):
    found = vars(importlib.import_module(f"learn2perturb.attacks.{module}"))
    assert {name: found[name] for name in NUMBERS[module]} == NUMBERS[module]


@pytest.mark.parametrize("entry", list(ATTACKS), ids=lambda entry: entry.name)
def test_what_a_name_sets(entry):
    assert dict(entry.arguments) == ARGUMENTS.get(entry.name, {})
