"""SmoothAdv, and any noise with ``loss: averaged``: one step against a transcription of the averaged predictor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.certification.first_noise import first_noise
from learn2perturb.defenses import Clock, build_defense, prediction, training_adversary
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import noise_modules, perturb
from learn2perturb.training.config import TrainConfig
from tests.defenses.parity.draws import recorded

M, SIGMA, EPS, STEP = 3, 0.25, 0.1, 0.06


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def settings(**values):
    return TrainConfig(
        defense="smoothadv", recipe="common", eps=EPS, attack_steps=2, attack_step_size=STEP, loss_draws=M,
        attack_random_start=False, **values,
    ).resolve().closed()  # fmt: skip


def plain(w, x):
    return torch.tanh(x.flatten(1) @ w["1.weight"].T + w["1.bias"]) @ w["3.weight"].T + w["3.bias"]


def averaged(w, x, eps):
    """log of the mean softmax over the draws ``eps``."""
    return torch.stack([plain(w, x + SIGMA * e).softmax(1) for e in eps]).mean(0).log()


def test_a_step_equals_a_transcription(monkeypatch):
    """x' climbs -log of the mean probability, whose mean and gradient have draws of their own; then M more are trained.

    Of the mean softmax ``p``: grad -log p_y = -(1/M) sum_k grad p_k / p, the weights p from the first M draws.
    """
    defense, model = build_defense("smoothadv", {"sigma": SIGMA}), network()
    w = {name: value.detach().clone() for name, value in model.named_parameters()}
    defense.prepare(model, (3, 2, 2)).double().train()
    x, y = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.arange(5) % 3
    made = recorded(monkeypatch)
    losses = defense.loss(model, x, y, Clock(0, 0, 1), settings())
    losses.total.backward()
    assert len(made) == 2 * 2 * M + M
    x_adv = x
    for step in range(2):
        first, second = (made[2 * M * step + M * part :][:M] for part in range(2))
        p = averaged(w, x_adv, first).exp()
        leaf = x_adv.detach().requires_grad_()
        each = torch.stack([plain(w, leaf + SIGMA * e).softmax(1) for e in second]).mean(0)
        (g,) = torch.autograd.grad((-each / p).gather(1, y[:, None]).sum(), leaf)
        x_adv = torch.minimum(torch.maximum(x_adv + STEP * g.sign(), x - EPS), x + EPS).clamp(0, 1)
    leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    loss = F.nll_loss(averaged(leaves, x_adv, made[-M:]), y)
    assert losses.total.item() == pytest.approx(loss.item(), rel=1e-10)
    for (name, leaf), slope in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert torch.allclose(model.get_parameter(name).grad, slope, rtol=1e-9), (name, leaf.shape)


def test_the_averaged_predictor_serves_noise_on_features_and_trades():
    """Its log-probabilities are logits: the cross-entropy and the KL of TRADES take them as they are."""
    model = perturb(network().float(), input_shape=(3, 2, 2), sites=["1"], init=0.5)
    x, y = torch.rand(4, 3, 2, 2), torch.arange(4) % 3
    answer = prediction(model, x, settings())
    assert torch.allclose(answer.exp().sum(1), torch.ones(4), atol=1e-5)
    for options in ({}, {"objective": "trades"}):
        values = settings(**options)
        assert (values.loss, training_adversary(values).eot_average) == ("averaged", "probability")
        losses = build_defense("learn2perturb").loss(model, x, y, Clock(0, 0, 1), values)
        assert torch.isfinite(losses.total)


def test_held_draws_are_one_function_through_the_attack(monkeypatch):
    """Every step has the draws of the first; what is trained on has others."""
    model = build_defense("smoothadv").prepare(network().float(), (3, 2, 2))
    made = recorded(monkeypatch)
    x, y = torch.rand(4, 3, 2, 2), torch.arange(4) % 3
    build_defense("smoothadv").loss(model, x, y, Clock(0, 0, 1), settings(attack_draws="held"))
    first, second, trained = made[: 2 * M], made[2 * M : 4 * M], made[4 * M :]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not any(torch.equal(one, other) for one in first for other in trained)


def test_the_noise_is_on_the_image_whatever_reads_it():
    model = build_defense("smoothadv", {"sigma": 0.25}).prepare(network().float(), (3, 2, 2)).eval()
    (noise,) = noise_modules(model)
    assert (noise.site, noise.place, noise.init) == ("", "input", 0.25)
    found = first_noise(model, torch.rand(2, 3, 2, 2))
    assert found.exact and found.constant == pytest.approx(1 / 0.25, rel=1e-6)  # Cohen et al. 2019
    with pytest.raises(SiteError, match="perturbed already"):
        build_defense("smoothadv").prepare(model, (3, 2, 2))


def test_no_noise_is_refused():
    with pytest.raises(ConfigError, match="sigma is 0"):
        build_defense("smoothadv", {"sigma": 0.0})
