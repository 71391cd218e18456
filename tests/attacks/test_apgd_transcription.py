"""APGD against algorithm 1 of its paper, written again for one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import APGD
from learn2perturb.attacks.apgd import _State
from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.gradients import Values
from learn2perturb.attacks.losses import targeted_margin
from learn2perturb.errors import ConfigError

SHAPE = (2, 3, 3)


def rugged(classes: int = 4) -> nn.Sequential:
    """A smooth network on which the loss often falls: the control of the step size has something to do."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(18, 24), nn.Tanh(), nn.Linear(24, classes)).double()
    network[1].weight.data.mul_(12)
    return network.requires_grad_(False)


def margin_of(z: Tensor, label: int) -> Tensor:
    return max(value for other, value in enumerate(z) if other != label) - z[label]


def cross_entropy_of(z: Tensor, label: int) -> Tensor:
    return z.exp().sum().log() - z[label]


def projected(point: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    delta = point - x
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif delta.norm() > eps:
        delta = delta * (eps / delta.norm())
    return (x + delta).clamp(0, 1)


def apgd_by_hand(objective, wrong, x, start, eps, steps, norm):
    """Return the point of one image: ``objective`` is raised, ``wrong`` tells success."""

    def at(point):
        leaf = point.clone().requires_grad_()
        value = objective(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient

    def along(gradient):
        return gradient.sign() if norm == "linf" else gradient / gradient.norm()

    size, point, before = 2 * eps, start, start
    highest, top, top_slope, last = -math.inf, start, None, math.inf
    found, found_wrong, found_value = start, False, -math.inf
    window = max(int(0.22 * steps), 1)
    checkpoint, risen, known, halved_last = window, 0, -math.inf, True
    for step in range(steps + 1):
        value, slope = at(point)
        risen += value > last
        last = value
        if value > highest:
            highest, top, top_slope = value, point, slope
        if (wrong(point) and not found_wrong) or (wrong(point) == found_wrong and value > found_value):
            found, found_value = point, value
        found_wrong = found_wrong or wrong(point)
        if step == checkpoint:
            halve = risen < 0.75 * window or (not halved_last and highest <= known)
            if halve:
                size, point, before, slope, last = size / 2, top, top, top_slope, highest
            risen, known, halved_last = 0, highest, halve
            window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            checkpoint += window
        if step < steps:
            share = 0.75 if step else 1.0
            aim = projected(point + size * along(slope), x, eps, norm)
            moved = point + share * (aim - point) + (1 - share) * (point - before)
            before, point = point, projected(moved, x, eps, norm)
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3, 12, 34, 67])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_equals_the_paper(norm, steps, loss):
    network, x = rugged(), torch.rand(4, *SHAPE, dtype=torch.float64)
    y = network(x).argmax(dim=1)
    eps = {"linf": 0.2, "l2": 0.7}[norm]
    attack = APGD(eps, steps, norm=norm, loss=loss, random_start=False, early_stop=False)
    found = attack(network, x, y)
    raised = {"margin": margin_of, "ce": cross_entropy_of}[loss]
    for image, label, point in zip(x, y.tolist(), found, strict=True):

        def logits(p):
            return network(p[None])[0]

        wanted = apgd_by_hand(
            lambda p, label=label: raised(logits(p), label),
            lambda p, label=label: bool(logits(p).argmax() != label),
            image, image, eps, steps, norm,
        )  # fmt: skip
        torch.testing.assert_close(point, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_a_point_of_the_ball(norm):
    network, x = rugged(), torch.rand(3, *SHAPE, dtype=torch.float64)
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0
    seen = []

    def watched(images):
        seen.append(images.detach().clone())
        return network(images)

    torch.manual_seed(3)
    wanted = x + BALLS[norm].random(x, 0.1)
    assert wanted.max() > 1  # the box binds
    assert wanted.min() < 0
    torch.manual_seed(3)
    APGD(0.1, 1, norm=norm, early_stop=False)(watched, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(seen[0], wanted.clamp(0, 1))
    away = (seen[0] - x).flatten(1)
    size = away.abs().amax(dim=1) if norm == "linf" else away.norm(dim=1)
    assert (size > 0).all()
    assert (size <= 0.1).all()


def test_each_target_has_a_run_and_each_restart_of_it():
    network, x = rugged(), torch.rand(3, *SHAPE, dtype=torch.float64)
    y = network(x).argmax(dim=1)
    for targets, restarts, runs in ((0, 2, 2), (2, 1, 2), (2, 3, 6), (9, 1, 3)):  # three wrong classes there are
        attack = APGD(0.01, 4, targets=targets, restarts=restarts, early_stop=False, loss="margin")
        assert attack.run(network, x, y).backward_passes == 4 * runs


@pytest.mark.parametrize("eot", [1, 2])
def test_only_what_is_broken_in_a_single_pass_drops_out(eot):
    network, x = rugged(), torch.rand(8, *SHAPE, dtype=torch.float64)
    y = network(x).argmax(dim=1)
    full = APGD(0.3, 20, eot=eot, early_stop=False, seed=0).run(network, x, y)
    fast = APGD(0.3, 20, eot=eot, seed=0).run(network, x, y)
    assert full.success.any()
    assert full.backward_passes == 20 * eot
    assert (fast.backward_passes < full.backward_passes) == (eot == 1)


def test_a_target_is_approached_on_the_way_from_the_label():
    """One step from x along the gradient of ``z_t - z_y``, by hand, for each of the likeliest wrong classes."""
    network, x = rugged(), 0.4 + 0.2 * torch.rand(4, *SHAPE, dtype=torch.float64)
    y = network(x).argmax(dim=1)
    order = network(x).scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)
    seen = []

    def watched(images):
        seen.append(images.detach().clone())
        return network(images)

    APGD(0.001, 1, targets=3, loss="margin", random_start=False, early_stop=False)(watched, x, y)
    assert len(seen) == 1 + 3 * 3 + 1  # who is likely; of each run its start, its end, a judgement; the verification
    for run in range(3):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(targeted_margin(network(leaf), y, order[:, run]).sum(), leaf)
        torch.testing.assert_close(seen[2 + 3 * run], x + 0.001 * slope.sign(), atol=1e-9, rtol=0)


def test_what_one_run_breaks_needs_no_other():
    network, x = rugged(), torch.rand(6, *SHAPE, dtype=torch.float64)
    y = network(x).argmax(dim=1)
    once, often = (APGD(0.9, 20, restarts=runs, seed=0).run(network, x, y) for runs in (1, 3))
    assert once.success.all()
    assert often.backward_passes == once.backward_passes


def seen_by(state, loss, margin, gradient):
    values = Values(torch.tensor(loss), torch.tensor(margin), torch.zeros(len(loss), 2))
    state.see(values, torch.full_like(state.x, gradient))


def test_a_tie_is_no_rise_and_no_better_point():
    x = torch.zeros(3, 1, 1, 1)
    state = _State.at(x, x, torch.zeros(3, dtype=torch.int64), torch.arange(3), None, 0.2)
    assert state.rises.tolist() == [0, 0, 0]
    seen_by(state, [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], 1.0)
    assert state.rises.tolist() == [0, 0, 0]  # there was nothing before
    state.point = x + 1
    seen_by(state, [1.0, 2.0, 0.5], [-1.0, 0.0, 0.0], 2.0)
    assert state.rises.tolist() == [0, 1, 0]
    assert state.best.flatten().tolist() == [0, 1, 0]
    assert state.best_gradient.flatten().tolist() == [1, 2, 1]
    assert state.best_loss.tolist() == [1, 2, 1]
    assert state.found.flatten().tolist() == [0, 1, 0]  # a margin of 0 is no success
    assert state.found_wrong.tolist() == [False] * 3
    state.point = x + 2
    seen_by(state, [0.1, 0.1, 0.1], [0.5, -0.5, 0.5], 3.0)
    assert state.found.flatten().tolist() == [2, 1, 2]  # wrong before right, whatever the loss
    assert state.best.flatten().tolist() == [0, 1, 0]
    state.point = x + 3
    seen_by(state, [0.2, 9.0, 0.1], [0.5, -0.1, 0.5], 4.0)
    assert state.found.flatten().tolist() == [3, 3, 2]
    assert state.found_wrong.tolist() == [True, False, True]


def test_targets_of_ones_own_and_one_target_exclude_each_other():
    message = "targets=1 tries wrong classes in turn, targeted=True asks for one; leave one of them out"
    with pytest.raises(ConfigError, match=message):
        APGD(targets=1, targeted=True)
    assert APGD(targets=0, targeted=True).targeted
    assert APGD(targets=1).targets == 1


@pytest.mark.parametrize("name", ["random_start", "early_stop"])
def test_flags_are_flags(name):
    with pytest.raises(ConfigError, match=f"{name} must be True or False, got 1"):
        APGD(**{name: 1})


@pytest.mark.parametrize(("name", "lowest"), [("steps", 1), ("restarts", 1), ("targets", 0)])
def test_counts_have_a_lowest_value(name, lowest):
    assert getattr(APGD(**{name: lowest}), name) == lowest
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least {lowest}, got {lowest - 1}"):
        APGD(**{name: lowest - 1})
