"""Objectives, schedules and optimisers where nothing is set, at their switches, and at their bounds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.attacks import PGD
from learn2perturb.defenses import Clock, objectives
from learn2perturb.defenses.base import learning_rate_factor, restarted_stages, sgd_optimizers
from learn2perturb.defenses.objectives import (
    TradesAdversary,
    forward,
    mixed_loss,
    objective_loss,
    trades_loss,
    training_adversary,
)
from learn2perturb.defenses.settings import Settings
from learn2perturb.errors import ConfigError, InputError, UnknownNameError
from learn2perturb.noise import noise_parameters, perturb

EPS = 0.1


@pytest.fixture
def batch():
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    return network, torch.rand(6, 2, 2, 2), torch.arange(6) % 3


USUAL = {
    "epochs": 1, "batch_size": 4, "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0,
    "schedule": "constant", "milestones": [], "decay": 0.1, "objective": "mixed", "trades_beta": 6.0, "alpha": 0.5,
    "beta": 0.7, "eps": 0.1, "attack_steps": 2, "attack_step_size": 0.04, "attack_random_start": False,
    "attack_eot": 1, "attack_draws": "fresh", "loss": "single", "loss_draws": 4,
    "attack_labels": "true", "attack_mode": "eval", "adversarial_delay": 0, "awp": 0.0,
    "weight_average": 0.0,
}  # fmt: skip


def settings(**values) -> Settings:
    return Settings(**{**USUAL, **values})


# --- the training adversary


def test_the_training_adversary_is_that_of_the_settings():
    found = training_adversary(settings(attack_eot=3, attack_random_start=True))
    assert found == PGD(EPS, 0.04, 2, random_start=True, eot=3)
    assert training_adversary(settings()).random_start is False


def test_trades_adversary_of_settings(monkeypatch, batch):
    made = []

    class Spy(Exception):
        pass

    def spy(**values):
        made.append(values)
        raise Spy

    monkeypatch.setattr(objectives, "TradesAdversary", spy)
    with pytest.raises(Spy):
        trades_loss(*batch, Clock(0, 0, 1), settings(attack_eot=3))
    assert made == [{"eps": EPS, "step_size": 0.04, "steps": 2, "norm": "linf", "eot": 3, "eot_draws": "fresh"}]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_adversary_of_trades_by_hand(norm, batch):
    network, x, y = batch
    x[:, :, 0, 0], x[:, :, 1, 1] = 1.0, 0.0  # the box binds
    attack = TradesAdversary(EPS, step_size=0.04, steps=3, norm=norm, seed=None)
    torch.manual_seed(1)
    found = attack(network, x, y)
    torch.manual_seed(1)
    p = network(x).softmax(dim=1).detach()
    point = x + 0.001 * torch.randn(x.shape)
    for _ in range(3):
        leaf = point.clone().requires_grad_()
        kl = (p * (p.log() - network(leaf).log_softmax(dim=1))).sum()
        (g,) = torch.autograd.grad(kl, leaf)
        size = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = point + 0.04 * (g.sign() if norm == "linf" else g / size) - x
        if norm == "linf":
            delta = delta.clamp(-EPS, EPS)
        else:
            delta = delta * (EPS / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        point = (x + delta).clamp(0, 1)
    torch.testing.assert_close(found, point, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="step_size"):
        TradesAdversary(EPS, step_size=0.21)
    with pytest.raises(ConfigError, match="steps must be a whole number of at least 1, got 0"):
        TradesAdversary(EPS, steps=0)


# --- the mixture


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.7), (0.0, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("labels", ["true", "predicted"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mixture_by_hand(alpha, beta, labels, mode, batch):
    network, x, y = batch
    network = nn.Sequential(network[0], nn.BatchNorm1d(8), network[1]).train()
    seen = []
    network[1].register_forward_pre_hook(lambda module, args: seen.append(module.training))
    losses = mixed_loss(
        network, x, y, Clock(0, 0, 1), settings(alpha=alpha, beta=beta, attack_labels=labels, attack_mode=mode)
    )
    clean = int(bool(alpha) or labels == "predicted")
    assert seen == [True] * clean + [mode == "train"] * 2 + [True]
    assert (losses.clean is None) == (not clean) == (losses.clean_correct is None)
    total = beta * losses.adversarial + (alpha * losses.clean if alpha else 0)
    torch.testing.assert_close(losses.total.detach(), total)
    assert losses.total.requires_grad
    assert not losses.adversarial.requires_grad
    assert losses.adversarial_correct.shape == (6,)


@pytest.mark.parametrize(("epoch", "delay", "attacked"), [(0, 0, True), (0, 1, False), (1, 1, True), (2, 1, True)])
@pytest.mark.parametrize("objective", ["mixed", "trades"])
def test_the_adversary_starts_at_its_epoch(epoch, delay, attacked, objective, batch):
    losses = objective_loss(*batch, Clock(epoch, 0, 1), settings(adversarial_delay=delay, objective=objective))
    assert (losses.adversarial is not None) == attacked
    network, x, y = batch
    torch.testing.assert_close(losses.clean, F.cross_entropy(network(x), y).detach())
    assert torch.equal(losses.clean_correct, network(x).argmax(dim=1) == y)
    if not attacked:
        torch.testing.assert_close(losses.total.detach(), losses.clean)


def test_the_clean_loss_is_that_of_the_network_itself_where_it_has_no_weight(batch):
    network, x, y = batch
    at = settings(awp=0.1, alpha=0.0, attack_labels="predicted")
    losses = mixed_loss(network, x, y, Clock(0, 0, 1), at)
    torch.testing.assert_close(losses.clean, F.cross_entropy(network(x), y).detach())
    moved = mixed_loss(network, x, y, Clock(0, 0, 1), settings(awp=0.1))
    assert moved.clean > losses.clean  # at weights that were moved against the loss


def test_answers_are_checked_without_gradients_too():
    with torch.inference_mode():
        assert forward(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2)).shape == (2, 4)


def test_without_a_weight_there_is_no_adversary(batch):
    assert mixed_loss(*batch, Clock(0, 0, 1), settings(beta=0)).adversarial is None
    assert mixed_loss(*batch, Clock(0, 0, 1), settings(beta=0.1)).adversarial is not None


@pytest.mark.parametrize("objective", ["mixed", "trades"])
def test_two_draws_are_held_together_by_the_mean_of_both_divergences(objective, batch):
    network, x, y = batch
    noisy = nn.Sequential(*network, nn.Dropout(0.5)).train()

    def at(weight):
        torch.manual_seed(6)
        answers = []
        hook = noisy.register_forward_hook(lambda module, args, answer: answers.append(answer))
        losses = objective_loss(noisy, x, y, Clock(0, 0, 1), settings(consistency=weight, objective=objective))
        hook.remove()
        return losses, answers

    (without, before), (losses, answers) = at(0.0), at(3.0)
    assert len(answers) == len(before) + 1
    assert torch.equal(answers[-2], before[-1])  # a second draw of the adversarial images, after all others
    p, q = (answer.log_softmax(dim=1) for answer in answers[-2:])
    apart = 0.5 * ((p.exp() * (p - q)).sum(dim=1) + (q.exp() * (q - p)).sum(dim=1)).mean()
    torch.testing.assert_close(losses.total, without.total + 3 * apart)
    torch.testing.assert_close(losses.extra["disagreement"], apart.detach())
    assert not losses.extra["disagreement"].requires_grad
    assert "disagreement" not in without.extra
    for answer in answers[-2:]:
        (slope,) = torch.autograd.grad(apart, answer, retain_graph=True)
        assert slope.abs().max() > 1e-4


def test_trades_by_hand(batch):
    network, x, y = batch
    torch.manual_seed(4)
    losses = trades_loss(network, x, y, Clock(0, 0, 1), settings())
    torch.manual_seed(4)
    x_adv = TradesAdversary(EPS, step_size=0.04, steps=2)(network, x, y)
    p, q = network(x).log_softmax(dim=1), network(x_adv).log_softmax(dim=1)
    divergence = (p.exp() * (p - q)).sum(dim=1).mean()
    torch.testing.assert_close(losses.total, F.cross_entropy(network(x), y) + 6 * divergence)
    torch.testing.assert_close(losses.adversarial, F.cross_entropy(network(x_adv), y).detach())
    assert torch.equal(losses.clean_correct, network(x).argmax(dim=1) == y)
    assert torch.equal(losses.adversarial_correct, network(x_adv).argmax(dim=1) == y)
    torch.manual_seed(4)
    alone = trades_loss(network, x, y, Clock(0, 0, 1), settings(trades_beta=0.0))
    torch.testing.assert_close(alone.total.detach(), alone.clean)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: (x, x), "the network gives a tuple for 2 images; it must give logits"),
        (lambda x: x.flatten(), r"the network gives shape \(8,\) for 2 images"),
        (lambda x: x.flatten(1)[:1], r"the network gives shape \(1, 4\) for 2 images"),
        (lambda x: x, r"the network gives shape \(2, 1, 2, 2\) for 2 images"),
        (lambda x: x.mul_(2).flatten(1), "works in place on its images"),
    ],
)
def test_answers_that_are_no_logits_are_refused(answer, words):
    with pytest.raises(InputError, match=words):
        forward(answer, torch.rand(2, 1, 2, 2))
    assert forward(lambda x: x.flatten(1), torch.rand(2, 1, 2, 2)).shape == (2, 4)


# --- schedules


@pytest.mark.parametrize(("decay", "milestones", "wanted"), [
    (0.5, [2, 4], [1, 1, 0.5, 0.5, 0.25, 0.25]), (0.1, [2], [1, 1, 0.1, 0.1, 0.1, 0.1]), (0.5, [], [1] * 6),
    (0.5, [0], [0.5] * 6),
])  # fmt: skip
def test_steps_fall_at_the_epoch_of_a_milestone(decay, milestones, wanted):
    factor = learning_rate_factor(settings(schedule="step", decay=decay, milestones=milestones), 6)
    assert [factor(Clock(9, 0, 5, stage_epoch=epoch)) for epoch in range(6)] == pytest.approx(wanted)


@pytest.mark.parametrize("epochs", [1, 10])
def test_smooth_schedules_by_hand(epochs):
    one, cosine, constant = (
        learning_rate_factor(settings(schedule=name), epochs) for name in ("one_cycle", "cosine", "constant")
    )
    for epoch in range(epochs):
        for number in range(4):
            clock = Clock(7, number, 4, stage_epoch=epoch)
            done = (epoch + (number + 1) / 4) / epochs
            assert one(clock) == pytest.approx(max(done / 0.3 if done < 0.3 else (1 - done) / 0.7, 1e-3))
            assert cosine(clock) == pytest.approx((1 + math.cos(math.pi * done)) / 2)
            assert constant(clock) == 1.0
    late = Clock(7, 3, 4, stage_epoch=3 * epochs)
    assert one(late) == 1e-3
    assert cosine(late) == pytest.approx(0)
    assert learning_rate_factor(settings(schedule="cosine"), 0)(Clock(0, 0, 1)) == pytest.approx(0)


@pytest.mark.parametrize(("milestones", "lengths"), [
    ([2, 4], [2, 2, 2]), ([4, 2, 2], [2, 2, 2]), ([0, 6, 9], [6]), ([1, 5], [1, 4, 1]), ([], [6]),
])  # fmt: skip
@pytest.mark.parametrize("decay", [0.5, 0.1])
def test_stages_begin_at_milestones_inside_the_training(milestones, lengths, decay):
    stages = restarted_stages(settings(schedule="step", epochs=6, milestones=milestones, decay=decay), lambda model: {})
    assert [stage.epochs for stage in stages] == lengths
    assert [stage.factor(Clock(3, 2, 9)) for stage in stages] == pytest.approx([decay**k for k in range(len(lengths))])
    (one,) = restarted_stages(settings(schedule="cosine", epochs=6, milestones=milestones), lambda model: {})
    assert one.epochs == 6
    assert one.factor(Clock(0, 0, 1, stage_epoch=5)) == pytest.approx(0)


# --- optimisers


def test_optimisers_are_those_of_the_settings():
    network = perturb(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), input_shape=(2, 2, 2), sites="1")
    network[1].bias.requires_grad_(False)
    values = settings(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01)
    built = sgd_optimizers(values, noise_lr=5.0)(network)
    assert list(built) == ["weights", "noise"]
    (weights,), (noise,) = (built[name].param_groups for name in built)
    for name, wanted, other in (
        ("lr", 0.3, 1.5),
        ("momentum", 0.8, 0.8),
        ("nesterov", True, True),
        ("weight_decay", 0.01, 0.0),
    ):
        assert weights[name] == wanted
        assert noise[name] == pytest.approx(other)
    assert [id(p) for p in weights["params"]] == [id(network[1].weight)]  # no noise, nothing frozen
    assert [id(p) for p in noise["params"]] == [id(p) for p in noise_parameters(network)]
    assert list(sgd_optimizers(values)(nn.Linear(2, 2))) == ["weights"]
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        sgd_optimizers(values)(nn.Linear(2, 2).requires_grad_(False))


def test_a_warm_up_rises_over_its_first_epochs_and_then_leaves_the_schedule_alone():
    plain = learning_rate_factor(settings(schedule="cosine"), 10)
    warm = learning_rate_factor(settings(schedule="cosine", warmup_epochs=2), 10)
    for epoch in range(4):
        for batch in range(5):
            clock = Clock(epoch, batch, 5, stage_epoch=epoch)
            steps = 5 * epoch + batch + 1
            assert warm(clock) == pytest.approx(plain(clock) * min(steps / 10, 1.0))
    later = Clock(7, 0, 5, stage_epoch=0)  # of the training, not of a stage
    assert warm(later) == plain(later)


@pytest.mark.parametrize(("optimizer", "options", "found"), [
    ("adam", {"betas": [0.7, 0.9], "eps": 1e-3}, {"betas": (0.7, 0.9), "eps": 1e-3}),
    ("rmsprop", {"alpha": 0.5}, {"alpha": 0.5, "momentum": 0.0}),
    ("sgd", {"dampening": 0.1}, {"dampening": 0.1, "nesterov": False}),
])  # fmt: skip
def test_an_optimizer_has_its_own_options(optimizer, options, found):
    values = settings(optimizer=optimizer, optimizer_options=options, lr=0.2, weight_decay=0.01)
    made = sgd_optimizers(values)(nn.Linear(2, 2))["weights"]
    (group,) = made.param_groups
    assert type(made).__name__.lower() == optimizer
    wanted = found | {"lr": 0.2, "weight_decay": 0.01}
    assert {name: group[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "words"),
    [
        ("adam", {"momentum": 0.5}, UnknownNameError, "option of optimizer 'adam'.*momentum"),
        ("sgd", {"lr": 0.5}, UnknownNameError, "option of optimizer 'sgd'.*lr"),
        ("adagrad", {"betas": [0.5, 0.9]}, UnknownNameError, "betas"),
        ("adam", {"betas": [0.5, 1.9]}, ConfigError, "the optimizer refuses its options"),
        ("adam", {"eps": "small"}, ConfigError, "the optimizer refuses its options"),
    ],
)
def test_an_option_that_the_optimizer_has_not_or_refuses(optimizer, options, error, words):
    with pytest.raises(error, match=words):
        sgd_optimizers(settings(optimizer=optimizer, optimizer_options=options))(nn.Linear(2, 2))
