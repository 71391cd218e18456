"""What the checks attack with: the reported attack of a call, the whole box, the variants of check 8."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.attacks import ARC, FGSM, PGD
from learn2perturb.attacks.surrogate import Substitute
from learn2perturb.diagnosis import QUICK, blackbox, diagnose, diagnosing, whitebox
from learn2perturb.diagnosis.diagnosing import _reported
from learn2perturb.diagnosis.measure import Subject
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.noise import perturb
from tests.problems import Linear

PLAN = dataclasses.replace(QUICK, unbounded_eot=3, restarts=2)


def test_the_reported_attack_is_pgd_of_a_quarter_of_eps():
    assert _reported(None, None, None, QUICK) == PGD(8 / 255, 2 / 255, QUICK.steps, eot=QUICK.eot)
    assert _reported(None, 0.1, "l2", QUICK) == PGD(0.1, 0.025, QUICK.steps, norm="l2", eot=QUICK.eot)
    own = PGD(0.1, 0.02, 7, norm="l2")
    for eps, norm in ((None, None), (0.1, None), (None, "l2"), (0.1, "l2")):
        assert _reported(own, eps, norm, QUICK) is own


@pytest.mark.parametrize(
    ("attack", "eps", "norm", "words"),
    [
        (None, None, "l3", "norm"),
        (None, True, None, "eps is True"),
        (None, 0, None, "eps is 0"),
        (None, -0.1, None, "eps is -0.1"),
        (None, float("inf"), None, "eps is inf"),
        (None, "8/255", None, "write 8/255"),
        (FGSM(0.1), None, None, "attack is a FGSM"),
        (PGD, None, None, "attack is a PGD"),
        (PGD(0.1), 0.2, None, "eps is 0.2 and that of the attack 0.1"),
        (PGD(0.1), None, "l2", "norm is 'l2' and that of the attack 'linf'"),
        (PGD(0.1, targeted=True), None, None, "untargeted one with eps > 0"),
        (PGD(0.0), None, None, "untargeted one with eps > 0"),
    ],
)
def test_what_cannot_be_reported_is_refused(attack, eps, norm, words):
    with pytest.raises(ConfigError, match=words):
        _reported(attack, eps, norm, QUICK)


def bench(attack: PGD, right: float = 0.0, **facts: object) -> SimpleNamespace:
    """A bench on which every attack leaves the same, and which keeps them."""
    made: dict[str, object] = {}

    def attacked(name, one, n, **settings):
        made[name] = one, n, settings
        scores = Scores(np.arange(1000)[None] < 1000 * right)
        return SimpleNamespace(scores=scores, accuracy=scores.mean())

    x = torch.zeros(100, 3, 4, 4)
    return SimpleNamespace(attack=attack, budget=PLAN, x=x, attacked=attacked, made=made, **facts)


@pytest.mark.parametrize(("steps", "share"), [(1, 1.0), (2, 1.0), (3, 2.5 / 3), (200, 0.0125)])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 1.0), ("l2", 48**0.5)])
def test_the_whole_box_is_crossed_more_than_twice_without_a_random_start(norm, eps, steps, share):
    found = bench(PGD(0.1, norm=norm, restarts=4, eot=9), right=0.011)
    found.budget = dataclasses.replace(PLAN, unbounded_steps=steps)
    whitebox.unbounded(found)
    attack, n, settings = found.made["unbounded"]
    assert (attack.steps, attack.step_size) == pytest.approx(
        (max(1, steps // 8), min(2.5 / max(1, steps // 8), 1) * eps)
    )
    attack, n, settings = found.made["unbounded" if steps == 1 else f"unbounded, {steps} steps"]
    assert (attack.eps, attack.step_size) == pytest.approx((eps, share * eps))
    assert (attack.steps, attack.random_start, attack.restarts, attack.eot) == (steps, False, 1, 3)
    assert (n, settings) == (PLAN.some, {"rival": False})


def variants(model: object, classes: int, *, stochastic: bool, base: PGD) -> dict[str, object]:
    subject = SimpleNamespace(model=model, stochastic=stochastic)
    return whitebox._variants(SimpleNamespace(num_classes=classes, subject=subject, budget=PLAN), base)


@pytest.mark.parametrize(
    ("classes", "stochastic", "eot", "names"),
    [
        (2, False, 1, {"loss margin"}),
        (3, False, 1, {"loss margin", "loss dlr"}),
        (3, True, 1, {"loss margin", "loss dlr", "held draws"}),
        (2, True, 4, {"loss margin", "average probability", "average logits", "held draws"}),
    ],
)
def test_the_variants_differ_from_the_base_in_one_thing(classes, stochastic, eot, names):
    base = PGD(0.1, eot=eot)
    found = variants(Linear((1, 2, 2)), classes, stochastic=stochastic, base=base)
    assert set(found) == names | {"2 restarts"}
    for attack in found.values():
        changed = [x.name for x in dataclasses.fields(base) if getattr(attack, x.name) != getattr(base, x.name)]
        assert len(changed) == 1
    assert not any(isinstance(attack, ARC) for attack in found.values())
    assert found["2 restarts"].restarts == 2


def test_attacks_at_another_size_take_steps_of_the_same_share():
    attack = PGD(0.1, 0.025)
    found = whitebox.with_eps(attack, 0.2)
    assert (found.eps, found.step_size) == (0.2, pytest.approx(0.05))
    assert whitebox.with_eps(PGD(0.1, 0.1), 0.05).step_size <= 0.05


@pytest.mark.parametrize(
    ("stochastic", "eot", "name"), [(True, 10, "EOT-PGD-7"), (True, 1, "PGD-7"), (False, 10, "PGD-7")]
)
def test_the_name_of_the_reported_attack(stochastic, eot, name):
    assert whitebox.title(PGD(0.1, 0.02, 7, eot=eot), stochastic=stochastic) == name


@pytest.mark.parametrize(("stochastic", "draws"), [(True, 4), (False, 1)])
def test_a_surrogate_learns_from_means_over_draws_where_there_are_draws(stochastic, draws, monkeypatch):
    asked = {}
    images = torch.rand(2, 1, 4, 4)
    learned = Substitute.of(images, 3)
    monkeypatch.setattr(blackbox, "distil", lambda model, images, **settings: asked.update(settings) or learned)
    subject = Subject(Linear((1, 4, 4)), stochastic=stochastic)
    found = bench(
        PGD(0.1, norm="l2"), subject=subject, seed=3, progress=None, num_classes=3,
        each=lambda work, count, key: [work(number) for number in range(count)],
    )  # fmt: skip
    source = blackbox.surrogate(found, images)
    assert (asked["draws"], asked["queries"]) == (draws, PLAN.surrogate_queries)
    assert (asked["eps"], asked["norm"]) == (0.1, "l2")
    assert torch.equal(source.model(images), learned.eval()(images)) and not source.model.training
    assert not source.stochastic and source.gradient and source.identity is not None
    assert not any(one.requires_grad for one in source.model.parameters())


@pytest.mark.parametrize(
    ("replayed", "stochastic", "checked"),
    [("", None, 1), ("", True, 1), ("its draws come again", None, 0), ("its draws come again", True, 0),
     ("its draws come again", False, 1)],
)  # fmt: skip
def test_draws_that_come_again_do_not_have_to_agree_in_every_batch_unless_there_should_be_none(
    replayed, stochastic, checked, monkeypatch
):
    asked: list[int] = []
    monkeypatch.setattr(diagnosing, "replay_of", lambda *_: replayed)
    monkeypatch.setattr(diagnosing, "check_batches", lambda model, x, seed: asked.append(len(x)) or [])
    monkeypatch.setattr(diagnosing, "run_checks", lambda *_, **__: 1 / 0)
    data = torch.rand(6, 1, 2, 2), torch.arange(6) % 2
    with pytest.raises(ZeroDivisionError):
        diagnose(Linear((1, 2, 2)).eval(), data, budget="quick", limit=6, stochastic=stochastic, progress=False)
    assert len(asked) == checked


def test_other_networks_learn_from_half_as_many_queries(monkeypatch):
    class Enough(Exception):
        pass

    def run_checks(bench, given, quiet, learned, **settings):
        asked.update(queries=learned.args[2], seed=learned.keywords["seed"], batch=learned.keywords["batch_size"])
        raise Enough

    asked: dict[str, int] = {}
    monkeypatch.setattr(diagnosing, "run_checks", run_checks)
    data = torch.rand(6, 1, 2, 2), torch.arange(6) % 2
    with pytest.raises(Enough):
        diagnose(Linear((1, 2, 2)).eval(), data, budget=PLAN, limit=6, seed=5, batch_size=3,
                 progress=False)  # fmt: skip
    assert asked == {"queries": PLAN.surrogate_queries // 2, "seed": 5, "batch": 3}


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return perturb(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=(1, 2, 2), sites=["1"]).eval()


@pytest.mark.parametrize(("model", "twin"), [(noisy, True), (lambda: Linear((1, 2, 2)).eval(), False)])
def test_a_network_whose_noise_is_ours_is_compared_with_itself_without_it(model, twin, monkeypatch):
    asked: list[Subject | None] = []

    def run_checks(bench, given, quiet, learned, **settings):
        asked.append(quiet)
        return 1 / 0

    monkeypatch.setattr(diagnosing, "run_checks", run_checks)
    data = torch.rand(6, 1, 2, 2), torch.arange(6) % 2
    with pytest.raises(ZeroDivisionError):
        diagnose(model(), data, budget=PLAN, limit=6, progress=False)
    assert [one is not None for one in asked] == [twin]
