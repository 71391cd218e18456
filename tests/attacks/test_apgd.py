"""APGD: as strong as PGD or stronger, one pass a step, averages instead of the last draw."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from learn2perturb.attacks import APGD, PGD
from learn2perturb.attacks.apgd import _State
from learn2perturb.attacks.losses import TARGETED_LOSSES, targeted_dlr, targeted_margin
from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError, InputError
from tests.problems import Linear, NoisyLinear, Quadratic

SHAPE = (3, 4, 4)
RADII = {"linf": 0.15, "l2": 0.8}


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


def accuracy(attack, trained):
    return 1 - attack.run(*trained).success_rate


@pytest.mark.parametrize("norm", RADII)
def test_no_weaker_than_pgd_at_equal_budget(norm, trained):
    eps = RADII[norm]
    pgd = min(accuracy(PGD(eps, eps / part, 25, norm=norm, seed=0), trained) for part in (4, 10))
    ours = accuracy(APGD(eps, 25, norm=norm, seed=0), trained)
    assert 0.05 < pgd < 0.9  # else nothing is compared
    assert ours <= pgd + 1e-6
    assert accuracy(APGD(eps, 25, norm=norm, seed=0, loss="dlr", targets=9), trained) <= ours + 1e-6


@pytest.mark.parametrize("norm", RADII)
def test_quadratic_optimum_closer_than_a_step_of_pgd(norm):
    x, eps = 0.4 + 0.2 * torch.rand(5, *SHAPE), {"linf": 0.05, "l2": 0.2}[norm]
    model = Quadratic(torch.rand(1, *SHAPE))
    x_adv = APGD(eps, norm=norm, loss="margin")(model, x, zeros(x))
    torch.testing.assert_close(x_adv, model.optimum(x, eps, norm), atol=0.003, rtol=0)


@pytest.mark.parametrize("eot", [1, 4])
def test_a_step_is_one_pass_which_gives_loss_and_gradient(eot):
    x, model = torch.rand(6, *SHAPE), NoisyLinear(SHAPE)
    result = APGD(0.1, 10, eot=eot, early_stop=False).run(model, x, zeros(x))
    assert result.backward_passes == 10 * eot
    assert result.forward_passes == 11 * eot == len(model.draws) - 1


class Paired(nn.Module):
    """Adds ``+n`` and ``-n`` in turn to a smooth logit: the mean of two draws is exact, each alone means nothing."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        self.network[1].weight.data.mul_(10)  # rugged: the step-size control has something to do
        self.size, self.calls = size, 0
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        if self.calls % 2 == 0:
            self.noise = self.size * torch.randn(len(x), 1, generator=self.generator, dtype=torch.float64)
        sign = 1 if self.calls % 2 == 0 else -1
        self.calls += 1
        return self.network(x) + sign * torch.cat([self.noise, -self.noise], dim=1)


@pytest.mark.parametrize("norm", RADII)
def test_step_size_best_point_and_success_read_the_mean_of_the_draws(norm):
    x = torch.rand(20, *SHAPE, dtype=torch.float64)
    attack = APGD(0.1, 40, norm=norm, loss="margin", seed=3, early_stop=False)
    expected = attack(Paired(0.0), x, zeros(x))
    found = dataclasses.replace(attack, eot=2)(Paired(3.0), x, zeros(x))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_broken_images_drop_out_of_a_deterministic_model_and_the_rest_is_as_without(trained):
    attack = APGD(0.15, 30, random_start=False, restarts=2)
    fast = attack.run(*trained)
    full = dataclasses.replace(attack, early_stop=False).run(*trained)
    assert torch.equal(fast.success, full.success)
    standing = ~fast.success
    assert standing.any()
    torch.testing.assert_close(fast.x_adv[standing], full.x_adv[standing])
    assert fast.backward_passes < 0.8 * full.backward_passes
    network, x, y = trained
    wrong = network(x).argmax(dim=1) != y
    assert torch.equal(fast.x_adv[wrong], x[wrong])


def test_no_image_of_a_stochastic_model_drops_out():
    x, model = torch.rand(8, *SHAPE), NoisyLinear(SHAPE, sigma=5.0)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    APGD(0.1, 5)(model, x, zeros(x))
    assert set(sizes) == {8}


def test_rounding_in_low_precision_breaks_no_image():
    def model(x):
        """Wrong in low precision only."""
        z = x.flatten(1).mean(dim=1) * 1e-3 + (0.1 if torch.is_autocast_enabled("cpu") else -0.1)
        return torch.stack([torch.zeros_like(z), z], dim=1)

    x = torch.rand(4, *SHAPE)
    query = Query(model, APGD(), zeros(x), strict=True)
    margins = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert query.broken(x, zeros(x), margins).tolist() == [True, False, True, True]
    with execution.running(dataclasses.replace(execution.PLAIN, dtype=torch.bfloat16)):
        assert not query.broken(x, zeros(x), margins).any()
        assert APGD(0.1, 4).run(model, x, zeros(x)).backward_passes == 4


def test_targets_are_the_most_likely_wrong_classes_each_once(monkeypatch):
    weights = torch.randn(5, 48)
    x, y = torch.rand(7, *SHAPE), torch.arange(7) % 5
    seen = []

    def spy(logits, labels, target):
        if len(seen) < 6:
            seen.append(target)
        return targeted_margin(logits, labels, target)

    monkeypatch.setitem(TARGETED_LOSSES, "margin", spy)
    attack = APGD(0.01, 1, targets=3, loss="margin", early_stop=False)
    attack(lambda x: x.flatten(1) @ weights.T, x, y)
    order = (x.flatten(1) @ weights.T).scatter(1, y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    # Each run of one step asks for the loss in two points, in each for gradient and value.
    assert {tuple(target.tolist()) for target in seen} <= {tuple(order[:, k].tolist()) for k in range(3)}
    assert not any((target == y).any() for target in seen)


def test_targeted_dlr_row_by_row():
    logits, y, target = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 6, (torch.arange(16) + 1) % 6
    for row, z in enumerate(logits.tolist()):
        high = sorted(z, reverse=True)
        expected = (z[target[row]] - z[y[row]]) / (high[0] - (high[2] + high[3]) / 2)
        assert targeted_dlr(logits, y, target)[row].item() == pytest.approx(expected)
    torch.testing.assert_close(targeted_dlr(5 * logits + 2, y, target), targeted_dlr(logits, y, target))
    with pytest.raises(InputError, match="needs at least 4 classes, got 3; use loss='margin'"):
        targeted_dlr(torch.zeros(1, 3), y[:1], target[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"targets": -1}, "targets must be a whole number of at least 0, got -1"),
        ({"early_stop": 1}, "early_stop must be True or False, got 1"),
        ({"eps": float("inf")}, "eps must be finite"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        APGD(**settings)


def test_checkpoints_are_those_of_the_paper(monkeypatch):
    windows = []
    monkeypatch.setattr(_State, "check", lambda _self, window: windows.append(window))
    x = torch.rand(2, *SHAPE)
    APGD(0.1, 100, early_stop=False)(Quadratic(torch.rand(1, *SHAPE)), x, zeros(x))
    # p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), times the steps.
    assert list(itertools.accumulate(windows)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_first_step_crosses_the_ball():
    x, model = 0.4 + 0.2 * torch.rand(5, *SHAPE), Linear(SHAPE)
    found = APGD(0.1, 1, loss="margin", early_stop=False)(model, x, zeros(x))  # from a random point of it
    torch.testing.assert_close(found, model.optimum(x, 0.1, "linf"))


@pytest.mark.parametrize(("was_halved", "risen", "halves"), [(False, 4, True), (True, 4, False), (True, 1, True)])
def test_a_step_that_was_just_halved_is_halved_again_only_if_the_loss_rises_too_seldom(was_halved, risen, halves):
    x = torch.rand(1, *SHAPE)
    state = _State.at(x, x, zeros(x), torch.arange(len(x)), None, 0.2)
    state.best_loss, state.checked_loss = torch.ones(1), torch.ones(1)  # no better than at the last checkpoint
    state.rises, state.was_halved = torch.tensor([float(risen)]), torch.tensor([was_halved])
    state.check(window=5)
    assert state.size.item() == pytest.approx(0.1 if halves else 0.2)
