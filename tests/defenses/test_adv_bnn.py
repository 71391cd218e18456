"""Adv-BNN: training steps against an independent transcription, its stages, what it starts from, its metrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.errors import ConfigError
from learn2perturb.models import build_model
from learn2perturb.noise import kl_divergence, noise_modules, noise_sites
from learn2perturb.runs import load
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.alternating import iterate

LR, EPS, STEP, STEPS, SHARE, PRIOR, INIT, EXAMPLES = 0.01, 0.1, 0.04, 2, 0.5, 0.3, 0.2, 40


class Tiny(nn.Module):
    """Convolution, BatchNorm, linear layer, all with biases: six tensors, all of them variational."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(18, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.bn(self.conv(x))).flatten(1))


TENSORS = [f"{layer}.{tensor}" for layer in ("conv", "bn", "fc") for tensor in ("weight", "bias")]


def mean_of(name):
    layer, tensor = name.split(".")
    return f"{layer}.parametrizations.{tensor}.original"


def s_of(name):
    layer, tensor = name.split(".")
    return f"{layer}.parametrizations.{tensor}.0.log_std"


class Transcription:
    """Adv-BNN by hand: no module, optimiser, attack, parametrisation or KL of the package."""

    def __init__(self, start, x, y, draw):
        self.v, self.x, self.y, self.draw = dict(start), x, y, draw
        self.first = {name: torch.zeros_like(value) for name, value in start.items()}
        self.second = {name: torch.zeros_like(value) for name, value in start.items()}
        self.mean, self.var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        self.steps = 0

    def logits(self, v, x, train):
        w = {}
        for name in TENSORS:  # in the order in which the layers read them
            eps = self.draw(tuple(v[mean_of(name)].shape)).double()
            w[name] = v[mean_of(name)] + v[s_of(name)].exp() * eps
        h = F.conv2d(x, w["conv.weight"], w["conv.bias"], padding=1)
        mean, var = self.mean, self.var
        if train:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
            count = h.numel() / h.shape[1]
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach() * count / (count - 1)
        h = (h - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        h = h * w["bn.weight"].view(-1, 1, 1) + w["bn.bias"].view(-1, 1, 1)
        return torch.tanh(h).flatten(1) @ w["fc.weight"].T + w["fc.bias"]

    def kl(self, v):
        total = 0.0
        for name in TENSORS:
            mu, s = v[mean_of(name)], v[s_of(name)]
            terms = math.log(PRIOR) - s + (torch.exp(2 * s) + mu**2) / (2 * PRIOR**2) - 0.5
            total = total + terms.sum()
        return total

    def step(self):
        leaves = {name: value.clone().requires_grad_() for name, value in self.v.items()}
        x_adv = self.x.clone()  # no random start
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = F.cross_entropy(self.logits(self.v, x_adv, False), self.y, reduction="sum")
            moved = x_adv.detach() + STEP * torch.autograd.grad(loss, x_adv)[0].sign()
            x_adv = torch.minimum(torch.maximum(moved, self.x - EPS), self.x + EPS).clamp(0, 1)
        loss = F.cross_entropy(self.logits(leaves, x_adv, True), self.y) + SHARE / EXAMPLES * self.kl(leaves)
        self.steps += 1
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
            m, q = self.first[name] / (1 - 0.9**self.steps), self.second[name] / (1 - 0.999**self.steps)
            self.v[name] = self.v[name] - LR * m / (q.sqrt() + 1e-8)


def test_three_steps_equal_a_transcription(monkeypatch):
    streams = [torch.Generator().manual_seed(7) for _ in range(2)]  # the same draws, in the same order, for both
    monkeypatch.setattr(
        "learn2perturb.noise.base.draw",
        lambda name, shape, device, channels_last=False: torch.randn(tuple(shape), generator=streams[0]),
    )
    settings = TrainConfig(
        defense="adv_bnn", recipe="paper", epochs=1, lr=LR, eps=EPS, attack_step_size=STEP, attack_steps=STEPS,
        options={"kl_weight": SHARE, "prior": PRIOR, "init": INIT},
    ).resolve()  # fmt: skip
    defense = build_defense("adv_bnn", settings.options)
    torch.manual_seed(0)
    network = defense.prepare(Tiny(), (1, 3, 3)).double().train()
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    assert set(start) == {*map(mean_of, TENSORS), *map(s_of, TENSORS)}  # nothing is left deterministic
    optimizers = defense.stages(settings)[0].optimizers(network)
    x, y = torch.rand(8, 1, 3, 3, dtype=torch.float64) * 0.6 + 0.2, torch.arange(8) % 3
    by_hand = Transcription(start, x, y, lambda shape: torch.randn(shape, generator=streams[1]))
    for batch in range(3):
        clock = Clock(0, batch, 5, examples=EXAMPLES)
        expected = by_hand.kl(by_hand.v)
        done = iterate(
            defense, network, clock, optimizers,
            lambda clock=clock: defense.loss(network, x, y, clock, settings), lambda _: None,
        )  # fmt: skip
        assert done.losses.extra["kl"].item() == pytest.approx(expected.item(), rel=1e-6)
        by_hand.step()
    for name, value in network.named_parameters():
        # Adam divides by the gradient's size, so float32 logits show more than they do under SGD.
        assert (value - by_hand.v[name]).abs().max() < 1e-5, name
        assert (value - start[name]).abs().max() > 1e-3
    assert torch.allclose(network.bn.running_mean, by_hand.mean, atol=1e-6)


def test_the_kl_counts_once_in_an_epoch_whatever_the_batch():
    """Its share of one example is ``kl_weight / N``: N of the clock, or else batches times the size of this one."""
    settings = TrainConfig(defense="adv_bnn", recipe="fast", attack_steps=1, options={"kl_weight": 1.0}).resolve()
    defense = build_defense("adv_bnn", settings.options)
    network = defense.prepare(Tiny(), (1, 3, 3))
    x, y = torch.rand(4, 1, 3, 3), torch.arange(4) % 3
    kl = kl_divergence(network).item()
    for clock, examples in ((Clock(0, 0, 5, examples=18), 18), (Clock(0, 0, 5), 20)):
        losses = defense.loss(network, x, y, clock, settings)
        assert (losses.total - losses.adversarial).item() == pytest.approx(kl / examples, rel=1e-4)


def test_every_convolution_linear_layer_and_norm_is_variational():
    network = build_defense("adv_bnn").prepare(build_model("resnet18"), (3, 32, 32))
    layers = [
        name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    ]
    assert noise_sites(network) == layers
    assert not [name for name, _ in network.named_parameters() if "parametrizations" not in name]


def test_means_start_from_the_network_or_as_in_the_released_code():
    torch.manual_seed(0)
    plain = Tiny()
    kept = build_defense("adv_bnn").prepare(Tiny(), (1, 3, 3))
    torch.manual_seed(0)
    kept = build_defense("adv_bnn").prepare(Tiny(), (1, 3, 3))
    for name, value in plain.named_parameters():
        assert torch.equal(kept.get_parameter(mean_of(name)), value)
    wide = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 50))
    fresh = build_defense("adv_bnn", {"mean_init": "released"}).prepare(wide, (16, 3, 3))
    for name, fan_in in (("0.weight", 144), ("0.bias", 144), ("3.weight", 64), ("3.bias", 64)):
        mu, bound = fresh.get_parameter(mean_of(name)), fan_in**-0.5
        assert 0.9 * bound < mu.abs().max() <= bound
        if mu.numel() > 1000:
            assert mu.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    gain = fresh.get_parameter(mean_of("1.weight"))
    assert 0 <= gain.min() < 0.15
    assert 0.85 < gain.max() <= 1
    assert (fresh.get_parameter(mean_of("1.bias")) == 0).all()
    assert all(torch.allclose(module.log_std.exp(), torch.tensor(0.1)) for module in noise_modules(fresh))


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(200, [80, 60, 40, 20]), (20, [8, 6, 4, 2]), (10, [4, 3, 2, 1]), (4, [2, 1, 1]), (1, [1]), (0, [0])],
)
def test_stages_keep_their_proportions(epochs, expected):
    settings = TrainConfig(defense="adv_bnn", recipe="paper", epochs=epochs).resolve()
    stages = build_defense("adv_bnn", settings.options).stages(settings)
    assert [stage.epochs for stage in stages] == expected
    assert [stage.factor(Clock(0, 0, 1)) for stage in stages] == pytest.approx([0.1**i for i in range(len(expected))])
    network = build_defense("adv_bnn").prepare(Tiny(), (1, 3, 3))
    first, last = stages[0].optimizers(network), stages[-1].optimizers(network)
    assert isinstance(first["weights"], torch.optim.Adam)
    assert first["weights"] is not last["weights"]
    assert [group["lr"] for group in first["noise"].param_groups] == [0.01]


def test_recipes():
    paper = TrainConfig(defense="adv_bnn", recipe="paper").resolve()
    assert (paper.epochs, paper.lr, paper.weight_decay, paper.batch_size) == (200, 0.01, 0.0, 128)
    assert (paper.alpha, paper.beta, paper.adversarial_delay, paper.attack_labels) == (0.0, 1.0, 0, "true")
    assert (paper.attack_steps, paper.attack_step_size, paper.attack_random_start) == (10, 0.007, False)
    for recipe in ("common", "fast"):
        own, other = (TrainConfig(defense=name, recipe=recipe).resolve() for name in ("adv_bnn", "pgd_at"))
        same = ("epochs", "schedule", "milestones", "eps", "attack_steps", "attack_step_size", "attack_random_start")
        assert all(getattr(own, name) == getattr(other, name) for name in same)
        (stage,) = build_defense("adv_bnn", own.options).stages(own)
        assert stage.epochs == other.epochs


def test_a_run_over_stages_is_saved_loaded_and_measured(tmp_path):
    config = TrainConfig(
        defense="adv_bnn", model="digits_cnn", dataset="digits", recipe="paper", epochs=4, limit=64, batch_size=32,
        attack_steps=1, monitor=0, engine="plain", device="cpu", tensorboard=False, options={"init": 0.05},
    )  # fmt: skip
    run = train(config, out=tmp_path, progress=False)
    assert [line["lr"] for line in run.metrics] == pytest.approx([0.01, 0.01, 0.001, 1e-4])
    last = run.metrics[-1]
    sigmas = {
        f"{module.site}.{module.place}": module.log_std.exp().mean().item() for module in noise_modules(run.model)
    }
    assert {site: values["mean"] for site, values in last["sigma"].items()} == pytest.approx(sigmas)
    assert last["sigma_mean"] == pytest.approx(sum(sigmas.values()) / len(sigmas))
    assert last["kl"] < run.metrics[0]["kl"]
    twin = load(tmp_path)
    assert torch.equal(kl_divergence(twin), kl_divergence(run.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": 0.0}, "prior is 0"),
        ({"init": -1.0}, "init is -1.0"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1"),
        ({"mean_init": "zero"}, "allowed: network, released"),
        ({"mean_init": None}, "allowed: network, released"),
        ({"stage_lengths": 80}, "a list such as"),
        ({"stage_lengths": [80, 0]}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_defense("adv_bnn", options)
