"""PNI: training steps against an independent transcription, its sites, its recipe, what its metrics say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.models import build_model
from learn2perturb.noise import noise_modules, noise_parameters, noise_sites
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.alternating import iterate

LR, MU, DECAY, EPS, STEP, STEPS = 0.1, 0.9, 0.01, 0.1, 0.04, 2


class Tiny(nn.Module):
    """Convolution, BatchNorm, linear layer; every layer read once in a pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(18, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.bn(self.conv(x))).flatten(1))


def config(**options):
    return TrainConfig(
        defense="pni", recipe="fast", epochs=2, schedule="constant", lr=LR, momentum=MU, weight_decay=DECAY, eps=EPS,
        attack_step_size=STEP, attack_steps=STEPS, options=options,
    ).resolve()  # fmt: skip


def trained(settings, steps):
    """Make real steps; return the network, the values it started from, and the batch."""
    defense = build_defense("pni", settings.options)
    torch.manual_seed(0)
    network = defense.prepare(Tiny(), (1, 3, 3)).double().train()
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizers = defense.stages(settings)[0].optimizers(network)
    x, y = torch.rand(8, 1, 3, 3, dtype=torch.float64) * 0.6 + 0.2, torch.arange(8) % 3

    def objective(batch):
        torch.manual_seed(batch)  # the random start of PGD
        return defense.loss(network, x, y, Clock(0, batch, 5), settings)

    for batch in range(steps):
        iterate(defense, network, Clock(0, batch, 5), optimizers, lambda b=batch: objective(b), lambda _: None)
    return network, start, x, y


class Transcription:
    """PNI's training by hand, from the paper's equations: no module, optimiser, attack or parametrisation."""

    def __init__(self, start, x, y, draw, perturbed):
        self.v, self.x, self.y, self.draw, self.perturbed = dict(start), x, y, draw, perturbed
        self.momenta = {name: torch.zeros_like(value) for name, value in start.items()}
        self.mean, self.var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def inject(self, value, alpha):
        """Return ``v + alpha * eta``, ``eta ~ N(0, std(v)^2)``; no gradient through the standard deviation."""
        fixed = value.detach()
        std = ((fixed - fixed.mean()).square().sum() / (fixed.numel() - 1)).sqrt()
        return value + alpha * (std * self.draw(tuple(value.shape)).double())

    def logits(self, v, x, train):
        h = x
        for layer in ("conv", "fc"):
            weight, alpha = f"{layer}.weight", f"{layer}.perturbation.theta"
            if self.perturbed == "weight":
                weight, alpha = (f"{layer}.parametrizations.weight.{name}" for name in ("original", "0.alpha"))
            h = self.inject(h, v[alpha]) if self.perturbed == "input" else h
            w = self.inject(v[weight], v[alpha]) if self.perturbed == "weight" else v[weight]
            h = F.conv2d(h, w, v["conv.bias"], padding=1) if layer == "conv" else h @ w.T + v["fc.bias"]
            h = self.inject(h, v[alpha]) if self.perturbed == "output" else h
            if layer == "conv":
                h = torch.tanh(self.norm(h, v, train)).flatten(1)
        return h

    def norm(self, h, v, train):
        mean, var = self.mean, self.var
        if train:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
            count = h.numel() / h.shape[1]
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach() * count / (count - 1)
        h = (h - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        return h * v["bn.weight"].view(-1, 1, 1) + v["bn.bias"].view(-1, 1, 1)

    def step(self, batch):
        leaves = {name: value.clone().requires_grad_() for name, value in self.v.items()}
        clean = F.cross_entropy(self.logits(leaves, self.x, True), self.y)
        torch.manual_seed(batch)
        x_adv = (self.x + (2 * torch.rand_like(self.x) - 1) * EPS).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = F.cross_entropy(self.logits(self.v, x_adv, False), self.y, reduction="sum")
            moved = x_adv.detach() + STEP * torch.autograd.grad(loss, x_adv)[0].sign()
            x_adv = torch.minimum(torch.maximum(moved, self.x - EPS), self.x + EPS).clamp(0, 1)
        loss = 0.5 * clean + 0.5 * F.cross_entropy(self.logits(leaves, x_adv, True), self.y)
        for name, slope in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            noise = name.endswith(("alpha", "theta"))
            slope = slope if noise else slope + DECAY * self.v[name]  # alpha has no weight decay
            self.momenta[name] = MU * self.momenta[name] + slope
            self.v[name] = self.v[name] - LR * (slope + MU * self.momenta[name])  # Nesterov


@pytest.mark.parametrize("granularity", ["layer", "channel", "element"])
@pytest.mark.parametrize("variant", ["weight", "output", "input"])
def test_two_steps_equal_a_transcription(variant, granularity, monkeypatch):
    streams = [torch.Generator().manual_seed(7) for _ in range(2)]  # the same draws, in the same order, for both
    monkeypatch.setattr(
        "learn2perturb.noise.base.draw",
        lambda name, shape, device, channels_last=False: torch.randn(tuple(shape), generator=streams[0]),
    )
    network, start, x, y = trained(config(variant=variant, granularity=granularity), 2)
    by_hand = Transcription(start, x, y, lambda shape: torch.randn(shape, generator=streams[1]), variant)
    for batch in range(2):
        by_hand.step(batch)
    for name, value in network.named_parameters():
        assert (value - by_hand.v[name]).abs().max() < 1e-6, name  # logits are float32 in every execution mode
    assert torch.allclose(network.bn.running_var, by_hand.var, atol=1e-6)
    for alpha in noise_parameters(network):
        assert (alpha - 0.25).abs().max() > 1e-4  # the loss moved it


def test_sites_are_every_convolution_and_linear_layer():
    for variant in ("weight", "output", "input"):
        network = build_defense("pni", {"variant": variant}).prepare(build_model("resnet20"), (3, 32, 32))
        layers = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert noise_sites(network) == layers
        assert len(layers) == 20  # no convolution in a shortcut
        assert all(alpha.numel() == 1 and alpha.item() == 0.25 for alpha in noise_parameters(network))
    chosen = build_defense("pni", {"sites": "layer1.*.conv1"}).prepare(build_model("resnet20"), (3, 32, 32))
    assert noise_sites(chosen) == [f"layer1.{block}.conv1" for block in range(3)]


def test_alpha_is_free_in_sign():
    """On labels that noise only hurts, a large learning rate takes alpha through zero; nothing projects it."""
    settings = config(init=0.0)
    network, *_ = trained(settings, 3)
    assert min(alpha.min().item() for alpha in noise_parameters(network)) < 0
    assert all((module.scale()[1] >= 0).all() for module in noise_modules(network))  # metrics tell its size


def test_its_papers_recipe():
    settings = TrainConfig(defense="pni", recipe="paper").resolve()
    assert (settings.epochs, settings.lr, settings.milestones, settings.decay) == (160, 0.1, [80, 120], 0.1)
    assert (settings.weight_decay, settings.nesterov, settings.batch_size) == (3e-4, True, 128)
    assert (settings.adversarial_delay, settings.eps, settings.attack_labels) == (5, 0.031, "predicted")
    assert (settings.attack_steps, settings.attack_step_size, settings.attack_random_start) == (7, 0.01, True)


def test_metrics_have_the_mean_size_of_alpha_for_each_epoch_and_site():
    config = TrainConfig(
        defense="pni", model="digits_cnn", dataset="digits", recipe="fast", epochs=2, limit=128, batch_size=64,
        attack_steps=1, monitor=0, engine="plain", device="cpu",
    )  # fmt: skip
    run = train(config, progress=False)
    sizes = {f"{module.site}.weight": abs(module.alpha.item()) for module in noise_modules(run.model)}
    assert {site: values["mean"] for site, values in run.metrics[-1]["alpha"].items()} == pytest.approx(sizes)
    assert run.metrics[-1]["alpha_mean"] == pytest.approx(sum(sizes.values()) / len(sizes))
    assert run.metrics[0]["alpha_mean"] != run.metrics[1]["alpha_mean"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"variant": "bias"}, ConfigError, "allowed: weight, output, input"),
        ({"granularity": "pixel"}, ConfigError, "granularity is 'pixel'"),
        ({"init": -0.1}, ConfigError, "init is -0.1"),
        ({"init": True}, ConfigError, "init is True"),
        ({"varient": "weight"}, UnknownNameError, "did you mean 'variant'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        build_defense("pni", options)
