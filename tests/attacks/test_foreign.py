"""Adapters without the libraries: stand-ins of their forms, counts, random streams, refusals."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.attacks import (
    FGSM,
    PGD,
    from_adv_lib,
    from_art,
    from_foolbox,
    from_function,
    from_torchattacks,
    to_adv_lib,
    to_art,
    to_foolbox,
    to_torchattacks,
)
from learn2perturb.errors import ConfigError, InputError, MissingDependencyError
from learn2perturb.evaluation import evaluate
from tests.problems import Linear, NoisyLinear, as_if_on

SHAPE = (1, 4, 4)


@pytest.fixture
def x():
    return torch.rand(6, *SHAPE) * 0.6 + 0.2


@pytest.fixture
def y():
    return torch.zeros(6, dtype=torch.int64)


def sign_step(model, x, y, eps=0.1):
    """A plain attack that knows nothing of this package."""
    x = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    return (x + eps * x.grad.sign()).detach()


class Stepper:
    """An attack in the form of torchattacks."""

    def __init__(self, model, eps=0.2, scale=1.0):
        self.model, self.size = model, eps * scale

    def __call__(self, x, y):
        return sign_step(self.model, x, y, self.size)


def test_a_function_is_an_attack_like_any_other(x, y):
    model = Linear(SHAPE)
    result = from_function(sign_step, eps=0.05).run(model, x, y)
    assert torch.allclose(result.x_adv, FGSM(0.05)(model, x, y))
    assert (result.forward_passes, result.backward_passes) == (1, 1)
    assert all(weight.grad is None for weight in model.parameters())


def test_eps_goes_where_the_builder_takes_it(x, y):
    model = Linear(SHAPE)
    assert from_torchattacks(Stepper).eps == 0.2  # its own default
    swept = dataclasses.replace(from_torchattacks(Stepper, scale=0.5), eps=0.1)
    assert float(swept.run(model, x, y).linf.max()) == pytest.approx(0.05, abs=1e-6)
    own = from_torchattacks(lambda m: Stepper(m, eps=0.15))
    assert own.eps == math.inf
    assert float(own.run(model, x, y).linf.max()) == pytest.approx(0.15, abs=1e-6)
    named = from_adv_lib(lambda model, inputs, labels, targeted, ε: sign_step(model, inputs, labels, ε), eps=0.03)
    assert float(named.run(model, x, y).linf.max()) == pytest.approx(0.03, abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_leaves_the_ball_is_brought_back(norm, x, y):
    wild = from_function(lambda model, x, y: sign_step(model, x, y, 0.5), eps=0.1, norm=norm)
    result = wild.run(Linear(SHAPE), x, y)
    assert float(getattr(result, norm).max()) == pytest.approx(0.1, abs=1e-5)


def test_a_library_that_seeds_the_generator_cannot_make_draws_repeat(x, y):
    model = NoisyLinear(SHAPE)

    def seeding(model, x, y):
        for _ in range(3):
            torch.manual_seed(0)
            model(x)
        return x

    from_function(seeding, eps=0.1).run(model, x, y)
    first, second, third = model.draws[:3]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_callers_generators_are_left_alone_and_calls_differ(x, y):
    def drawing(model, x, y):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return x + 0.1 * torch.rand_like(x)

    def starting(model, x, y):
        return x + 0.1 * torch.rand_like(x) - np.random.uniform(0, 0.01)

    before = np.random.get_state()[1].copy(), random.getstate()
    from_function(drawing, eps=0.2)(Linear(SHAPE), x, y)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert random.getstate() == before[1]
    attack = from_function(starting, eps=0.2)
    model = Linear(SHAPE)
    assert not torch.equal(attack(model, x, y), attack(model, x, y))
    seeded = dataclasses.replace(attack, seed=5)
    assert torch.equal(seeded(model, x, y), seeded(model, x, y))


def test_eot_averages_fresh_draws_for_any_attack(x, y):
    model = NoisyLinear(SHAPE, sigma=2.0)
    result = from_function(sign_step, eps=0.05, eot=8, eot_average="logits").run(model, x, y)
    assert (result.forward_passes, result.backward_passes) == (8, 8)
    assert len({draw.numpy().tobytes() for draw in model.draws[:8]}) == 8
    with pytest.raises(ConfigError, match="'probability' or 'logits'"):
        from_function(sign_step, eps=0.05, eot=8, eot_average="loss")


def test_modes_that_a_library_sets_do_not_reach_the_model(x, y):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))

    def careless(model, x, y):
        model.train()
        return sign_step(model, x, y)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    from_function(careless, eps=0.1)(model, x, y)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_stands_in_an_evaluation_beside_ours(x, y):
    attacks = {"ours": FGSM(0.1), "theirs": from_function(sign_step, eps=0.1)}
    result = evaluate(Linear(SHAPE), (x, y), attacks, eps=[0.05, 0.1])
    for eps in (0.05, 0.1):
        assert result.row("theirs", eps=eps).linf == pytest.approx(result.row("ours", eps=eps).linf, abs=1e-6)
    assert result.row("theirs", eps=0.1).attack_type == "FunctionAttack"


def test_bad_input_is_refused_with_the_fix(x, y):
    with pytest.raises(ConfigError, match="the library's class, or a function"):
        from_torchattacks("PGD")
    with pytest.raises(ConfigError, match="give an object"):
        from_foolbox(Stepper)
    with pytest.raises(ConfigError, match=r"norm 1\b.*leave eps out"):
        from_foolbox(foolbox_like(1), eps=0.1)
    with pytest.raises(ConfigError, match="PGD\\(eps=8/255\\)"):
        to_adv_lib(PGD)
    with pytest.raises(InputError, match="not images of shape"):
        from_function(lambda model, x, y: x[:1], eps=0.1)(Linear(SHAPE), x, y)
    with pytest.raises(InputError, match="a NoneType"):
        from_function(lambda model, x, y: None, eps=0.1)(Linear(SHAPE), x, y)


def foolbox_like(order):
    """An object that says its norm as foolbox's attacks do."""

    class Like:
        distance = type("Distance", (), {"p": order})()

        def __call__(self):
            """Never called."""

    return Like()


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("torchattacks", lambda x, y: to_torchattacks(PGD(), Linear(SHAPE))),
        ("foolbox", lambda x, y: to_foolbox(PGD())),
        ("foolbox", lambda x, y: from_foolbox(foolbox_like(2), eps=0.1)(Linear(SHAPE), x, y)),
        ("art", lambda x, y: to_art(PGD(), None)),
        ("art", lambda x, y: from_art(Stepper)(Linear(SHAPE), x, y)),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(library, use, x, y, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"{library} cannot be imported.*pip install"):
        use(x, y)


@pytest.fixture
def stand_in(monkeypatch):
    """Stands in for whatever library is asked for."""
    found = types.SimpleNamespace()
    monkeypatch.setattr("learn2perturb.attacks.foreign.foreign_library", lambda name: found)
    return found


@pytest.mark.parametrize(("targeted", "place", "kind"), [
    (False, "cpu", "cpu"), (True, "cpu", "cpu"), (False, "cuda", "gpu"), (False, "mps", "cpu"),
])  # fmt: skip
def test_what_the_adversarial_robustness_toolbox_is_told(targeted, place, kind, x, stand_in):
    told = {}

    class Evasion:
        def __init__(self, classifier):
            assert classifier is told

        def set_params(self, **named):
            told.update(named)

        def generate(self, images, labels):
            return images

    stand_in.PyTorchClassifier = lambda **settings: (told.update(settings), told)[1]
    attack = from_art(Evasion, targeted=targeted)
    attack.craft_in_library(Linear(SHAPE), as_if_on(place, x), torch.ones(6).long())
    assert (told["device_type"], told["nb_classes"], told["input_shape"]) == (kind, 2, SHAPE)
    assert told["clip_values"] == (0.0, 1.0) and told.get("targeted", False) is targeted


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_what_foolbox_is_told_and_which_images_are_taken(eps, targeted, x, stand_in):
    told = {}

    def attack(wrapped, images, criterion, epsilons):
        told.update(wrapped=wrapped, criterion=criterion[0], epsilons=epsilons)
        return images + 0.01, images + 0.02, None  # as found, and clipped to the ball

    stand_in.criteria = types.SimpleNamespace(
        TargetedMisclassification=lambda y: ("targeted", y), Misclassification=lambda y: ("any other", y)
    )
    stand_in.PyTorchModel = lambda model, bounds, device: (bounds, device.type)
    found = from_foolbox(attack, eps=eps, norm="linf", targeted=targeted)(Linear(SHAPE), x, torch.ones(6).long())
    assert torch.equal(found, x + (0.01 if eps is None else 0.02))
    assert told == {
        "wrapped": ((0, 1), "cpu"), "criterion": "targeted" if targeted else "any other", "epsilons": eps,
    }  # fmt: skip


@pytest.mark.parametrize("targeted", [False, True])
def test_torchattacks_is_told_of_targets_without_a_word(targeted, x):
    told = []

    class Attack:
        def __init__(self, model):
            pass

        def set_mode_targeted_by_label(self, quiet=False):
            told.append(quiet)

        def __call__(self, images, labels):
            return images

    from_torchattacks(Attack, targeted=targeted)(Linear(SHAPE), x, torch.ones(6).long())
    assert told == [True] * targeted


def test_libraries_draw_from_one_of_very_many_streams(x, y):
    seeds = []

    def library(model, images, labels):
        seeds.append(torch.initial_seed())
        return images

    attack = from_function(library, eps=0.1)
    for _ in range(60):
        attack(Linear(SHAPE), x[:1], y[:1])
    assert len(set(seeds)) == 60


def test_the_draws_of_a_model_that_are_not_torchs_go_on_from_pass_to_pass(x, y):
    drawn = []

    def model(images):
        drawn.append((np.random.rand(), random.random()))
        return Linear(SHAPE)(images)

    def library(victim, images, labels):
        drawn.clear()
        for _ in range(3):
            victim(images)
        assert len({one for one, _ in drawn}) == len({other for _, other in drawn}) == 3
        return images

    from_function(library, eps=0.1)(model, x, y)
