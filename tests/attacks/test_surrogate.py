"""The substitute network: it answers as the model does, and images crafted on it fool the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD, Square, Surrogate
from learn2perturb.attacks.surrogate import distil
from learn2perturb.errors import ConfigError, InputError
from tests.problems import NoisyLinear

SHAPE = (3, 4, 4)
EPS = 0.15


def without_gradient(model):
    """Return the same function by way of numpy."""

    def answer(x):
        with torch.no_grad():
            return torch.from_numpy(model(torch.from_numpy(x.numpy())).numpy())

    return answer


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).double().mean().item()


ANSWERS = {
    "logits": lambda z: z,
    "saturated": lambda z: z * 1e5,
    "tiny": lambda z: z * 1e-5,
    "probabilities": lambda z: z.softmax(dim=1),
    "labels": lambda z: nn.functional.one_hot(z.argmax(dim=1), 10).float(),
    "masked": lambda z: z.masked_fill(z < z.topk(5, dim=1).values[:, -1:], -torch.inf),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_as_the_model_does_and_images_crafted_on_it_fool_the_model(trained, kind):
    network, x, y = trained
    model = without_gradient(nn.Sequential(network, _Answer(ANSWERS[kind])))
    substitute = distil(model, x, queries=1600, seed=0, eps=EPS, network=mlp())
    assert not any(module.training for module in substitute.modules())
    assert accuracy(substitute, x, network(x).argmax(dim=1)) >= 0.97
    white = accuracy(network, PGD(EPS, steps=20, seed=0)(network, x, y), y)
    transferred = accuracy(network, PGD(EPS, steps=20, seed=0)(substitute, x, y), y)
    random = accuracy(network, x + EPS * torch.randn_like(x).sign(), y)
    clean = accuracy(network, x, y)
    assert random > clean - 0.1
    # The greater part of what the model's own gradients do.
    assert clean - transferred >= 0.5 * (clean - white)


class _Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, z):
        return self.answer(z)


def test_the_small_convolutional_network_learns_too(trained):
    network, x, y = trained
    substitute = distil(without_gradient(network), x, queries=400, seed=0, eps=EPS)
    assert accuracy(substitute, x, network(x).argmax(dim=1)) >= 0.9
    assert accuracy(network, PGD(EPS, steps=20, seed=0)(substitute, x, y), y) <= accuracy(network, x, y) - 0.1


class Listening:
    """A model that keeps what it is asked."""

    def __init__(self, classes=5):
        self.weights, self.asked = torch.randn(48, classes), []

    def __call__(self, x):
        self.asked.append(x.clone())
        assert not torch.is_grad_enabled()
        return x.flatten(1) @ self.weights


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("queries", [1, 4, 9, 50])
@pytest.mark.parametrize("draws", [1, 3])
def test_asks_as_often_as_it_may_and_only_inside_the_balls(norm, queries, draws):
    model, told = Listening(), []
    x, eps = torch.rand(9, *SHAPE), 0.2
    distil(
        model, x, queries=queries, seed=0, draws=draws, eps=eps, norm=norm,
        progress=lambda done, total, _: told.append((done, total)),
    )  # fmt: skip
    asked = torch.cat(model.asked)
    assert len(asked) == queries * draws
    assert told[-1] == (queries, queries)
    assert asked.min() >= 0
    assert asked.max() <= 1
    away = (asked[:, None] - x[None]).flatten(2).norm(dim=2, p={"linf": torch.inf, "l2": 2}[norm])
    assert away.min(dim=1).values.max() <= eps + 1e-5
    if queries == 50:
        # New images lie all over the balls, not only at their edge or their centre.
        nearest = away.min(dim=1).values[9 * draws :]
        assert nearest.min() > 0
        assert nearest.max() > 0.8 * eps
        assert nearest.min() < 0.4 * eps


def test_the_seed_decides_and_nothing_of_the_callers_is_changed():
    x, model = torch.rand(12, *SHAPE), NoisyLinear(SHAPE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), network[1].weight.detach().clone()
    for given in (None, network):
        first = distil(model, x, queries=13, seed=1, draws=2, network=given)
        torch.rand(3)
        second = distil(model, x, queries=13, seed=1, draws=2, network=given)
        other = distil(model, x, queries=13, seed=2, draws=2, network=given)
        assert torch.equal(first(x), second(x))
        assert not torch.equal(first(x), other(x))
    torch.set_rng_state(before[0])
    distil(model, x, queries=13, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert torch.equal(network[1].weight, before[2])
    assert network.training
    assert network[1].weight.requires_grad


def test_draws_are_fresh_and_a_model_that_seeds_torch_does_no_harm():
    x, model = torch.rand(6, *SHAPE), NoisyLinear(SHAPE)
    distil(model, x, queries=20, seed=0, draws=3)
    assert len({draw.numpy().tobytes() for draw in model.draws}) == len(model.draws)
    replaying = Listening()

    def replayed(images):
        torch.manual_seed(0)
        return replaying(images)

    distil(replayed, x, queries=12, seed=0)
    points = torch.cat(replaying.asked)
    assert len(points.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_works_where_the_caller_has_gradients_off_and_has_a_gradient(context):
    model, x = Listening(), torch.rand(6, *SHAPE)
    with context():
        substitute = distil(model, x, queries=12, seed=0)
    leaf = x.clone().requires_grad_()
    substitute(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0
    assert substitute.double()(x.double()).dtype == torch.float64


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def test_the_attack_breaks_what_has_no_gradient_and_counts_its_queries(trained):
    network, x, y = trained
    result = Surrogate(EPS, queries=800, network=mlp(), seed=0).run(without_gradient(network), x, y)
    white = PGD(EPS, steps=20, seed=0).run(network, x, y)
    clean = 1 - accuracy(network, x, y)
    assert result.success_rate - clean >= 0.5 * (white.success_rate - clean)
    assert result.forward_passes * len(x) == 800
    assert (result.backward_passes, result.zero_gradients) == (0, None)


def test_batches_share_a_substitute_of_the_data_whatever_their_order_and_seed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    x, y, data = torch.rand(8, *SHAPE), torch.randint(5, (8,)), torch.rand(20, *SHAPE)
    attack = PGD(0.1, steps=3, random_start=False)

    def fresh():
        return Surrogate(0.1, queries=40, data=data, attack=attack, seed=1)

    shared = fresh()
    first, second = shared.run(model, x[:4], y[:4]), replace(shared, seed=2).run(model, x[4:], y[4:])
    assert first.forward_passes * 4 == 40 + 16
    assert second.forward_passes * 4 == 16  # the probe alone
    assert torch.equal(replace(fresh(), seed=5)(model, x[4:], y[4:]), second.x_adv)
    # Another model, or other weights, has one of its own; so has another radius.
    with torch.no_grad():
        model[1].weight.mul_(-1)
    assert shared.run(model, x[:4], y[:4]).forward_passes * 4 == 40 + 16
    assert shared.resized(0.05).run(model, x[:4], y[:4]).forward_passes * 4 == 40 + 16
    assert not torch.equal(shared(model, x[:4], y[:4]), first.x_adv)
    assert "20 images" in repr(shared)


BAD_ATTACKS = {
    "queries": ({"queries": 0}, ConfigError, "queries must be a whole number of at least 1, got 0"),
    "attack": ({"attack": Square()}, ConfigError, "attack must be one by gradients"),
    "network": ({"network": 3}, ConfigError, "network is a int, must be a module to train, or None"),
    "data": ({"data": torch.rand(3, 4)}, InputError, r"x must have shape \(N, C, H, W\)"),
}


@pytest.mark.parametrize("case", BAD_ATTACKS)
def test_bad_settings_of_the_attack(case):
    settings, error, message = BAD_ATTACKS[case]
    with pytest.raises(error, match=message):
        Surrogate(**settings)


BAD = {
    "queries": ({"queries": 0}, ConfigError, "queries must be a whole number of at least 1, got 0"),
    "draws": ({"draws": 1.5}, ConfigError, "draws must be a whole number"),
    "eps": ({"eps": 8}, ConfigError, "eps=8 is more than a pixel's whole range"),
    "norm": ({"norm": "l1"}, ConfigError, "norm is 'l1'; allowed: linf, l2"),
    "network": ({"network": 3}, ConfigError, "network is a int, must be a module to train"),
    "classes": (
        {"network": nn.Sequential(nn.Flatten(), nn.Linear(48, 7))},
        ConfigError,
        "network gives 7 classes",
    ),
    "images": ({"images": torch.rand(3, 4)}, InputError, r"x must have shape \(N, C, H, W\)"),
    "no tensor": ({"images": np.zeros((2, 3, 4, 4))}, InputError, "x must be a torch.Tensor, got ndarray"),
    "model": ({"model": 3}, InputError, "model must be callable"),
    "answers": ({"model": lambda x: x}, InputError, r"must return logits \(N, K\)"),
    "nan": ({"model": lambda x: x.flatten(1) / 0}, InputError, "NaN or infinite logits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    settings, error, message = BAD[case]
    settings = {"model": Listening(), "images": torch.rand(4, *SHAPE), "queries": 8, "seed": 0} | settings
    with pytest.raises(error, match=message) as caught:
        distil(settings.pop("model"), settings.pop("images"), **settings)
    assert "\n" not in str(caught.value)
