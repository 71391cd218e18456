"""Attacks in low precision: what they find holds in full precision, where everything is scored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.attacks import BPDA, FAB, PGD, AutoAttack, auto_attack_report, build_attack, from_function
from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution
from learn2perturb.registry import ATTACKS

LOW = dataclasses.replace(execution.PLAIN, name="low", dtype=torch.bfloat16)
# Short forms; the others take a radius alone.
SHORT = {
    "pgd": {"step_size": 0.04, "steps": 10}, "apgd": {"steps": 15}, "apgd_t": {"steps": 10, "targets": 3},
    "fab": {"eps": float("inf"), "steps": 15, "targets": 3}, "square": {"queries": 150}, "rays": {"queries": 150},
    "spsa": {"steps": 5}, "nes": {"steps": 5}, "autoattack": {"steps": 8, "targets": 2, "queries": 20},
    "autoattack_rand": {"steps": 8, "eot": 1}, "arc": {"steps": 5},
    "cw": {"steps": 40, "search_steps": 4, "lr": 0.02, "initial_c": 1.0},
    "few_pixel": {"eps": 1, "population": 30, "generations": 5}, "fgsm": {}, "transfer": {}, "surrogate": {},
    "bpda": {"attack": FAB(steps=15, targets=3), "modules": "relu1"},
}  # fmt: skip
OF_OTHERS = {"transfer", "surrogate"}  # they attack another network


@pytest.fixture(scope="module")
def digits():
    data = l2p.load_data("digits", "test", limit=150)
    return l2p.load("zoo:pgd_at-digits").eval(), data.images.float() / 255, data.labels


def test_every_attack_has_a_short_form():
    assert set(SHORT) == {entry.name for entry in ATTACKS}


@pytest.mark.parametrize("name", sorted(set(SHORT) - OF_OTHERS - {"bpda"}))
def test_low_precision_fools_as_many_in_full_precision(name, digits):
    """A point on the boundary is over it by rounding alone: FAB in bfloat16 left 12 points more than in float32."""
    network, x, y = digits
    settings = {"eps": 0.15} | SHORT[name] if name != "cw" else SHORT[name]
    fooled = []
    for mode in (execution.PLAIN, LOW):
        with execution.running(mode):
            result = build_attack(name, **settings, seed=0).run(network, x, y)
        with torch.no_grad():
            wrong = network(result.x_adv).argmax(dim=1) != y
        assert torch.equal(result.success, wrong)  # what it says of itself is what scores it
        fooled.append(wrong.float().mean().item())
    assert fooled[0] > 0.02
    assert fooled[1] > fooled[0] - 0.05


@pytest.mark.parametrize("name", ["fab", "rays", "arc"])
def test_attacks_that_end_on_the_boundary_ask_in_full_precision(name, digits):
    assert build_attack(name).full_precision
    network, x, y = digits
    with execution.running(LOW):
        low = build_attack(name, **SHORT[name], seed=0).run(network, x[:40], y[:40])
    full = build_attack(name, **SHORT[name], seed=0).run(network, x[:40], y[:40])
    assert torch.equal(low.x_adv, full.x_adv)


def test_within_a_ball_fab_takes_gradients_in_low_precision_and_judges_in_full(digits):
    network, x, y = digits
    attack = FAB(0.15, early_stop=True, steps=15, targets=3, seed=0)
    assert not attack.full_precision
    asked = []
    hook = network.register_forward_hook(lambda module, _, logits: asked.append((logits.requires_grad, logits.dtype)))
    with execution.running(LOW):
        low = attack.run(network, x, y)
    hook.remove()
    assert {dtype for gradient, dtype in asked if gradient} == {torch.bfloat16}
    # Each point that a gradient has led to is judged in full; a few passes ask for noise and likely targets.
    gradients = sum(gradient for gradient, _ in asked)
    assert asked.count((False, torch.float32)) > gradients > asked.count((False, torch.bfloat16))
    full = attack.run(network, x, y)
    assert 0.02 < full.success.float().mean() < 1
    assert low.success.float().mean() > full.success.float().mean() - 0.01


def test_fab_asks_a_stochastic_model_in_full_precision_since_no_image_leaves(digits):
    _, x, y = digits
    assert FAB(0.15, early_stop=True, eot=2).full_precision
    noisy = l2p.load("zoo:learn2perturb-digits").eval()
    asked = []
    hook = noisy.register_forward_hook(lambda module, _, logits: asked.append((logits.requires_grad, logits.dtype)))
    with execution.running(LOW):
        FAB(0.15, early_stop=True, steps=3, targets=2, seed=0).run(noisy, x[:20], y[:20])
    hook.remove()
    assert {dtype for gradient, dtype in asked if gradient} == {torch.float32}


def test_fab_steps_by_what_full_precision_has_said_of_a_point(digits, monkeypatch):
    """A gradient's own loss is off by more than the way that is left: it alone would never lead over the boundary."""
    network, x, y = digits
    told = Query.value_and_gradient

    def off(self, points, labels, **settings):
        values, gradient = told(self, points, labels, **settings)
        return dataclasses.replace(values, loss=values.loss + 0.2), gradient

    attack = FAB(0.15, early_stop=True, steps=15, targets=3, seed=0)
    exact = attack.run(network, x, y).success.float().mean()
    monkeypatch.setattr(Query, "value_and_gradient", off)
    assert attack.run(network, x, y).success.float().mean() > exact - 0.02


def test_the_report_of_autoattack_is_judged_in_full_precision(digits):
    network, x, y = digits
    attack = AutoAttack(0.15, steps=8, targets=2, queries=5, seed=0)
    with execution.running(LOW):
        report = auto_attack_report(network, x[:60], y[:60], attack)
    with torch.no_grad():
        right = network(report.x_adv).argmax(dim=1) == y[:60]
    assert torch.equal(report.correct[0], right)
    types = []
    hook = network.register_forward_hook(lambda *given: types.append(given[-1].dtype))
    with execution.running(LOW):
        auto_attack_report(network, x[:4], y[:4], attack)
    hook.remove()
    assert types[-1] == torch.float32


def test_attacks_of_others_may_end_there_too():
    assert from_function(lambda model, x, y: x, norm="linf", eps=0.1).full_precision


def test_what_a_wrapped_attack_asks_for_is_what_counts():
    assert not BPDA(attack=PGD(), modules="0").full_precision
    dtypes: list[torch.dtype] = []
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.ReLU())
    network.register_forward_hook(lambda *given: dtypes.append(given[-1].dtype))
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with execution.running(LOW):
        BPDA(attack=PGD(0.1, steps=2), modules="2")(network, x, y)
        assert set(dtypes[:2]) == {torch.bfloat16}
        dtypes.clear()
        BPDA(attack=FAB(0.1, steps=2), modules="2")(network, x, y)
        assert set(dtypes[:2]) == {torch.float32}


def test_full_precision_keeps_the_rest_of_the_mode():
    with execution.running(LOW), execution.full_precision():
        assert execution.current() == dataclasses.replace(LOW, dtype=None)
    with execution.full_precision():
        assert execution.current() is execution.PLAIN
    assert execution.in_full_precision(execution.FAST) == execution.FAST32
    assert execution.in_full_precision(execution.CUDA) == execution.CUDA32
