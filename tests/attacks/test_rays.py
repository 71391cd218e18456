"""RayS: labels are all it reads, and on a linear model it finds the nearest point of the box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import RayS
from learn2perturb.engine.random import isolated_rng

PIXELS = 16
WEIGHT = torch.randn(PIXELS, generator=torch.Generator().manual_seed(0))
X = 0.4 + 0.2 * torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def score(x: Tensor) -> Tensor:
    return (x.flatten(1) - 0.5) @ WEIGHT


def label(x: Tensor) -> Tensor:
    """A linear model that says its label alone."""
    return nn.functional.one_hot((score(x) > 0).long(), 2).float()


Y = (score(X) > 0).long()
# The l_inf distance of a linear boundary.
DISTANCE = score(X).abs() / WEIGHT.abs().sum()


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.06])
def test_it_breaks_what_can_be_broken_of_a_linear_model(eps):
    result = RayS(eps, queries=600, seed=0).run(label, X, Y)
    broken = label(result.x_adv).argmax(dim=1) != Y
    assert not broken[eps < DISTANCE].any()
    assert broken[eps > 1.1 * DISTANCE].all()
    assert result.forward_passes <= 616  # a bisection is not cut short


def test_what_is_wrong_already_stays():
    result = RayS(0.01, queries=20, seed=0).run(label, X, 1 - Y)
    assert torch.equal(result.x_adv, X)
    assert result.forward_passes <= 6  # two decisions, and whether the model is random


def test_of_a_random_model_the_answer_of_most_draws_counts():
    def noisy(x: Tensor) -> Tensor:
        return label(x + 0.01 * torch.randn_like(x))

    with isolated_rng():
        torch.manual_seed(0)
        found = RayS(0.1, queries=200, eot=9, seed=0).run(noisy, X, Y).x_adv
    assert (label(found).argmax(dim=1) != Y).float().mean() > 0.9


def test_targeted_it_looks_for_the_target():
    found = RayS(0.2, queries=300, targeted=True, seed=0).run(label, X, 1 - Y).x_adv
    assert (label(found).argmax(dim=1) == 1 - Y).float().mean() > 0.9
