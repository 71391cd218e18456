"""What is one norm's own is not used with another: radii, steps, the whole box, the radii of a sweep."""

from __future__ import annotations

import dataclasses
import math

import pytest

from learn2perturb.attacks import PGD, Attack
from learn2perturb.attacks.balls import BALLS
from learn2perturb.certification import CertifyConfig
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import diagnose
from learn2perturb.diagnosis.budget import QUICK, with_grid
from learn2perturb.errors import ConfigError
from learn2perturb.registry import ATTACKS
from learn2perturb.sizes import LINF_EPS, reach, sweep, usual_eps, usual_step, whole_box

CIFAR, DIGITS = 3 * 32 * 32, 64
SIZED = [
    entry for entry in ATTACKS if not entry.facts.get("needs") and {"linf", "l2"} <= set(entry.load().norms)
]  # fmt: skip


def test_attacks_of_several_norms_are_found():
    assert {entry.name for entry in SIZED} >= {"fgsm", "pgd", "apgd", "apgd_t", "fab", "square", "autoattack"}


@pytest.mark.parametrize("entry", SIZED, ids=lambda entry: entry.name)
def test_no_attack_takes_the_linf_radius_for_another_norm(entry):
    kind: type[Attack] = entry.load()
    own = kind(**entry.arguments)
    if own.eps == math.inf:  # the norm is what it looks for
        assert kind(norm="l2", **entry.arguments).eps == math.inf
        return
    assert own.eps == 8 / 255
    for made in (lambda: kind(norm="l2", **entry.arguments), lambda: dataclasses.replace(own, norm="l2")):
        with pytest.raises(ConfigError, match="norm is 'l2' and no eps is given; 8/255 is an l_inf radius"):
            made()
    assert kind(8 / 255, norm="l2", **entry.arguments).eps == 8 / 255  # it was said


@pytest.mark.parametrize("norm", BALLS)
def test_a_norm_has_a_usual_radius_or_a_refusal(norm):
    if norm == "linf":
        assert usual_eps(norm) == CertifyConfig.eps == LINF_EPS == 8 / 255
    else:
        with pytest.raises(ConfigError, match="give one of this norm: eps=0.5"):
            usual_eps(norm)


def test_a_step_that_is_not_given_is_one_of_the_norm():
    assert usual_step("linf", 0.3) == usual_step("linf", 8 / 255) == PGD().step_size == 0.01
    assert usual_step("linf", 1 / 255) == pytest.approx(0.01 / 8)
    assert PGD(0.5, norm="l2").step_size == usual_step("l2", 0.5) == pytest.approx(0.5 * 0.31875)
    assert (
        7 * PGD(0.5, norm="l2").step_size > 2 * 0.5
    )  # seven steps cross the ball: .01 would not leave a seventh of it
    assert PGD(0.0, norm="l2").step_size > 0


@pytest.mark.parametrize(
    ("norm", "pixels", "whole"), [("linf", CIFAR, 1.0), ("l2", DIGITS, 8.0), ("l2", CIFAR, 3072**0.5)]
)
def test_the_whole_box_has_a_radius_in_each_norm(norm, pixels, whole):
    assert whole_box(norm, pixels) == pytest.approx(whole)


def test_the_sweep_of_the_usual_radius_is_that_of_the_literature():
    assert [255 * eps for eps in sweep("linf", 8 / 255, CIFAR)] == pytest.approx([2, 4, 8, 16, 32, 64, 128])


@pytest.mark.parametrize("pixels", [1, DIGITS, CIFAR, 3 * 224 * 224])
@pytest.mark.parametrize("share", [1e-4, 0.01, 0.03, 0.15, 0.25, 0.3, 0.49, 0.5, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("norm", BALLS)
def test_a_sweep_goes_through_eps_beyond_it_and_to_chance(norm, share, pixels):
    whole = whole_box(norm, pixels)
    eps = share * whole
    sizes = sweep(norm, eps, pixels)
    assert list(sizes) == sorted(set(sizes))
    assert eps in sizes
    assert sizes[0] < eps
    assert sizes[-1] > eps or eps == whole
    assert whole / 2 * (1 - 1e-9) <= sizes[-1] <= whole
    assert len(sizes) <= 9


@pytest.mark.parametrize("norm", BALLS)
def test_a_grid_of_ones_own_is_kept_and_extended_where_it_ends_too_early(norm):
    whole = whole_box(norm, DIGITS)
    short = dataclasses.replace(QUICK, eps_grid=(0.1 * whole, 0.2 * whole))
    assert with_grid(short, norm, 0.1 * whole, DIGITS).eps_grid == (0.1 * whole, 0.2 * whole, 0.5 * whole)
    assert with_grid(short, norm, 0.4 * whole, DIGITS).eps_grid[-1] == reach(norm, 0.4 * whole, DIGITS) == 0.8 * whole
    full = dataclasses.replace(QUICK, eps_grid=(0.1 * whole, 0.7 * whole))
    assert with_grid(full, norm, 0.2 * whole, DIGITS) == dataclasses.replace(full, near=2 * (0.2 * whole))
    assert with_grid(QUICK, norm, 0.2 * whole, DIGITS).eps_grid == sweep(norm, 0.2 * whole, DIGITS)


def test_diagnose_refuses_what_no_norm_allows(monkeypatch):
    for settings, reason in (
        ({"norm": "l2"}, "norm is 'l2' and no eps is given"),
        ({"norm": "l1", "eps": 1.0}, "norm is 'l1'; allowed: linf, l2"),
        ({"norm": "l2", "attack": PGD(0.1)}, "norm is 'l2' and that of the attack 'linf'"),
        ({"eps": 1.5}, "more than a pixel's whole range"),
        ({"norm": "l2", "eps": math.inf}, "must be a number above 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            diagnose(lambda x: x.flatten(1), None, **settings)
    assert main(["diagnose", "runs/none", "--norm", "l2"]) == 2
    assert main(["diagnose", "runs/none", "--norm", "l7", "--eps", "0.5"]) == 2
