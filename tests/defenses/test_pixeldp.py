"""PixelDP: the size of its noise, a training step against an independent transcription, and its certificates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from learn2perturb.certification.bounds import pixeldp_radius, vote_bounds
from learn2perturb.defenses import Clock, build_defense
from learn2perturb.defenses.pixeldp import noise_deviation, noise_ramp, parseval
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.models import Normalize, build_model
from learn2perturb.noise import fixed_noise, noise_modules, noise_parameters, noise_sites
from learn2perturb.noise.sensitivity import sensitivity
from learn2perturb.training.alternating import iterate
from learn2perturb.training.config import TrainConfig

LR, MU, DECAY, STD = 0.1, 0.9, 0.02, (0.5, 0.25)


class Small(nn.Module):
    """Normalise, convolve, classify."""

    def __init__(self, channels=2, size=5, classes=3, std=STD):
        super().__init__()
        self.normalize = Normalize((0.5,) * channels, std)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.fc = nn.Linear(4 * size * size, classes)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(self.normalize(x))).flatten(1))


def steps(defense, network, settings, x, y, clocks):
    """Make real training steps, one for each clock."""
    optimizers = defense.stages(settings)[0].optimizers(network)
    for clock in clocks:
        iterate(
            defense, network, clock, optimizers,
            lambda clock=clock: defense.loss(network, x, y, clock, settings), lambda losses: None,
        )  # fmt: skip
    return optimizers


def settings_of(**changes):
    values = {"schedule": "constant", "lr": LR, "momentum": MU, "nesterov": False, "weight_decay": DECAY, "epochs": 99}
    return TrainConfig(defense="pixeldp", recipe="paper", **{**values, **changes}).resolve()


# --- the noise


def test_the_deviation_at_the_defaults_is_the_papers():
    assert noise_deviation() == pytest.approx(0.2537, abs=5e-5)
    assert noise_deviation(2.0, bound=0.3, epsilon=0.5) == pytest.approx(12 * noise_deviation())
    assert noise_deviation(1.0, bound=0.3, mechanism="laplace") == pytest.approx(0.3 * math.sqrt(2))


def test_the_ramp_starts_at_a_tenth_and_ends_at_all():
    assert noise_ramp(0) == noise_ramp(421) == pytest.approx(0.1)
    assert noise_ramp(5000) == pytest.approx(1 - 0.99975**5000)
    assert noise_ramp(9210) == 1.0 > noise_ramp(9208)


def test_one_noise_layer_sits_after_the_first_convolution_and_is_not_trained():
    network = build_model("resnet20", input_shape=(3, 8, 8), normalization="centered")
    before = network.conv1.weight.detach().clone()
    build_defense("pixeldp").prepare(network, (3, 8, 8))
    assert noise_sites(network) == ["conv1"]
    assert noise_parameters(network) == []
    (noise,) = noise_modules(network)
    assert (noise.place, noise.distribution) == ("output", "gaussian")
    torch.testing.assert_close(network.conv1.weight.detach(), before / 3)
    largest = np.linalg.svd(before.flatten(1).numpy(), compute_uv=False).max()
    assert noise.theta.item() == pytest.approx(noise_deviation(largest), rel=1e-5)


@pytest.mark.parametrize("epoch", [0, 50, 200])
@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_equal_a_transcription_with_ramp_and_parseval(epoch, nesterov):
    settings = settings_of(nesterov=nesterov)
    defense = build_defense("pixeldp", {"parseval_loops": 10, "parseval_step": 0.01})
    torch.manual_seed(0)
    plain = Small()
    start = {name: value.detach().clone().double() for name, value in plain.named_parameters()}
    network = defense.prepare(plain, (2, 5, 5)).double().train()
    x, y = torch.rand(6, 2, 5, 5, dtype=torch.float64), torch.arange(6) % 3
    clocks = [Clock(epoch, batch, 100) for batch in range(3)]
    with fixed_noise(network, 4):
        eps = network.conv.perturbation.draw(torch.zeros(6, 4, 5, 5)).double()
        steps(defense, network, settings, x, y, clocks)

    # By hand: the variable is W, the network convolves with W / 3.
    w = {"conv.weight": start["conv.weight"], "fc.weight": start["fc.weight"], "fc.bias": start["fc.bias"]}
    momenta = {name: torch.zeros_like(value) for name, value in w.items()}
    scale = 1 / np.array(STD)[None, :, None, None]

    def sigma_of(kernel):
        matrix = (kernel.numpy() * scale).reshape(4, -1)
        return np.linalg.svd(matrix, compute_uv=False).max() * 0.1 * math.sqrt(2 * math.log(1.25 / 0.05))

    sigma = sigma_of(w["conv.weight"])
    for clock in clocks:
        s = 1 - min(0.99975**clock.step, 0.9)
        s = 1.0 if s > 0.9 else s
        leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
        images = (x - 0.5) / torch.tensor(STD).double().view(1, 2, 1, 1)
        h = F.conv2d(images, leaves["conv.weight"] / 3, padding=1) + s * sigma * eps
        loss = F.cross_entropy(torch.tanh(h).flatten(1) @ leaves["fc.weight"].T + leaves["fc.bias"], y)
        slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name in w:
            slope = slopes[name] + DECAY * w[name]
            momenta[name] = MU * momenta[name] + slope
            w[name] = w[name] - LR * (slope + MU * momenta[name] if nesterov else momenta[name])
        matrix = w["conv.weight"].reshape(4, 18).numpy()
        for _ in range(10):
            matrix = 1.01 * matrix - 0.01 * matrix @ matrix.T @ matrix
        w["conv.weight"] = torch.tensor(matrix).view(4, 2, 3, 3)
        sigma = sigma_of(w["conv.weight"])
    assert (network.conv.weight - w["conv.weight"] / 3).abs().max() < 1e-7
    assert (network.fc.weight - w["fc.weight"]).abs().max() < 1e-6
    assert (network.fc.bias - w["fc.bias"]).abs().max() < 1e-6
    assert network.conv.perturbation.theta.item() == pytest.approx(sigma, rel=1e-5)  # the ramp is gone after the step


def test_the_ramp_lasts_for_the_passes_of_the_loss_only():
    defense = build_defense("pixeldp")
    network = defense.prepare(Small(), (2, 5, 5))
    (noise,) = noise_modules(network)
    deviation, seen = noise.theta.item(), []
    network.conv.register_forward_pre_hook(lambda *_: seen.append(noise.theta.item()))
    x, y = torch.rand(3, 2, 5, 5), torch.arange(3)
    defense.loss(network, x, y, Clock(0, 0, 10), settings_of()).total.backward()
    assert seen == [pytest.approx(0.1 * deviation)]
    assert noise.theta.item() == deviation


def test_parseval_steps_bring_every_singular_value_to_one():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64) * 0.3
    before = torch.linalg.svdvals(weight.flatten(1))
    once = torch.linalg.svdvals(parseval(weight, 1, 3e-4).flatten(1))
    torch.testing.assert_close(once, (1 + 3e-4) * before - 3e-4 * before**3)
    many = torch.linalg.svdvals(parseval(weight, 4000, 5e-3).flatten(1))
    torch.testing.assert_close(many, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("options", "factor"), [({}, None), ({"sensitivity": "assumed"}, 1.0)])
def test_the_noise_follows_the_kernel_unless_its_sensitivity_is_assumed(options, factor):
    defense = build_defense("pixeldp", {"parseval_loops": 0, **options})
    network = defense.prepare(Small(), (2, 5, 5))
    with torch.no_grad():
        network.conv.weight.mul_(7)
    defense.after_step(network, Clock(0, 0, 1))
    measured = sensitivity(network, network.conv).item()
    assert measured > 3
    assert network.conv.perturbation.theta.item() == pytest.approx(noise_deviation(factor or measured), rel=1e-5)


def test_laplace_noise_uses_the_l1_sensitivity_and_leaves_the_kernel_alone():
    defense = build_defense("pixeldp", {"mechanism": "laplace"})
    network = Small()
    before = network.conv.weight.detach().clone()
    defense.prepare(network, (2, 5, 5))
    defense.after_step(network, Clock(0, 0, 1))
    assert torch.equal(network.conv.weight.detach(), before)
    columns = before.abs().sum((0, 2, 3)) / torch.tensor(STD)
    (noise,) = noise_modules(network)
    assert noise.distribution == "laplace"
    assert noise.theta.item() == pytest.approx(math.sqrt(2) * 0.1 * columns.max().item(), rel=1e-5)


def test_the_papers_recipe():
    settings = TrainConfig(defense="pixeldp", recipe="paper").resolve()
    steps_of = [391 * epoch for epoch in (*settings.milestones, settings.epochs)]
    assert steps_of == pytest.approx([40_000, 60_000, 80_000, 90_000], rel=0.004)
    assert (settings.lr, settings.momentum, settings.nesterov, settings.weight_decay) == (0.1, 0.9, False, 2e-4)
    assert settings.model_options == {"normalization": "centered"}
    defense = build_defense("pixeldp")
    assert (defense.predictor, defense.bound, defense.epsilon, defense.delta) == ("mean_probability", 0.1, 1.0, 0.05)


# --- certificates


def patterns(n, generator):
    """Three classes of 4 x 4 images: stripes this way, stripes that way, a checkerboard; with some noise."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    signs = torch.stack([(-1.0) ** rows, (-1.0) ** columns, (-1.0) ** (rows + columns)])
    y = torch.arange(n) % 3
    x = 0.5 + 0.2 * signs[y].unsqueeze(1) + 0.05 * torch.randn(n, 1, 4, 4, generator=generator)
    return x.clamp(0, 1), y


def votes(network, x, draws):
    """Return the votes (N, classes) of ``draws`` independent draws."""
    with torch.no_grad():
        answers = torch.cat([network(x.repeat(100, 1, 1, 1)).view(100, len(x), -1) for _ in range(draws // 100)])
    return F.one_hot(answers.argmax(2), answers.shape[2]).sum(0).numpy()


def strong_l2_attack(network, x, y, radii, steps=40, draws=16):
    """PGD of normalised steps on the mean probability of fresh draws, to the edge of each image's own ball."""
    r = torch.as_tensor(radii, dtype=torch.float32).view(-1, 1, 1, 1)
    moved = x.clone()
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        p = network(leaf.repeat(draws, 1, 1, 1)).softmax(1).view(draws, len(x), -1).mean(0)
        (g,) = torch.autograd.grad(p[torch.arange(len(x)), y].log().sum(), leaf)
        moved = leaf.detach() - 0.2 * r * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        d = moved - x
        moved = x + d * (r / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)).clamp_max(1.0)
    return moved


def test_certificates_are_violated_no_more_often_than_stated():
    """The pixel box is left out on purpose: the certificate holds for every change, so the attack may use them all."""
    generator = torch.Generator().manual_seed(0)
    x, y = patterns(240, generator)
    defense = build_defense("pixeldp", {"ramp": False, "bound": 0.2})
    torch.manual_seed(1)
    network = defense.prepare(Small(channels=1, size=4, std=(1.0,)), (1, 4, 4)).train()
    settings = settings_of(weight_decay=0.0, lr=0.2)
    steps(defense, network, settings, x[:160], y[:160], [Clock(0, batch, 60) for batch in range(60)])
    network.eval()
    (noise,) = noise_modules(network)
    sigma, d = noise.theta.item(), sensitivity(network, network.conv).item()
    assert sigma == pytest.approx(noise_deviation(d, bound=0.2), rel=1e-5)
    alpha, images = 0.05, x[160:]
    top = votes(network, images, 200).argmax(1)
    low, high = vote_bounds(votes(network, images, 1000), alpha, top=top)
    tight = pixeldp_radius(low, high, sigma=sigma, sensitivity=d)
    dp = pixeldp_radius(low, high, sigma=sigma, sensitivity=d, rule="dp")
    certified = tight > 0
    assert certified.mean() > 0.9
    assert (top == y[160:].numpy()).mean() > 0.9
    assert (dp <= tight).all()
    assert dp.max() > 0.05

    attacked = strong_l2_attack(network, images, torch.tensor(top), tight)
    sizes = (attacked - images).flatten(1).norm(dim=1).numpy()
    assert (sizes <= tight * (1 + 1e-5) + 1e-6).all()
    assert sizes[certified] == pytest.approx(tight[certified], rel=0.01)  # it goes to the edge
    fallen = votes(network, attacked, 1000).argmax(1) != top
    allowed = stats.binom.ppf(0.999, int(certified.sum()), alpha)
    assert fallen[certified].sum() <= allowed
    # The attack is no straw man: at three times the radius it does win.
    beyond = strong_l2_attack(network, images, torch.tensor(top), 3 * tight + 0.05)
    assert (votes(network, beyond, 1000).argmax(1) != top).mean() > 0.5


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": -0.1}, "bound is -0.1"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"delta": 1.0}, "delta between 0 and 1"),
        ({"mechanism": "uniform"}, "allowed: gaussian, laplace"),
        ({"sensitivity": "guessed"}, "allowed: measured, assumed"),
        ({"parseval_loops": -1}, "parseval_loops must be .* got -1"),
        ({"ramp": 0.5}, "ramp must be True or False, got 0.5"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_defense("pixeldp", options)


def test_networks_without_a_known_first_convolution_are_refused():
    with pytest.raises(SiteError, match="no convolution"):
        build_defense("pixeldp").prepare(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    squared = nn.Sequential(nn.ReLU6(), nn.Threshold(0.5, 0.0), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    with pytest.raises(SiteError, match="more than a scale and a shift"):
        build_defense("pixeldp").prepare(squared, (1, 8, 8))
    mirrored = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(SiteError, match="zero padding"):
        build_defense("pixeldp").prepare(mirrored, (1, 4, 4))
