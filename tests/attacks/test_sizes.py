"""What a radius and a step may be: one rule, wherever they are set."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.attacks import FGSM, PGD, Attack, Transfer
from learn2perturb.attacks.spec import attacks_of_size, build_attacks
from learn2perturb.defenses.objectives import TradesAdversary
from learn2perturb.errors import ConfigError
from learn2perturb.presets import PRESETS, preset
from learn2perturb.registry import ATTACKS

DATA = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
MAKERS = {
    "PGD": lambda eps, step, norm="linf": PGD(eps, step, norm=norm),
    "TRADES": lambda eps, step, norm="linf": TradesAdversary(eps, step_size=step, norm=norm),
    "training": lambda eps, step, norm="linf": l2p.TrainConfig(eps=eps, attack_step_size=step),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("eps", "step"), [(8 / 255, 2), (8 / 255, 17 / 255), (0.5, 1.01), (0.5, -0.1)])
def test_a_step_is_at_most_the_diameter_of_the_ball(maker, eps, step):
    with pytest.raises(ConfigError, match=r"step_size"):
        MAKERS[maker](eps, step)
    MAKERS[maker](8 / 255, 16 / 255)  # the diameter itself: from one side to the other


def test_an_l2_step_is_judged_by_the_l2_radius():
    assert PGD(2.0, 4.0, norm="l2").step_size == 4
    with pytest.raises(ConfigError, match=r"step_size=2 is more than twice eps=0.5"):
        PGD(0.5, 2, norm="l2")


def test_a_step_that_is_not_given_fits_the_radius():
    assert PGD().step_size == PGD(0.3).step_size == PGD(8 / 255, norm="l2").step_size == 0.01
    assert PGD(1 / 255).step_size == pytest.approx(0.01 / 8)
    assert PGD(0).step_size == 0.01


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("eps", [0.5 / 255, 2 / 255, 8 / 255, 16 / 255])
def test_no_preset_steps_out_of_its_ball(name, eps):
    (attack,) = build_attacks({name: preset(name, 3)}, eps).values()
    if attack.sized:
        attack = attack.resized(eps)
        assert attack.eps == eps
    assert getattr(attack, "step_size", 0) <= attack.eps


def test_evaluate_shrinks_steps_with_the_radius_and_says_so_in_the_record():
    found = l2p.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), DATA, {"pgd": PGD(steps=1)}, eps=[1 / 255, 0.1])
    assert [row.parameters["step_size"] for row in found.rows[1:]] == [pytest.approx(0.01 / 8), 0.01]
    assert Transfer(1 / 255, attack=PGD(), source=nn.Identity()).resized(0.1).eps == 0.1


def test_one_eps_is_no_radius_of_two_norms():
    attacks = {"linf": FGSM(), "l2": FGSM(0.5, norm="l2")}
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ConfigError, match="norms l2 and linf"):
        l2p.evaluate(network, DATA, attacks, eps=8 / 255)
    found = l2p.evaluate(network, DATA, attacks | {"least": l2p.attacks.build_attack("cw", steps=1, search_steps=1)})
    assert [row.eps for row in found.rows] == [None, 8 / 255, 0.5, math.inf]


def test_an_l2_attack_does_not_get_the_runs_linf_radius():
    with pytest.raises(ConfigError, match=r"'pgd:norm=l2': norm is 'l2' and no eps is given; 8/255 is an l_inf radius"):
        build_attacks({"pgd:norm=l2": ("pgd", {"norm": "l2"})}, 8 / 255)
    built = build_attacks({"a": ("pgd", {"norm": "l2", "eps": 0.5}), "b": ("pgd", {"step_size": 0.1})}, 0.2)
    assert (built["a"].eps, built["b"].step_size, built["b"].resized(0.2).step_size) == (0.5, 0.1, 0.1)


@pytest.mark.parametrize("recipe", ["paper", "released", "common", "fast"])
@pytest.mark.parametrize("defense", ["pgd_at", "trades", "madry", "adv_bnn"])
def test_a_recipes_step_fits_the_radius_that_is_set(recipe, defense):
    config = l2p.TrainConfig(recipe=recipe, defense=defense, eps=1 / 255).resolve()
    assert config.attack_step_size < 1 / 255
    plain = l2p.TrainConfig(recipe=recipe, defense=defense).resolve()
    assert l2p.TrainConfig(recipe=recipe, defense=defense, eps=plain.eps).resolve() == plain


@pytest.mark.parametrize("eps", [-1.0, 8, math.nan, math.inf, "8/255", True])
def test_what_is_no_size_is_refused_everywhere(eps):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    for call in (
        lambda: PGD(eps),
        lambda: l2p.TrainConfig(eps=eps),
        lambda: l2p.evaluate(network, DATA, {"pgd": PGD()}, eps=eps),
        lambda: l2p.certify(network, DATA, n=5, n0=2, sigma=0.1, eps=eps),
        lambda: l2p.diagnose(network, DATA, eps=eps),
    ):
        with pytest.raises(ConfigError, match="eps"):
            call()


SIZES = {"linf": 0.2, "l2": 0.5}
SPECS = {
    "pgd20": preset("pgd20", 3),  # of a preset: its step is for l_inf
    "mine": ("pgd", {"step_size": 0.2, "steps": 3}),
    "own": ("pgd", {"norm": "linf", "steps": 3}),
    "sized": ("pgd", {"eps": 0.3}),
    "cw": ("cw", {"steps": 2}),  # looks for the smallest
    "square": ("square", {"queries": 5}),
    "few": ("few_pixel", {"generations": 2}),  # knows pixels alone
}


def test_attacks_written_for_linf_are_put_into_another_norm():
    before = {row: (name, dict(settings)) for row, (name, settings) in SPECS.items()}
    found = attacks_of_size(SPECS, SIZES.__getitem__, norm="l2", usual_steps=PRESETS)
    assert list(found) == list(SPECS) and before == SPECS
    assert {row: (attack.norm, attack.eps) for row, attack in found.items()} == {
        "pgd20": ("l2", 0.5), "mine": ("l2", 0.5), "own": ("linf", 0.2), "sized": ("l2", 0.3), "cw": ("l2", math.inf),
        "square": ("l2", 0.5), "few": ("l0", 1),
    }  # fmt: skip
    assert found["mine"].step_size == 0.2 and "step_size" in SPECS["pgd20"][1]
    assert found["pgd20"] == PGD(0.5, steps=found["pgd20"].steps, norm="l2")
    kept = attacks_of_size({"pgd20": SPECS["pgd20"]}, SIZES.__getitem__, norm="l2")  # nobody says that it is a preset's
    assert kept["pgd20"].step_size == SPECS["pgd20"][1]["step_size"]


@dataclasses.dataclass(frozen=True)
class Smallest(Attack):
    """Looks for the smallest change, by steps."""

    eps: float = math.inf
    step_size: float = 0.1
    minimum_norm: ClassVar[bool] = True

    def perturb(self, query, x, y):
        return x


def test_a_step_gives_no_radius_to_an_attack_that_looks_for_the_smallest(monkeypatch):
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    ATTACKS.register("smallest", f"{__name__}:Smallest", "for this test")
    specs = {"own": ("smallest", {"step_size": 0.3})}
    for found in (build_attacks(specs), attacks_of_size(specs, SIZES.__getitem__)):
        assert (found["own"].eps, found["own"].step_size) == (math.inf, 0.3)


def test_attacks_have_the_size_of_the_run_unless_they_bring_one():
    sizes = []
    found = attacks_of_size(SPECS, lambda norm: (sizes.append(norm), SIZES[norm])[1])
    assert {row: (attack.norm, attack.eps) for row, attack in found.items()} == {
        "pgd20": ("linf", 0.2), "mine": ("linf", 0.2), "own": ("linf", 0.2), "sized": ("linf", 0.3),
        "cw": ("l2", math.inf), "square": ("linf", 0.2), "few": ("l0", 1),
    }  # fmt: skip
    assert sizes == ["linf"] * 4  # asked for where it is needed only
    asked = attacks_of_size(SPECS, SIZES.__getitem__, asked=(0.02, 0.2))  # who runs them gives them their sizes
    assert asked["mine"].step_size == 0.2 and asked["sized"].eps == 0.3 and asked["own"].eps == PGD().eps
    with pytest.raises(ConfigError, match="attack 'mine'"):
        attacks_of_size({"mine": SPECS["mine"]}, SIZES.__getitem__, asked=(0.02, 0.03))


def test_in_linf_the_step_of_a_preset_is_kept():
    found = attacks_of_size({"pgd20": SPECS["pgd20"]}, SIZES.__getitem__, usual_steps=PRESETS)
    assert found["pgd20"].step_size == pytest.approx(SPECS["pgd20"][1]["step_size"])
    assert (found["pgd20"].norm, found["pgd20"].eps) == ("linf", 0.2)
