"""Learn2Perturb against an independent transcription of algorithm 1, and against the recurrence of its regulariser."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.errors import ConfigError
from learn2perturb.noise import fixed_noise, noise_modules, noise_parameters
from learn2perturb.training.alternating import iterate
from learn2perturb.training.config import TrainConfig

GAMMA, LR, MU, DECAY, EPS, STEP, STEPS = 0.02, 0.1, 0.9, 0.01, 0.1, 0.04, 3
BATCHES = 5


def config(**changes):
    """Return settings in which every term of an iteration weighs something."""
    options = {"gamma": GAMMA, "noise_delay": 0, **changes.pop("options", {})}
    settings = {
        "defense": "learn2perturb", "recipe": "fast", "lr": LR, "momentum": MU, "weight_decay": DECAY, "epochs": 4,
        "schedule": "constant", "eps": EPS, "attack_step_size": STEP, "attack_steps": STEPS, "alpha": 0.5, "beta": 0.5,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes}, options=options).resolve()


class Tiny(nn.Module):
    """Two layers with a smooth activation and one site in between."""

    def __init__(self):
        super().__init__()
        self.first, self.site, self.second = nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.site(self.first(x.flatten(1)))))


def setting(settings):
    """Return defense, perturbed network, optimisers and a batch, in float64: rounding must not hide an error."""
    defense = build_defense("learn2perturb", {**settings.options, "sites": "site"})
    torch.manual_seed(0)
    network = defense.prepare(Tiny(), (1, 2, 2)).double().train()
    optimizers = defense.stages(settings)[0].optimizers(network)
    # Away from the edges of the box, so that only the ball clips; labels that the network does not give by itself.
    return defense, network, optimizers, torch.rand(8, 1, 2, 2, dtype=torch.float64) * 0.6 + 0.2, torch.arange(8) % 3


def run(settings, steps, seed=3):
    """Make ``steps`` real steps with replayed noise; return the network and what it started from."""
    defense, network, optimizers, x, y = setting(settings)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    with fixed_noise(network, seed):
        eps = network.site.perturbation.draw(torch.zeros(8, 6)).double()
        for batch in range(steps):
            clock = Clock(0, batch, BATCHES)
            defense.begin_step(network, clock)
            iterate(
                defense, network, clock, optimizers,
                lambda clock=clock: _objective(defense, network, x, y, clock, settings), lambda losses: None,
            )  # fmt: skip
    return network, start, eps, x, y


def _objective(defense, network, x, y, clock, settings):
    torch.manual_seed(clock.batch)  # the random start of PGD
    return defense.loss(network, x, y, clock, settings)


class Transcription:
    """Algorithm 1 by hand: no module, no optimiser and no attack of the package."""

    def __init__(self, start, eps, x, y, *, labels="true", alpha=0.5, beta=0.5):
        self.v = {name: value.clone() for name, value in start.items()}
        self.theta_name = next(name for name in start if "theta" in name)
        self.weights = [name for name in start if name != self.theta_name]
        self.eps, self.x, self.y = eps, x, y
        self.labels, self.alpha, self.beta = labels, alpha, beta
        self.momenta = {}

    def logits(self, values, x):
        h = x.flatten(1) @ values["first.weight"].T + values["first.bias"]
        h = h + values[self.theta_name] * self.eps
        return torch.tanh(h) @ values["second.weight"].T + values["second.bias"]

    def loss(self, values, batch):
        clean = self.logits(values, self.x)
        labels = clean.argmax(1) if self.labels == "predicted" else self.y
        fixed = {name: value.detach() for name, value in values.items()}
        torch.manual_seed(batch)
        x_adv = self.x + (2 * torch.rand_like(self.x) - 1) * EPS
        x_adv = x_adv.clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(self.logits(fixed, x_adv), labels, reduction="sum"), x_adv)
            moved = x_adv.detach() + STEP * g.sign()
            x_adv = torch.minimum(torch.maximum(moved, self.x - EPS), self.x + EPS).clamp(0, 1)
        adversarial = F.cross_entropy(self.logits(values, x_adv), self.y)
        return self.alpha * F.cross_entropy(clean, self.y) + self.beta * adversarial

    def gradients(self, batch):
        values = {name: value.clone().requires_grad_() for name, value in self.v.items()}
        names = list(values)
        slopes = torch.autograd.grad(self.loss(values, batch), [values[name] for name in names])
        return dict(zip(names, slopes, strict=True))

    def sgd(self, name, gradient):
        """Nesterov as in Sutskever et al. and torch: b <- mu b + g, w <- w - lr (g + mu b)."""
        b = self.momenta.get(name)
        b = gradient if b is None else MU * b + gradient
        self.momenta[name] = b
        self.v[name] = self.v[name] - LR * (gradient + MU * b)

    def regulariser(self, tau=1.0):
        """Return the gradient of -(gamma / tau) sum sqrt(theta)."""
        return -GAMMA / tau / (2 * self.v[self.theta_name].sqrt())

    def step_weights(self, g):
        for name in self.weights:
            self.sgd(name, g[name] + DECAY * self.v[name])

    def step_theta(self, gradient):
        self.sgd(self.theta_name, gradient)
        self.project()

    def project(self):
        self.v[self.theta_name] = self.v[self.theta_name].clamp(min=0.01)


def check_equal(network, by_hand):
    for name, value in network.named_parameters():
        assert (value - by_hand.v[name]).abs().max() < 1e-6, name  # logits are float32 in every execution mode


@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_three_steps_equal_algorithm_1_by_hand(labels):
    network, start, *batch = run(config(attack_labels=labels), 3)
    by_hand = Transcription(start, *batch, labels=labels)
    for step in range(3):
        g = by_hand.gradients(step)  # both gradients at W^{t-1}, theta^{t-1}
        regulariser = by_hand.regulariser()
        by_hand.step_weights(g)
        by_hand.step_theta(g[by_hand.theta_name] + regulariser)
    check_equal(network, by_hand)
    theta = network.site.perturbation.theta
    assert theta.std() > 1e-4  # the loss shaped it: without that, this test would prove little
    assert not torch.equal(theta, start[by_hand.theta_name])


def test_predicted_and_true_labels_are_different_trainings():
    one, two = (run(config(attack_labels=labels), 2)[0] for labels in ("true", "predicted"))
    assert not torch.allclose(one.first.weight, two.first.weight, atol=1e-6)


@pytest.mark.parametrize(("weight_steps", "noise_steps"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_sequential_makes_n_weight_steps_then_n_noise_steps_at_the_new_weights(weight_steps, noise_steps):
    options = {"theta_step": "sequential", "weight_steps": weight_steps, "noise_steps": noise_steps}
    network, start, *batch = run(config(options=options), 3)
    by_hand = Transcription(start, *batch)
    for step in range(3):
        for _ in range(weight_steps):
            by_hand.step_weights(by_hand.gradients(step))
        for _ in range(noise_steps):
            g = by_hand.gradients(step)
            by_hand.step_theta(g[by_hand.theta_name] + by_hand.regulariser())
    check_equal(network, by_hand)


def test_released_steps_the_regulariser_first_and_decays_the_momentum_twice():
    network, start, *batch = run(config(options={"theta_step": "released"}), 3)
    by_hand = Transcription(start, *batch)
    for step in range(3):
        by_hand.step_theta(by_hand.regulariser())
        g = by_hand.gradients(step)
        by_hand.step_weights(g)
        by_hand.step_theta(g[by_hand.theta_name])
    check_equal(network, by_hand)


@pytest.mark.parametrize("kind", ["combined", "released"])
def test_literal_gamma_is_subtracted_as_it_is(kind):
    network, start, *batch = run(config(options={"gamma_through_optimizer": False, "theta_step": kind}), 3)
    by_hand = Transcription(start, *batch)
    name = by_hand.theta_name
    for step in range(3):
        slope = by_hand.regulariser()
        if kind == "released":
            by_hand.v[name] = by_hand.v[name] - slope
            by_hand.project()
        g = by_hand.gradients(step)
        by_hand.step_weights(g)
        by_hand.sgd(name, g[name])
        if kind == "combined":
            by_hand.v[name] = by_hand.v[name] - slope
        by_hand.project()
    check_equal(network, by_hand)


def test_alpha_0_is_adversarial_only():
    network, start, *batch = run(config(alpha=0.0, beta=1.0), 2)
    by_hand = Transcription(start, *batch, alpha=0.0, beta=1.0)
    for step in range(2):
        g = by_hand.gradients(step)
        regulariser = by_hand.regulariser()
        by_hand.step_weights(g)
        by_hand.step_theta(g[by_hand.theta_name] + regulariser)
    check_equal(network, by_hand)


# --- delays, bounds, decay


def test_before_the_noise_delay_noise_is_off_theta_frozen_and_before_the_adversarial_delay_there_is_no_adversary():
    settings = config(options={"noise_delay": 2}, adversarial_delay=1)
    defense, network, optimizers, x, y = setting(settings)
    before = noise_parameters(network)[0].detach().clone()
    for epoch, attacked, noisy in ((0, False, False), (1, True, False), (2, True, True)):
        clock = Clock(epoch, 0, BATCHES)
        defense.begin_step(network, clock)
        assert torch.equal(network(x), network(x)) is not noisy
        assert all(parameter.requires_grad is noisy for parameter in noise_parameters(network))
        assert (defense.regulariser(network, clock) is not None) is noisy
        result = iterate(
            defense,
            network,
            clock,
            optimizers,
            lambda c=clock: defense.loss(network, x, y, c, settings),
            lambda _: None,
        )
        assert (result.losses.adversarial is not None) is attacked
        assert (result.loss_slope is not None) is noisy
        assert torch.equal(noise_parameters(network)[0], before) is not noisy


def test_theta_never_falls_below_its_minimum():
    settings = config(options={"gamma": 0.0, "init": 0.03, "minimum": 0.02}, lr=5.0)
    network, *_ = run(settings, 6)
    theta = noise_parameters(network)[0]
    assert theta.min().item() == pytest.approx(0.02)
    assert all(module.minimum == 0.02 for module in noise_modules(network))


def test_weight_decay_never_touches_theta():
    settings = config(options={"gamma": 0.0}, weight_decay=0.5)
    _, network, optimizers, *_ = setting(settings)
    assert optimizers["noise"].param_groups[0]["weight_decay"] == 0
    assert optimizers["weights"].param_groups[0]["weight_decay"] == 0.5
    noise = {id(parameter) for parameter in noise_parameters(network)}
    assert {id(p) for p in optimizers["noise"].param_groups[0]["params"]} == noise
    assert not {id(p) for p in optimizers["weights"].param_groups[0]["params"]} & noise
    strong, weak = (run(config(weight_decay=decay, options={"gamma": 0.0}), 1)[0] for decay in (0.5, 0.0))
    assert torch.equal(noise_parameters(strong)[0], noise_parameters(weak)[0])
    assert not torch.equal(strong.first.weight, weak.first.weight)


# --- tau and the regulariser's schedule


@pytest.mark.parametrize(
    ("tau", "expected"), [("harmonic", [1, 1.5, 1 + 1 / 2 + 1 / 3]), ("released", [1, 1, 1.5])], ids=str
)
def test_tau_is_a_harmonic_number_and_never_zero(tau, expected):
    defense = build_defense("learn2perturb", {"tau": tau, "noise_delay": 7})
    assert [defense.tau_at(epoch) for epoch in (7, 8, 9)] == pytest.approx(expected)


def test_the_regulariser_is_a_sum_of_square_roots():
    settings = config()
    defense, network, *_ = setting(settings)
    clock = Clock(1, 0, BATCHES)
    value = (defense.regulariser_weight(clock) * defense.regulariser(network, clock)).item()
    assert value == pytest.approx(-GAMMA / 1.5 * 6 * math.sqrt(0.25))  # 6 elements; tau is H_2


@pytest.mark.parametrize("tau", ["harmonic", "released"])
@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("theta_step", ["combined", "sequential", "released"])
def test_learn2perturb_r_follows_the_recurrence_with_all_thetas_equal(theta_step, literal, tau):
    options = {
        "noise_from_loss": False, "noise_delay": 1, "theta_step": theta_step, "gamma_through_optimizer": not literal,
        "tau": tau,
    }  # fmt: skip
    if theta_step == "sequential":
        options |= {"weight_steps": 1, "noise_steps": 2}
    theta = follow_the_schedule(config(options=options, schedule="one_cycle", epochs=4, attack_steps=1))
    assert theta > 0.26


def follow_the_schedule(settings):
    """Train for four epochs, each step checked against the schedule; return the one value that all thetas have."""
    defense, network, optimizers, x, y = setting(settings)
    schedule = defense.schedule_only(settings, BATCHES)
    factor = defense.stages(settings)[0].factor
    for epoch, batch in itertools.product(range(4), range(BATCHES)):
        clock = Clock(epoch, batch, BATCHES, stage_epoch=epoch)
        for optimizer in optimizers.values():
            group = optimizer.param_groups[0]
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor(clock)
        defense.begin_step(network, clock)
        iterate(
            defense,
            network,
            clock,
            optimizers,
            lambda c=clock: defense.loss(network, x, y, c, settings),
            lambda _: None,
        )
        theta = noise_parameters(network)[0].detach()
        assert (theta == theta.flatten()[0]).all()
        assert theta[0].item() == pytest.approx(next(schedule), rel=1e-9)
    return theta[0].item()


# --- theta shaped by the loss


@pytest.mark.parametrize("theta_step", ["combined", "sequential", "released"])
def test_noise_that_ascends_goes_as_far_the_other_way(theta_step):
    moved = []
    for ascends in (False, True):
        options = {"theta_step": theta_step, "gamma": 0.0, "noise_ascends": ascends}
        network, start, *_ = run(config(options=options), 1)
        weights = {name: value.detach() - start[name] for name, value in network.named_parameters()}
        moved.append(weights.pop(next(name for name in weights if "theta" in name)))
        assert all(change.abs().max() > 0 for change in weights.values())
    torch.testing.assert_close(moved[1], -moved[0])
    assert moved[0].abs().max() > 1e-4


def test_noise_that_ascends_keeps_the_mean_it_is_held_to_and_ends_elsewhere():
    ends = []
    for ascends in (False, True):
        options = {"noise_ascends": ascends, "noise_target": 0.25, "gamma": 1.0}
        network, *_ = run(config(options=options), 40)
        ends.append(noise_parameters(network)[0].detach())
    assert ends[1].mean().item() == pytest.approx(0.25, abs=0.1)
    low, high = ends[0].argsort()[:3], ends[0].argsort()[3:]
    assert ends[1][low].mean() > ends[1][high].mean()  # most noise where a descending theta has least


@pytest.mark.parametrize("target", [0.15, 0.6])
@pytest.mark.parametrize("theta_step", ["combined", "released"])
def test_a_target_draws_theta_to_itself_along_its_own_schedule(theta_step, target):
    options = {
        "noise_from_loss": False,
        "theta_step": theta_step,
        "noise_target": target,
        "gamma": 0.1,
        "theta_lr": 3.0,
    }
    theta = follow_the_schedule(config(options=options, epochs=4, attack_steps=1))
    assert abs(theta - target) < 0.3 * abs(0.25 - target)


def test_a_target_pulls_every_theta_alike_by_gamma_times_what_the_mean_is_off():
    defense, network, *_ = setting(config(options={"noise_target": 0.4}))
    theta = noise_parameters(network)[0]
    with torch.no_grad():
        theta.copy_(torch.linspace(0.1, 0.6, 6))
    clock = Clock(3, 0, BATCHES)
    value = defense.regulariser_weight(clock) * defense.regulariser(network, clock)
    assert value.item() == pytest.approx(GAMMA / 2 * 6 * (0.35 - 0.4) ** 2)
    (slope,) = torch.autograd.grad(value, theta)
    assert torch.allclose(slope, torch.full((6,), GAMMA * (0.35 - 0.4), dtype=slope.dtype))


def test_theta_has_a_learning_rate_of_its_own():
    network, start, *batch = run(config(options={"theta_lr": 7.0}), 1)
    by_hand = Transcription(start, *batch)
    name = by_hand.theta_name
    g = by_hand.gradients(0)
    slope = g[name] + by_hand.regulariser()
    by_hand.step_weights(g)
    by_hand.v[name] = by_hand.v[name] - 7.0 * LR * (1 + MU) * slope
    by_hand.project()
    check_equal(network, by_hand)


# SCIENCE of the schedule: at 391 iterations an epoch, s = 20; after epochs 30/50/100/150/250/350.
PAPER = {30: 0.419, 50: 0.575, 100: 0.832, 150: 1.026, 250: 1.059, 350: 1.062}


@pytest.mark.parametrize(
    ("options", "expected"), [({}, PAPER), ({"gamma_through_optimizer": False}, {250: 1.338, 350: 1.598})]
)
def test_the_paper_recipe_gives_the_known_schedule(options, expected):
    settings = TrainConfig(defense="learn2perturb_r", recipe="paper", options=options).resolve()
    defense = build_defense("learn2perturb_r", settings.options)
    values = list(itertools.islice(defense.schedule_only(settings, 391), 391 * max(expected)))
    assert values[391 * 20 - 1] == 0.25
    assert {epoch: values[391 * epoch - 1] for epoch in expected} == pytest.approx(expected, abs=1e-3)


# --- Stein's identity


def test_the_gradient_of_theta_is_theta_times_the_curvature():
    """E[dL/dtheta_j] = theta_j E[d2L/dh_j2], eps Gaussian: why learned noise shrinks where the loss is curved."""
    torch.manual_seed(1)
    a = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    h = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    network = nn.Sequential(nn.Identity(), nn.Identity())
    defense = build_defense("learn2perturb", {"sites": "0", "noise_delay": 0})
    network = defense.prepare(network, (3,)).double()
    theta = noise_parameters(network)[0]
    with torch.no_grad():
        theta.copy_(torch.tensor([0.3, 0.5, 0.7]))
    n = 400_000
    # Each row its own theta gradient: L = sum_j cos(a_j h'_j + sum h') has all second derivatives in closed form.
    x = h.expand(n, 3)
    noisy = network(x)
    eps = ((noisy - x) / theta).detach()
    inner = noisy.detach() * a + noisy.detach().sum(1, keepdim=True)
    first = -(a * inner.sin()) - inner.sin().sum(1, keepdim=True)
    cross = torch.ones(3, 3, dtype=torch.float64) + torch.diag(a)  # d inner_k / d h_j
    second = -(inner.cos().unsqueeze(2) * cross.square()).sum(1)
    (noisy * a + noisy.sum(1, keepdim=True)).cos().sum().backward()
    left, right = first * eps, theta.detach() * second
    assert torch.allclose(theta.grad / n, left.mean(0), atol=1e-9)  # autograd gives sum(g * eps)
    error = ((left - right).var(0) / n).sqrt()
    assert ((left.mean(0) - right.mean(0)).abs() < 4.5 * error).all()
    assert (right.mean(0).abs() > 20 * error).all()  # and it is not zero equals zero


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"noise_delay": -1}, "noise_delay must be .* at least 0, got -1"),
        ({"theta_step": "both"}, "allowed: combined, sequential, released"),
        ({"tau": "constant"}, "allowed: harmonic, released"),
        ({"placement": "everywhere"}, "allowed: block_ends, every_convolution"),
        ({"weight_steps": 2}, "set theta_step='sequential'"),
        ({"weight_steps": 0, "theta_step": "sequential"}, "at least 1"),
        ({"init": 0.001}, "0 <= minimum <= init"),
        ({"minimum": 0.0}, "infinite at 0"),
        ({"sharing": "some"}, "sharing is 'some'"),
        ({"granularity": "pixel"}, "granularity is 'pixel'"),
        ({"distribution": "cauchy"}, "unknown distribution 'cauchy'"),
        ({"gama": 1.0}, "did you mean 'gamma'"),
    ],
)
def test_a_wrong_option_names_itself_and_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        build_defense("learn2perturb", options)


def test_every_convolution_is_a_placement():
    from learn2perturb.models import build_model
    from learn2perturb.noise import noise_sites

    network = build_model("digits_cnn", input_shape=(1, 8, 8))
    build_defense("learn2perturb", {"placement": "every_convolution"}).prepare(network, (1, 8, 8))
    assert len(noise_sites(network)) == sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 5


@pytest.mark.parametrize(("init", "minimum", "first"), [
    ("relative", 0.01, 0.25), ("relative", 0.5, 0.5), (0.125, 0.01, 0.125), (0.75, 0.5, 0.75),
])  # fmt: skip
def test_theta_until_the_features_are_measured(init, minimum, first):
    defense = build_defense("learn2perturb", {"init": init, "minimum": minimum, "sites": "site"})
    (noise,) = noise_modules(defense.prepare(Tiny(), (1, 2, 2)))
    assert noise.theta.unique().tolist() == [first]
    assert defense.measures == (init == "relative")
