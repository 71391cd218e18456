"""RSE: where its noise is, how large, and a training step against an independent transcription."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.models import build_model
from learn2perturb.noise import fixed_noise, noise_modules, noise_parameters
from learn2perturb.training.alternating import iterate
from learn2perturb.training.config import TrainConfig

LR, MU, DECAY = 0.1, 0.9, 5e-4


class Residual(nn.Module):
    """A stem and a block with a shortcut convolution; registered in another order than they are called."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(4, 6, 1, bias=False)
        self.branch = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.fc(torch.tanh(self.branch(h) + self.shortcut(h)).mean((2, 3)))


def prepared(network=None, shape=(2, 5, 5), **options):
    return build_defense("rse", options).prepare(network or Residual(), shape)


def test_noise_goes_before_every_convolution_and_sigma_init_before_the_first_called():
    network = prepared()
    found = {module.site: (module.place, module.init, module.learned) for module in noise_modules(network)}
    assert found == {
        "stem": ("input", 0.2, False), "branch": ("input", 0.1, False), "shortcut": ("input", 0.1, False),
    }  # fmt: skip
    assert noise_parameters(network) == []
    assert len(noise_modules(prepared(build_model("resnet18"), (3, 32, 32)))) == 20  # 17 and three shortcuts


def test_draws_are_gaussian_of_the_stated_size_for_each_element_of_each_example():
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(16, 2))
    nn.init.ones_(network[0].weight)
    prepared(network, (1, 4, 4), sigma_init=0.3)
    x = torch.rand(4000, 1, 4, 4)
    eps = (network[0](x) - x).detach().flatten(1) / 0.3
    assert eps.mean().abs() < 4.5 / 64_000**0.5
    assert (eps.std() - 1).abs() < 4.5 / (2 * 64_000) ** 0.5
    assert (eps.pow(4).mean() - 3).abs() < 4.5 * (96 / 64_000) ** 0.5
    off = torch.corrcoef(torch.cat([eps[:2000], eps[2000:]], dim=1).T) - torch.eye(32)
    assert off.abs().max() < 6 / 2000**0.5  # neither elements nor examples share a draw
    network.eval()
    assert not torch.equal(network[0](x), network[0](x))  # in inference too


def test_shortcut_and_branch_have_draws_of_their_own():
    network = prepared(sigma_init=0.0)
    seen = {}
    for name in ("branch", "shortcut"):

        def keep(_module, args, _output, name=name):
            seen[name] = args[0].detach()

        network.get_submodule(name).register_forward_hook(keep)
    network(torch.rand(8, 2, 5, 5))
    assert (seen["branch"] - seen["shortcut"]).std().item() == pytest.approx(0.1 * 2**0.5, rel=0.1)


@pytest.mark.parametrize("adversarial", [False, True])
def test_three_steps_equal_a_transcription(adversarial):
    """SGD with momentum and weight decay on the noisy cross-entropy; with an adversary, half and half with PGD."""
    settings = TrainConfig(
        defense="rse", recipe="paper", epochs=1, schedule="constant", lr=LR, momentum=MU, weight_decay=DECAY, eps=0.1,
        attack_steps=2, attack_step_size=0.04, attack_labels="true", options={"adversarial": adversarial},
    ).resolve()  # fmt: skip
    defense = build_defense("rse", settings.options)
    torch.manual_seed(0)
    network = defense.prepare(Residual(), (2, 5, 5)).double().train()
    (stage,) = defense.stages(settings)
    optimizers = stage.optimizers(network)
    assert set(optimizers) == {"weights"}
    x, y = torch.rand(6, 2, 5, 5, dtype=torch.float64), torch.arange(6) % 3
    w = {name: value.detach().clone() for name, value in network.named_parameters() if "theta" not in name}
    momenta = {name: torch.zeros_like(value) for name, value in w.items()}
    with fixed_noise(network, 5):
        shapes = {"stem": x, "branch": torch.zeros(6, 4, 5, 5), "shortcut": torch.zeros(6, 4, 5, 5)}
        eps = {name: network.get_submodule(name).perturbation.draw(h).double() for name, h in shapes.items()}
        for batch in range(3):
            clock = Clock(0, batch, 3)
            torch.manual_seed(batch)
            iterate(
                defense, network, clock, optimizers,
                lambda clock=clock: defense.loss(network, x, y, clock, settings), lambda losses: None,
            )  # fmt: skip

    def logits(values, images):
        h = torch.tanh(F.conv2d(images + 0.2 * eps["stem"], values["stem.weight"], padding=1))
        branch = F.conv2d(h + 0.1 * eps["branch"], values["branch.weight"], padding=1)
        short = F.conv2d(h + 0.1 * eps["shortcut"], values["shortcut.weight"])
        return torch.tanh(branch + short).mean((2, 3)) @ values["fc.weight"].T + values["fc.bias"]

    for batch in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
        loss = F.cross_entropy(logits(leaves, x), y)
        if adversarial:
            torch.manual_seed(batch)
            x_adv = (x + (2 * torch.rand_like(x) - 1) * 0.1).clamp(0, 1)
            for _ in range(2):
                x_adv.requires_grad_()
                (g,) = torch.autograd.grad(F.cross_entropy(logits(w, x_adv), y, reduction="sum"), x_adv)
                moved = x_adv.detach() + 0.04 * g.sign()
                x_adv = torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1)
            loss = 0.5 * loss + 0.5 * F.cross_entropy(logits(leaves, x_adv), y)
        slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name in w:
            momenta[name] = MU * momenta[name] + slopes[name] + DECAY * w[name]  # no Nesterov
            w[name] = w[name] - LR * momenta[name]
    for name, value in w.items():
        assert (network.get_parameter(name) - value).abs().max() < 1e-6, name
    assert all(float(module.theta) == pytest.approx(module.init) for module in noise_modules(network))


def test_the_papers_recipe_has_four_stages_with_fresh_momenta_and_no_normalisation():
    settings = TrainConfig(defense="rse", recipe="paper").resolve()
    stages = build_defense("rse", settings.options).stages(settings)
    assert [stage.epochs for stage in stages] == [80, 60, 40, 20]
    assert [stage.factor(Clock(0, 0, 1)) for stage in stages] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert (settings.lr, settings.momentum, settings.nesterov, settings.weight_decay) == (0.1, 0.9, False, 5e-4)
    network = prepared()
    assert stages[0].optimizers(network)["weights"] is not stages[1].optimizers(network)["weights"]
    for recipe in ("paper", "released", "common", "fast"):
        assert TrainConfig(defense="rse_at", recipe=recipe).resolve().model_options == {"normalization": None}
    kept = TrainConfig(defense="rse", recipe="common", model_options={"normalization": "cifar10"}).resolve()
    assert kept.model_options == {"normalization": "cifar10"}  # what is set by hand stays
    assert len(build_defense("rse").stages(kept)) == 1


def test_the_paper_predicts_with_the_mean_softmax_of_50_draws():
    defense = build_defense("rse")
    assert (defense.predictor, defense.members, defense.adversarial) == ("mean_probability", 50, False)
    assert build_defense("rse_at").adversarial


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_init": -0.1}, "sigma_init is -0.1"),
        ({"sigma_inner": float("nan")}, "sigma_inner is nan"),
        ({"adversarial": "yes"}, "True or False, got 'yes'"),
        ({"restarts": 1}, "restarts must be True or False, got 1"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_defense("rse", options)


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(SiteError, match="no convolution"):
        prepared(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
