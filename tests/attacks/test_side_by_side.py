"""Runs of an attack side by side: each image keeps what it would have kept had they been made in turn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from learn2perturb.attacks import APGD, FAB, AutoAttack, Square, runs
from learn2perturb.attacks.runs import best_of, runs_at_once
from learn2perturb.engine import execution
from tests.attacks.test_runs import Judge, runs_of
from tests.problems import NoisyLinear, as_if_on

FULL = dataclasses.replace(execution.PLAIN, full_passes=True)
X, Y = torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)


class Rows(nn.Module):
    """Five logits of a random network in float64; an image's do not hang on who else is in the pass."""

    def __init__(self, confidence: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.into = nn.Parameter(torch.randn(27, 16, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(16, 5, generator=generator, dtype=torch.float64))
        self.confidence = confidence
        self.sizes: list[int] = []

    def forward(self, x):
        self.sizes.append(len(x))
        z = torch.stack([torch.tanh(row.flatten() @ self.into) @ self.out for row in x])
        return z + self.confidence * torch.eye(5, dtype=z.dtype)[0]


def batch(model, count=8):
    x = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


@pytest.fixture(params=[1, 2, 3, 10])
def at_once(request, monkeypatch):
    monkeypatch.setattr(runs, "runs_at_once", lambda x, images: request.param)
    return request.param


def test_of_runs_side_by_side_an_image_keeps_the_same_point(at_once):
    # Image 3 is broken as it is, 1 by the first run though its share is less, 0 by the second and the third.
    points = [52.0, 1.0, 30.0, 9.0], [1.0, 99.0, 40.0, 9.0], [99.0, 99.0, 20.0, 9.0]
    made, seen = runs_of(*points, broken=([1], [0], [0]))
    judge = Judge()
    best = best_of(judge, X, Y, *made, drop=True, draws=1, side_by_side=True)
    assert best.flatten().tolist() == [1, 1, 40, 0]
    assert seen == {1: [[0, 1, 2], [0, 2], [2]], 2: [[0, 1, 2], [2]]}.get(at_once, [[0, 1, 2]])
    assert judge.left == 1
    assert [entry[1] for entry in judge.asked[1:]] == {1: [3, 2, 1], 2: [6, 1]}.get(at_once, [9])


def test_runs_are_made_in_turn_unless_images_leave_and_the_attack_can(at_once):
    made, seen = runs_of([52.0] * 4, [53.0] * 4)
    best_of(Judge(), X, Y, *made, drop=False, draws=1, side_by_side=True)
    best_of(Judge(), X, Y, *made, drop=True, draws=1)
    assert [len(left) for left in seen] == [4, 4, 3, 3]


def test_so_many_runs_fill_a_pass():
    x = torch.zeros(20, 3, 32, 32)
    assert runs_at_once(x, 20) == 1  # plain passes are the reference
    with execution.running(FULL):
        assert [runs_at_once(x, images) for images in (1, 16, 20, 64, 65)] == [64, 4, 3, 1, 1]
        assert runs_at_once(as_if_on("cuda", x), 20) == 12
        assert runs_at_once(torch.zeros(90, 3, 32, 32), 30) == 3  # no more rows than before, where these were more
    for mode in (execution.FAST, execution.FAST32, execution.CUDA, execution.CUDA32):
        assert mode.full_passes


ATTACKS = {
    "apgd-t": APGD(0.1, 12, loss="dlr", targets=4, random_start=False),
    "apgd-t, margin": APGD(0.1, 12, loss="margin", targets=3, random_start=False),
    "fab-t": FAB(0.1, steps=8, targets=4, early_stop=True),
    "fab-t, l2": FAB(0.4, steps=8, targets=3, norm="l2", early_stop=True),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_targets_side_by_side_find_what_they_find_in_turn(name, confidence):
    model, attack = Rows(confidence), ATTACKS[name]
    x, y = batch(model)
    found = []
    for mode in (execution.PLAIN, FULL):
        model.sizes.clear()
        with execution.running(mode):
            found.append((attack.run(model, x, y), list(model.sizes)))
    (turn, passes), (side, fewer) = found
    assert torch.equal(turn.success, side.success)
    assert len(fewer) < len(passes)
    stood = ~turn.success
    torch.testing.assert_close(side.x_adv[stood], turn.x_adv[stood])
    assert (side.linf if attack.norm == "linf" else side.l2).max() <= attack.eps + 1e-6
    if confidence:
        assert stood.any()  # something is compared


@pytest.mark.parametrize("name", ["apgd-t", "fab-t"])
def test_all_targets_of_an_image_leave_with_the_first_that_breaks_it(name):
    model, sizes = Rows(1.0), []
    x, y = batch(model)
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])) if given[0].requires_grad else None)
    with execution.running(FULL):
        result = ATTACKS[name].run(model, x, y)
    assert 2 < result.success.sum() < 8
    assert len(set(sizes)) > 2  # they leave at one step and another
    assert all(size % 4 == 0 for size in sizes)


def test_restarts_of_fab_go_on_from_what_was_found():
    model = Rows(1.0)
    x, y = batch(model)
    once, often = (FAB(0.02, steps=5, targets=4, restarts=count, early_stop=True, seed=0) for count in (1, 3))
    with execution.running(FULL):
        first, last = once.run(model, x, y), often.run(model, x, y)
    assert (last.success >= first.success).all()
    assert last.backward_passes > first.backward_passes


def test_a_model_with_noise_is_attacked_in_turn():
    model, sizes = NoisyLinear((3, 4, 4)), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x, y = torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64)
    with execution.running(FULL):
        APGD(0.1, 3, restarts=3, eot=2).run(model, x, y)
        FAB(0.1, steps=3, targets=1, restarts=2, eot=2).run(model, x, y)
    assert set(sizes) == {3}


def test_autoattack_is_as_strong_and_makes_fewer_passes():
    model = Rows(2.5)
    x, y = batch(model, 12)
    attack = AutoAttack(0.15, steps=15, targets=3, queries=60, seed=0)
    left, passes = [], []
    for mode in (execution.PLAIN, FULL):
        model.sizes.clear()
        with execution.running(mode):
            left.append(attack.run(model, x, y).success)
        passes.append(len(model.sizes))
    assert torch.equal(*left)
    assert passes[1] < 0.8 * passes[0]
    assert 0 < left[0].sum() < 12


def test_restarts_of_square_are_made_in_turn():
    model = Rows(50.0)
    x, y = batch(model, 3)
    model.sizes.clear()
    with execution.running(FULL):
        Square(0.05, queries=4, restarts=3).run(model, x, y)
    assert max(model.sizes) <= 9
