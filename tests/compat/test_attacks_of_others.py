"""Attacks of other libraries on our networks, and ours beside them: never weaker at equal budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import learn2perturb as l2p
from learn2perturb import attacks
from learn2perturb.attacks import APGD, CW, FGSM, PGD, Attack, Square

pytestmark = pytest.mark.compat

EPS, STEP, STEPS = 0.1, 0.02, 20
L2 = 0.6
QUERIES = 100
SEARCH = {"binary_search_steps": 3}
Libraries = Callable[[str], Any]

# attack -> library -> the library's attack of the same budget, as one of ours
PEERS: dict[str, dict[str, Callable[[Any], Attack]]] = {
    "fgsm": {
        "torchattacks": lambda lib: attacks.from_torchattacks(lib.FGSM, eps=EPS),
        "foolbox": lambda lib: attacks.from_foolbox(lib.attacks.FGSM(random_start=False), eps=EPS),
        "art": lambda lib: attacks.from_art(lib.FastGradientMethod, eps=EPS, batch_size=300),
    },
    "pgd": {
        "torchattacks": lambda lib: attacks.from_torchattacks(lib.PGD, eps=EPS, alpha=STEP, steps=STEPS),
        "foolbox": lambda lib: attacks.from_foolbox(lib.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS), eps=EPS),
        "adv_lib": lambda lib: attacks.from_adv_lib(lib.pgd_linf, eps=EPS, absolute_step_size=STEP, steps=STEPS),
        "art": lambda lib: attacks.from_art(
            lib.ProjectedGradientDescent, eps=EPS, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=300
        ),
    },
    "apgd": {
        "torchattacks": lambda lib: attacks.from_torchattacks(lib.APGD, eps=EPS, steps=STEPS),
        "adv_lib": lambda lib: attacks.from_adv_lib(
            functools.partial(lib.apgd, norm=float("inf"), loss_function="ce"), eps=EPS, n_iter=STEPS
        ),
        "art": lambda lib: attacks.from_art(
            lib.AutoProjectedGradientDescent,
            eps=EPS,
            eps_step=2 * EPS,
            max_iter=STEPS,
            nb_random_init=1,
            batch_size=300,
        ),
    },
    "cw": {
        "torchattacks": lambda lib: attacks.from_torchattacks(lib.CW, eps=L2, norm="l2", c=1, steps=120, lr=0.05),
        "foolbox": lambda lib: attacks.from_foolbox(
            lib.attacks.L2CarliniWagnerAttack(steps=40, stepsize=0.05, **SEARCH)
        ),
        "adv_lib": lambda lib: attacks.from_adv_lib(
            lib.carlini_wagner_l2, eps=L2, norm="l2", max_iterations=40, learning_rate=0.05, **SEARCH
        ),
        "art": lambda lib: attacks.from_art(
            lib.CarliniL2Method,
            eps=L2,
            norm="l2",
            max_iter=10,
            learning_rate=0.05,
            initial_const=1.0,
            batch_size=100,
            **SEARCH,
        ),
    },
    "square": {
        "torchattacks": lambda lib: attacks.from_torchattacks(lib.Square, eps=EPS, n_queries=QUERIES),
        "art": lambda lib: attacks.from_art(lib.SquareAttack, eps=EPS, max_iter=QUERIES, p_init=0.8, batch_size=100),
    },
}
OURS: dict[str, Attack] = {
    "fgsm": FGSM(EPS),
    "pgd": PGD(EPS, STEP, STEPS),
    "apgd": APGD(EPS, STEPS),
    "cw": CW(L2, steps=120, search_steps=1, lr=0.05, initial_c=1.0),
    "square": Square(EPS, queries=QUERIES),
}
IMAGES = {"cw": 100}  # of 300: it takes many passes. Two random searches differ by three of 100 images by chance
PAIRS = [(name, library) for name, peers in PEERS.items() for library in peers]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Libraries:
    return request.getfixturevalue


@pytest.fixture(scope="module")
def left(plain, digits) -> Callable[[str], float]:
    """The accuracy that each attack of ours leaves, evaluated once."""

    @functools.cache
    def accuracy(name: str) -> float:
        return l2p.evaluate(plain, digits, {name: OURS[name]}, limit=IMAGES.get(name)).row(name).accuracy

    return accuracy


@pytest.mark.parametrize(("name", "peer"), PAIRS)
def test_ours_leaves_no_more_accuracy_than_theirs(name, peer, library, plain, digits, left):
    attack = dataclasses.replace(PEERS[name][peer](library(peer)), eps=OURS[name].eps)
    result = l2p.evaluate(plain, digits, {"theirs": attack}, limit=IMAGES.get(name))
    theirs = result.row("theirs").accuracy
    assert left(name) <= theirs + 0.01
    assert theirs < result.row("clean").accuracy - 0.05  # it did attack


def test_on_a_stochastic_network_ours_is_at_or_below_theirs(library, noisy, digits):
    torchattacks = library("torchattacks")
    theirs = attacks.from_torchattacks(torchattacks.EOTPGD, eps=EPS, alpha=STEP, steps=4, eot_iter=4)
    result = l2p.evaluate(
        noisy, digits, {"ours": PGD(EPS, STEP, 4, eot=4), "theirs": theirs}, noise_off=False, batch_size=300
    )
    ours, others = result.row("ours"), result.row("theirs")
    assert ours.accuracy <= others.accuracy + 2 * (ours.std**2 + others.std**2) ** 0.5
    assert (ours.backward_passes, others.backward_passes) == (16, 16)


@pytest.mark.parametrize("peer", PEERS["pgd"])
def test_a_foreign_attack_behaves_like_one_of_ours(peer, library, noisy, digits):
    attack = PEERS["pgd"][peer](library(peer))
    x, y = digits[0][:40], digits[1][:40]
    noisy.train()
    noisy.block1.eval()
    modes = [module.training for module in noisy.modules()]
    statistics = {key: value.clone() for key, value in noisy.state_dict().items()}
    numpy_state = np.random.get_state()[1].copy()
    try:
        result = attack.run(noisy, x, y)
        assert [module.training for module in noisy.modules()] == modes
    finally:
        noisy.eval()
    assert all(torch.equal(value, statistics[key]) for key, value in noisy.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in noisy.parameters())
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert STEPS <= result.forward_passes <= STEPS + 3
    assert result.backward_passes == STEPS
    assert float(result.linf.max()) <= EPS + 1e-6
    assert not torch.equal(attack(noisy, x, y), result.x_adv)


@pytest.mark.parametrize("peer", PEERS["pgd"])
def test_a_seed_repeats_a_foreign_attack(peer, library, noisy, digits):
    attack = dataclasses.replace(PEERS["pgd"][peer](library(peer)), seed=3)
    x, y = digits[0][:20], digits[1][:20]
    assert torch.equal(attack(noisy, x, y), attack(noisy, x, y))
    assert not torch.equal(attack(noisy, x, y), dataclasses.replace(attack, seed=4)(noisy, x, y))


@pytest.mark.parametrize("peer", PEERS["pgd"])
def test_a_targeted_foreign_attack_reaches_for_the_class(peer, library, plain, digits):
    x, y = digits[0][:60], digits[1][:60]
    target = (y + 1) % 10
    attack = dataclasses.replace(PEERS["pgd"][peer](library(peer)), targeted=True, eps=0.3)
    with torch.no_grad():
        before = plain(x).log_softmax(1).gather(1, target[:, None]).mean()
        after = plain(attack(plain, x, target)).log_softmax(1).gather(1, target[:, None]).mean()
    assert after > before + 2


def test_without_a_radius_the_smallest_perturbation_is_asked_for(library, plain, digits):
    x, y = digits[0][:40], digits[1][:40]
    attack = attacks.from_foolbox(library("foolbox").attacks.L2DeepFoolAttack(steps=20))
    result = attack.run(plain, x, y)
    assert result.success_rate > 0.9
    assert result.l2.max() > 3 * result.l2.min()
    assert torch.isfinite(result.norms).float().mean() == pytest.approx(result.success_rate)


def test_a_foreign_attack_is_recorded_by_name(library):
    from learn2perturb.records import plain as as_json

    found = as_json(PEERS["pgd"]["torchattacks"](library("torchattacks")))
    assert found["build"] == "torchattacks.attacks.pgd.PGD"
    assert found["settings"] == {"alpha": STEP, "steps": STEPS}
