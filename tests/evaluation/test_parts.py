"""A batch that is attacked in parts: which draws each has, and their results as one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from learn2perturb.attacks import PGD
from learn2perturb.attacks.base import AttackResult
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.random import derive_seed
from learn2perturb.evaluation.parts import _joined, attacked
from tests.problems import Linear

SHAPE = (1, 3, 3)


@pytest.mark.parametrize("seed", [None, 5])
def test_the_first_part_draws_as_the_whole_batch_and_each_later_one_for_itself(seed):
    x, y, model = torch.rand(7, *SHAPE), torch.zeros(7).long(), Linear(SHAPE)
    attack = PGD(0.2, 0.1, 1, random_start=True, seed=seed)
    in_parts = Halving()
    in_parts.rows = 3
    torch.manual_seed(1)
    found = attacked(attack, model, x, y, in_parts)
    torch.manual_seed(1)
    first = attack.run(model, x[:3], y[:3]).x_adv
    later = [
        dataclasses.replace(attack, seed=derive_seed(seed or 0, start)).run(model, x[start:stop], y[start:stop]).x_adv
        for start, stop in ((3, 6), (6, 7))
    ]
    assert torch.equal(found.x_adv, torch.cat([first, *later]))
    torch.manual_seed(1)
    whole = attacked(attack, model, x, y, Halving())
    torch.manual_seed(1)
    assert torch.equal(whole.x_adv, attack.run(model, x, y).x_adv)


def result(rows, passes, seconds, zero, rising):
    every = torch.arange(float(rows)).view(-1, 1, 1, 1) + 10 * passes
    flat = every.flatten()
    return AttackResult(
        PGD(), every, flat > 0, flat, flat + 1, flat + 2, passes, 2.0 * passes, seconds, zero, rising, None
    )


def test_rows_are_joined_passes_averaged_by_rows_and_counts_added():
    one, other = result(3, 4.0, 1.5, 2, None), result(1, 8.0, 0.5, 1, None)
    found = _joined([one, other])
    for name in ("x_adv", "success", "linf", "l2", "l0"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(one, name), getattr(other, name)]))
    assert (found.forward_passes, found.backward_passes) == (5.0, 10.0)
    assert (found.seconds, found.zero_gradients, found.c_rising, found.loss_falling) == (2.0, 3, None, None)
    assert found.attack is one.attack
    assert _joined([result(2, 1.0, 1.0, 0, 3), result(2, 1.0, 1.0, 0, 4)]).c_rising == 7
