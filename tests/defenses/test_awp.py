"""Adversarial weight perturbation where weights have several names, or are computed: none stays moved."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from learn2perturb.defenses.awp import against_weights

X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.other.weight = self.one.weight
        self.same_head = self.head
        self.norm = self.same_norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same_head(self.same_norm(self.other(torch.tanh(self.one(x.flatten(1))))))


def convolutions(made):
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(made(nn.Conv2d(1, 3, 3)), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))

    return build


def repeated() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer, nn.Linear(16, 3))


BUILDS = [
    Tied,
    repeated,
    convolutions(nn.utils.weight_norm),
    convolutions(nn.utils.spectral_norm),
    convolutions(lambda layer: prune.random_unstructured(layer, "weight", 0.3)),
    convolutions(parametrizations.weight_norm),
    convolutions(parametrizations.orthogonal),
]


@pytest.mark.parametrize("build", BUILDS)
def test_no_weight_and_no_statistic_stays_moved(build):
    network = build()
    network(X)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        own = network.eval()(X)
    moved = against_weights(network, 0.3, lambda f: F.cross_entropy(f(X), Y))
    with torch.no_grad():
        assert not torch.equal(moved(X), own)
        assert torch.equal(network(X), own)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_shared_weight_is_one_weight_and_moves_in_all_its_places():
    torch.manual_seed(0)
    network = Tied().eval()
    twin = Tied().eval()
    twin.load_state_dict(network.state_dict())
    gradients = torch.autograd.grad(F.cross_entropy(twin(X), Y), [twin.one.weight, twin.head.weight])
    with torch.no_grad():
        for weight, gradient in zip((twin.one.weight, twin.head.weight), gradients, strict=True):
            weight.add_(0.3 * weight.norm() / gradient.norm() * gradient)
    moved = against_weights(network, 0.3, lambda f: F.cross_entropy(f(X), Y))
    torch.testing.assert_close(moved(X), twin(X))


class Aside(nn.Module):
    """One of its layers is not in its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x.flatten(1))


def test_a_weight_that_no_pass_uses_is_left_alone():
    network = Aside()
    moved = against_weights(network, 0.3, lambda f: F.cross_entropy(f(X), Y))
    assert not torch.equal(moved(X), network(X))


def test_without_weights_to_move_the_network_is_as_it_is():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    assert against_weights(network, 0.3, lambda f: f(X).sum()) is network
