"""PGD at its bounds: restarts and their ties, what is judged, the step that fits."""

from __future__ import annotations

import math

import pytest
import torch

from learn2perturb.attacks import PGD
from learn2perturb.attacks.balls import BALLS
from learn2perturb.errors import ConfigError
from tests.problems import Linear, two_logits

SHAPE = (1, 3, 3)


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [False, True])
def test_equals_projected_steps_by_hand(norm, start):
    model, x = Linear(SHAPE), torch.rand(4, *SHAPE)
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0  # the box binds
    eps, step = 0.2, 0.07
    torch.manual_seed(5)
    point = (x + BALLS[norm].random(x, eps)).clamp(0, 1) if start else x
    slope = model.weight.detach()
    direction = slope.sign() if norm == "linf" else slope / slope.norm()
    for _ in range(4):
        delta = point + step * direction - x
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        else:
            size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = torch.where(size > eps, delta * (eps / size), delta)
        point = (x + delta).clamp(0, 1)
    torch.manual_seed(5)
    found = PGD(eps, step, 4, norm=norm, random_start=start, loss="margin")(model, x, zeros(x))
    torch.testing.assert_close(found, point)


def test_of_restarts_the_largest_margin_is_kept_and_of_equals_the_first():
    x = torch.rand(5, *SHAPE)

    def bent(images):
        return two_logits((images.flatten(1) * 40).sin().sum(dim=1) - 20)

    def flat(images):
        return two_logits(0 * images.flatten(1).sum(dim=1) - 1)

    torch.manual_seed(1)
    runs = [PGD(0.1, 0.05, 2)(bent, x, zeros(x)) for _ in range(4)]
    margins = torch.stack([bent(run)[:, 1] for run in runs])
    torch.manual_seed(1)
    best = PGD(0.1, 0.05, 2, restarts=4)(bent, x, zeros(x))
    torch.testing.assert_close(bent(best)[:, 1], margins.amax(dim=0))
    torch.manual_seed(2)
    first = PGD(0.1, 0.05, 1)(flat, x, zeros(x))
    torch.manual_seed(2)
    assert torch.equal(PGD(0.1, 0.05, 1, restarts=3)(flat, x, zeros(x)), first)


@pytest.mark.parametrize(("restarts", "eot", "forwards", "backwards"), [
    (1, 1, 3, 3), (1, 2, 6, 6), (2, 1, 6 + 2, 6), (3, 2, 18 + 6, 18),
])  # fmt: skip
def test_what_restarts_cost(restarts, eot, forwards, backwards):
    x = torch.rand(2, *SHAPE)
    result = PGD(0.1, 0.05, 3, restarts=restarts, eot=eot).run(Linear(SHAPE), x, zeros(x))
    assert (result.forward_passes, result.backward_passes) == (forwards, backwards)


def test_the_step_that_is_not_given_and_the_one_that_is():
    assert PGD(8 / 255).step_size == 0.01
    assert PGD(4 / 255).step_size == pytest.approx(0.005)
    assert PGD(0.1, 0.02).resized(0.3) == PGD(0.3, 0.02)
    assert PGD(0.1, 0.02).resized(0.01).step_size == pytest.approx(0.002)
    assert PGD(0.1, 0.2).step_size == 0.2  # from one side to the other
    with pytest.raises(ConfigError, match="more than twice eps=0.1"):
        PGD(0.1, 0.2001)
    for value in (-1.0, math.inf, math.nan, 1.5):
        with pytest.raises(ConfigError, match="eps"):
            PGD().resized(value)
    assert PGD().resized(0).eps == 0


@pytest.mark.parametrize("name", ["steps", "restarts"])
def test_counts_begin_at_1(name):
    assert getattr(PGD(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
        PGD(**{name: 0})
