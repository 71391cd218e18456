"""TRADES and adversarial weight perturbation against independent transcriptions of one full training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import Clock, build_defense, trades_loss
from learn2perturb.defenses.awp import against_weights
from learn2perturb.defenses.objectives import TradesAdversary, kl_divergence
from learn2perturb.errors import ConfigError
from learn2perturb.noise import fixed_noise, noise_parameters, perturb
from learn2perturb.training import TrainConfig, train
from learn2perturb.training.alternating import iterate

LR, MU, DECAY, EPS, STEP, STEPS, BETA, GAMMA = 0.1, 0.9, 0.01, 0.1, 0.03, 4, 6.0, 0.05


class Tiny(nn.Module):
    """A convolution, a BatchNorm and a linear layer: running statistics, and parameters of one and more dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.norm(self.conv(x))).flatten(1))


def settings(**changes):
    values = {
        "recipe": "fast", "lr": LR, "momentum": MU, "nesterov": True, "weight_decay": DECAY, "epochs": 2, "eps": EPS,
        "schedule": "constant", "attack_step_size": STEP, "attack_steps": STEPS, "trades_beta": BETA,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes}).resolve()


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.7 + 0.15, torch.arange(8) % 3


def network():
    torch.manual_seed(0)
    return Tiny().double().train()


def real_steps(config, steps=3, model=None):
    """Make steps with the package; return the network and its optimisers."""
    defense = build_defense(config.defense, config.options)
    defense.check(config)
    model = defense.prepare(model or network(), (1, 4, 4))
    optimizers = defense.stages(config)[0].optimizers(model)
    x, y = batch()
    for number in range(steps):
        clock = Clock(0, number, steps)
        defense.begin_step(model, clock)
        torch.manual_seed(number)
        iterate(
            defense, model, clock, optimizers, lambda c=clock: defense.loss(model, x, y, c, config), lambda losses: None
        )
    return model


# --- by hand: no attack, no loss and no step of the package


class ByHand:
    """SGD with Nesterov momentum as in torch, on ``objective(values) -> loss``, from the values of a fresh network."""

    def __init__(self, model):
        self.v = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.statistics = {"mean": torch.zeros(4, dtype=torch.float64), "var": torch.ones(4, dtype=torch.float64)}
        self.momenta = {}
        self.x, self.y = batch()

    def logits(self, v, x, *, evaluating=False, moves=True):
        h = F.conv2d(x, v["conv.weight"])
        if evaluating:
            mean, var = self.statistics["mean"], self.statistics["var"]
        else:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
            if moves:
                unbiased = h.var((0, 2, 3), correction=1)
                for key, new in (("mean", mean), ("var", unbiased)):
                    self.statistics[key] = 0.9 * self.statistics[key] + 0.1 * new.detach()
        h = (h - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        h = h * v["norm.weight"].view(1, -1, 1, 1) + v["norm.bias"].view(1, -1, 1, 1)
        return torch.tanh(h).flatten(1) @ v["fc.weight"].T + v["fc.bias"]

    def gradients(self, values, loss):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    def worst_weights(self, loss, gamma=GAMMA):
        """Return w + gamma |w| / |g| g for tensors of two dimensions and more."""
        g = self.gradients(self.v, loss)
        return {
            name: w + gamma * w.norm() / g[name].norm() * g[name] if w.ndim > 1 else w for name, w in self.v.items()
        }

    def step(self, slopes):
        for name, slope in slopes.items():
            g = slope + DECAY * self.v[name]
            b = self.momenta[name] = g if name not in self.momenta else MU * self.momenta[name] + g
            self.v[name] = self.v[name] - LR * (g + MU * b)

    def project(self, x_adv):
        return torch.minimum(torch.maximum(x_adv, self.x - EPS), self.x + EPS).clamp(0, 1)

    def trades_example(self):
        p = self.logits(self.v, self.x, evaluating=True).softmax(1)
        x_adv = self.x + 0.001 * torch.randn_like(self.x)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            q = self.logits(self.v, x_adv, evaluating=True).log_softmax(1)
            divergence = (p * (p.log() - q)).sum()
            (g,) = torch.autograd.grad(divergence, x_adv)
            x_adv = self.project(x_adv.detach() + STEP * g.sign())
        return x_adv

    def trades(self, v, x_adv, **how):
        z, z_adv = self.logits(v, self.x, **how), self.logits(v, x_adv, **how)
        p = z.softmax(1)
        kl = (p * (z.log_softmax(1) - z_adv.log_softmax(1))).sum(1).mean()
        return F.cross_entropy(z, self.y) + BETA * kl

    def pgd_example(self):
        x_adv = (self.x + torch.empty_like(self.x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.logits(self.v, x_adv, evaluating=True), self.y)
            (g,) = torch.autograd.grad(loss, x_adv)
            x_adv = self.project(x_adv.detach() + STEP * g.sign())
        return x_adv


def check_equal(model, by_hand, tolerance=2e-6):  # logits are float32 in every execution mode
    for name, value in model.named_parameters():
        assert (value - by_hand.v[name]).abs().max() < tolerance, name
    assert (model.norm.running_mean - by_hand.statistics["mean"]).abs().max() < tolerance
    assert (model.norm.running_var - by_hand.statistics["var"]).abs().max() < tolerance


def test_three_steps_of_trades_equal_the_paper_by_hand():
    model = real_steps(settings(defense="trades"))
    by_hand = ByHand(network())
    for number in range(3):
        torch.manual_seed(number)
        x_adv = by_hand.trades_example()
        by_hand.step(by_hand.gradients(by_hand.v, lambda v, x_adv=x_adv: by_hand.trades(v, x_adv)))
    check_equal(model, by_hand)


def test_three_steps_with_weight_perturbation_equal_the_paper_by_hand():
    model = real_steps(settings(defense="pgd_at", awp=GAMMA))
    by_hand = ByHand(network())
    for number in range(3):
        torch.manual_seed(number)
        by_hand.logits(by_hand.v, by_hand.x)  # the clean pass before the attack, which only moves the statistics
        x_adv = by_hand.pgd_example()

        def cross_entropy(v, x, **how):
            return F.cross_entropy(by_hand.logits(v, x, **how), by_hand.y)

        worst = by_hand.worst_weights(lambda v, x=x_adv: cross_entropy(v, x, moves=False))
        mixed = by_hand.gradients(worst, lambda v, x=x_adv: 0.5 * (cross_entropy(v, by_hand.x) + cross_entropy(v, x)))
        by_hand.step(mixed)
    check_equal(model, by_hand)


def test_three_steps_of_trades_with_weight_perturbation_equal_the_paper_by_hand():
    model = real_steps(settings(defense="trades", awp=GAMMA))
    by_hand = ByHand(network())
    for number in range(3):
        torch.manual_seed(number)
        x_adv = by_hand.trades_example()
        worst = by_hand.worst_weights(lambda v, x=x_adv: by_hand.trades(v, x, moves=False))
        by_hand.step(by_hand.gradients(worst, lambda v, x=x_adv: by_hand.trades(v, x)))
    check_equal(model, by_hand, 1e-5)


# --- TRADES


def test_the_adversary_of_trades_stays_in_the_ball_and_raises_the_divergence_not_the_error():
    x, y = batch()
    x = x.float()
    model = network().float().eval()
    attack = TradesAdversary(eps=EPS, step_size=STEP, steps=STEPS)
    divergence = lambda z: F.kl_div(model(z).log_softmax(1), model(x).softmax(1), reduction="batchmean").item()  # noqa: E731
    torch.manual_seed(1)
    result = attack.run(model, x, y)
    assert result.linf.max() <= EPS + 1e-6
    assert (result.forward_passes, result.backward_passes) == (STEPS + 1, STEPS)
    assert divergence(result.x_adv) > 3 * divergence((x + EPS * torch.randn_like(x).sign()).clamp(0, 1))
    torch.manual_seed(1)
    assert torch.equal(attack.craft(model, x, y.flip(0)), result.x_adv)  # labels play no part


def test_before_the_adversarial_delay_trades_is_the_clean_loss():
    config = settings(defense="trades", adversarial_delay=1)
    x, y = batch()
    model = network()
    early = trades_loss(model, x, y, Clock(0, 0, 1), config)
    assert early.adversarial is None
    assert early.total.item() == pytest.approx(F.cross_entropy(network()(x), y).item(), abs=1e-6)
    assert trades_loss(model, x, y, Clock(1, 0, 1), config).adversarial is not None


# --- weight perturbation


def test_weights_are_moved_by_gamma_times_their_norm_along_the_gradient_and_are_bit_for_bit_what_they_were():
    model = perturb(network(), input_shape=(1, 4, 4), sites="norm")
    x, y = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identity = {name: id(value) for name, value in model.named_parameters()}
    seen = {}

    def look(module, args):
        seen.update({name: value.detach().clone() for name, value in module.named_parameters()})

    with fixed_noise(model, 1):
        there = against_weights(model, GAMMA, lambda f: F.cross_entropy(f(x), y))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # statistics too
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        handle = model.register_forward_pre_hook(look)
        F.cross_entropy(there(x), y).backward()
        handle.remove()
    for (name, value), slope in zip(model.named_parameters(), g, strict=True):
        moved = seen[name] - before[name]
        if name in ("conv.weight", "fc.weight"):
            assert torch.allclose(moved, GAMMA * value.norm() / slope.norm() * slope, atol=1e-12), name
        else:  # theta, though it has three dimensions, norms and biases stay
            assert not moved.any(), name
        assert torch.equal(value, before[name])
        assert id(value) == identity[name]
        assert value.grad is not None


def test_an_error_in_the_perturbed_pass_leaves_every_weight_as_it_was():
    model = network()
    x, y = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    there = against_weights(model, GAMMA, lambda f: F.cross_entropy(f(x), y))

    def fail(*arguments):
        raise RuntimeError("out of memory")

    handle = model.fc.register_forward_pre_hook(fail)
    model.norm.eval()
    for call in (there, lambda z: against_weights(model, GAMMA, lambda f: f(z).sum())):
        with pytest.raises(RuntimeError, match="out of memory"):
            call(x)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(isinstance(value, nn.Parameter) for value in (model.conv.weight, model.fc.weight))


# --- combinations


COMBINED = [
    {"objective": "trades"},
    {"awp": 0.01, "weight_average": 0.99},
    {"objective": "trades", "awp": 0.005, "weight_average": 0.9, "attack_eot": 2},
    {"awp": 0.01, "options": {"theta_step": "sequential", "noise_steps": 2}},
    {"objective": "trades", "options": {"theta_lr": 10.0, "noise_target": 0.3, "gamma": 0.01}},
    {"alpha": 0.0, "beta": 1.0, "awp": 0.01, "attack_labels": "predicted"},
    *({"options": {"distribution": name}} for name in ("laplace", "uniform")),
    *({"options": {"granularity": name}} for name in ("channel", "layer")),
    {"options": {"sharing": "per_batch", "placement": "every_convolution"}},
]


@pytest.mark.parametrize("changes", COMBINED, ids=str)
def test_every_combination_with_learned_noise_trains(changes):
    config = TrainConfig(
        **{
            "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 1, "limit": 96, "batch_size": 32,
            "attack_steps": 2, "monitor": 20, "engine": "plain", "device": "cpu", "tensorboard": False, **changes,
        }
    )  # fmt: skip
    run = train(config, progress=False)
    (line,) = run.metrics
    assert line["adversarial_loss"] > 0
    assert all((theta != 0.25).any() for theta in noise_parameters(run.model))
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_eot_in_training_averages_so_many_draws_in_each_gradient():
    """Counted in eval mode, where only the attack makes passes."""
    x, y = batch()
    for objective, extra in (("mixed", 0), ("trades", 3)):  # TRADES first draws p(x), as often
        config = settings(defense="learn2perturb", options={"sites": "norm"}, objective=objective, attack_eot=3)
        defense = build_defense("learn2perturb", config.options)
        model = defense.prepare(network(), (1, 4, 4))
        passes = []
        model.register_forward_hook(lambda module, args, output, seen=passes: seen.append(module.training))
        defense.loss(model, x, y, Clock(0, 0, 1), config)
        assert passes.count(False) == 3 * STEPS + extra
        assert passes.count(True) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defense": "trades", "objective": "mixed"}, "objective is 'mixed', but Trades trains on 'trades'"),
        ({"defense": "none", "objective": "trades"}, "NoDefense trains on a loss of its own"),
        ({"defense": "madry", "objective": "trades"}, "Madry trains on 'mixed'"),
        ({"defense": "madry", "alpha": 0.5}, "Madry's training has no clean loss; set alpha 0"),
        ({"defense": "none", "awp": 0.01}, "awp is 0.01, but NoDefense has a loss of its own"),
        ({"defense": "pgd_at", "awp": 0.01, "beta": 0.0}, "beta is 0: there is no adversarial loss"),
        ({"defense": "trades", "trades_beta": 0.0}, "trades_beta is 0"),
        ({"objective": "both"}, "allowed: mixed, trades"),
        ({"awp": -0.1}, "awp is -0.1"),
        ({"weight_average": 1.0}, "weight_average is 1"),
        ({"weight_average": 1.5}, "weight_average is 1.5"),
        ({"options": {"noise_target": 0.005}}, "projected to at least minimum, 0.01"),
        ({"options": {"noise_target": 0.3, "gamma": 0.0}}, "nothing holds theta to it"),
        ({"options": {"noise_target": 0.3, "tau": "released"}}, "leave tau out"),
        ({"options": {"theta_lr": -1.0}}, "theta_lr is -1.0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_any_work(changes, message, tmp_path):
    values = {"model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(**{**values, **changes}), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_loss_of_ones_own_takes_neither_trades_nor_weight_perturbation():
    from learn2perturb.defenses import Defense, mixed_loss

    class Own(Defense):
        def loss(self, model, x, y, clock, settings):
            return mixed_loss(model, x, y, clock, settings)

    Own().check(settings(defense="pgd_at"))
    for change in ({"objective": "trades"}, {"awp": 0.01}):
        with pytest.raises(ConfigError, match="Own"):
            Own().check(settings(defense="pgd_at", **change).closed())


# --- probabilities that underflow


def exact_divergence(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    log_p, log_q = r.double().log_softmax(1), z.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def test_the_divergence_and_its_gradients_are_finite_where_probabilities_underflow():
    z = torch.tensor([[0.0, 300.0, -300.0], [1e4, 0.0, -1e4], [1.0, 2.0, 3.0]], requires_grad=True)
    r = torch.tensor([[500.0, 0.0, -500.0], [1e4, 0.0, -1e4], [3.0, 2.0, 1.0]], requires_grad=True)
    value = kl_divergence(z, r)
    torch.testing.assert_close(value.detach().double(), exact_divergence(z, r).detach(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(value.sum(), (z, r))
    wanted = torch.autograd.grad(exact_divergence(z, r).sum(), (z, r))
    for mine, right in zip(found, wanted, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoil", ["scale", "mask"])
def test_trades_trains_on_where_probabilities_underflow(spoil):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 4)

    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            z = self.linear(x.flatten(1))
            return 1e3 * z if spoil == "scale" else z.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    losses = trades_loss(Sure(), x, y, Clock(0, 0, 1), settings(defense="trades"))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert torch.isfinite(linear.weight.grad).all()
    assert linear.weight.grad.abs().max() > 0
