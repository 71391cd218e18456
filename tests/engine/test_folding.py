"""BatchNorm folded into the convolution before it: the same function, and nothing folded that must not be."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from learn2perturb.engine import execution
from learn2perturb.engine.folding import folded
from learn2perturb.models import build_model
from learn2perturb.noise import fixed_noise, perturb


def lived_in(network: nn.Module) -> nn.Module:
    """Give every norm statistics and weights as after a training, and go to eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


class Block(nn.Module):
    """A convolution and a norm; the convolution's output goes to a second place when ``twice``."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.norm(h) + h if self.twice else self.norm(h)


@pytest.mark.parametrize(("name", "pairs"), [("digits_cnn", 5), ("resnet20", 19), ("resnet18", 20)])
def test_a_folded_network_is_the_same_function_with_its_noise(name, pairs):
    torch.manual_seed(0)
    network = lived_in(perturb(build_model(name)))
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with fixed_noise(network, seed=0):
        plain = network(x)
        wanted = torch.autograd.grad(plain.sum(), x)[0]
        with folded(network, x.detach()) as count:
            merged = network(x)
        gradient = torch.autograd.grad(merged.sum(), x)[0]
        again = network(x)
    assert count == pairs
    assert not torch.equal(merged, plain)  # it did run otherwise
    torch.testing.assert_close(merged, plain, rtol=1e-3, atol=1e-3)
    assert (gradient - wanted).norm() <= 1e-3 * wanted.norm()
    assert torch.equal(again, plain)  # and nothing is left of it
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_what_comes_between_is_not_folded_over():
    x = torch.rand(2, 3, 8, 8)

    def count(network: nn.Module) -> int:
        with folded(network, x) as pairs:
            return pairs

    assert count(lived_in(Block())) == 1
    assert count(lived_in(Block(twice=True))) == 0
    assert count(lived_in(Block()).train()) == 0
    assert count(lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))) == 0
    assert count(perturb(lived_in(Block()), input_shape=(3, 8, 8), sites=["conv"])) == 0  # noise before the norm
    assert count(perturb(lived_in(Block()), input_shape=(3, 8, 8), sites=["norm"])) == 1  # noise after it
    assert count(perturb(lived_in(Block()), input_shape=(3, 8, 8), sites=["norm"], place="input")) == 0
    shared = Block()
    assert count(lived_in(nn.Sequential(shared.conv, shared.norm, nn.Conv2d(4, 3, 1), shared.conv, shared.norm))) == 0


class Activated(nn.BatchNorm2d):
    """A norm that does more than a norm, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Standardised(nn.Conv2d):
    """A convolution that computes its weight first, as timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "layers", [lambda: (nn.Conv2d(3, 4, 3), Activated(4)), lambda: (Standardised(3, 4, 3), nn.BatchNorm2d(4))]
)
def test_a_layer_that_does_more_than_its_class_is_left_alone(layers):
    network, x = lived_in(nn.Sequential(*layers())), torch.rand(2, 3, 8, 8)
    wanted = network(x)
    with folded(network, x) as count:
        assert torch.equal(network(x), wanted)
    assert count == 0


def halve(module: nn.Module, inputs: object) -> None:
    """A pre-hook of a whole network that sets the weight of a layer below."""
    with torch.no_grad():
        module[0].weight.copy_(module.kept / 2)


def with_hook_above(convolution: nn.Conv2d) -> nn.Module:
    network = nn.Sequential(convolution, nn.BatchNorm2d(4))
    network.kept = nn.Parameter(convolution.weight.detach().clone())
    network.register_forward_pre_hook(halve)
    return network


@pytest.mark.parametrize(
    "build",
    [
        lambda layer: nn.Sequential(weight_norm(layer), nn.BatchNorm2d(4)),
        lambda layer: nn.Sequential(prune.random_unstructured(layer, "weight", 0.3), nn.BatchNorm2d(4)),
        lambda layer: nn.Sequential(nn.utils.spectral_norm(layer), nn.BatchNorm2d(4)),
        lambda layer: nn.Sequential(parametrizations.weight_norm(layer), nn.BatchNorm2d(4)),
        lambda layer: nn.Sequential(parametrizations.spectral_norm(layer), nn.BatchNorm2d(4)),
        lambda layer: nn.Sequential(parametrizations.orthogonal(layer), nn.BatchNorm2d(4)),
        with_hook_above,
    ],
)
def test_a_weight_that_is_computed_is_folded_as_it_is_now(build):
    torch.manual_seed(0)
    network, x = lived_in(build(nn.Conv2d(3, 4, 3))), torch.rand(2, 3, 8, 8)
    with folded(network, x):
        network(x)
    with torch.no_grad():  # an update of what it is computed from, before any other pass
        for parameter in network.parameters():
            parameter.mul_(1.5).add_(0.1)
    with folded(network, x) as count:
        folds = network(x)
    assert count == 1
    torch.testing.assert_close(folds, network(x), rtol=1e-4, atol=1e-4)


def weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still what many networks have
        return nn.utils.weight_norm(layer)


class Drawn(nn.Module):
    """A weight that is another one whenever it is looked at; counts the looks."""

    def __init__(self):
        super().__init__()
        self.looks = 0

    def forward(self, weight):
        self.looks += 1
        return weight + self.looks


@pytest.mark.parametrize("layer", ["conv", "norm"])
def test_weights_that_are_drawn_are_drawn_once_in_every_folded_pass(layer):
    network, x = lived_in(Block()), torch.rand(2, 3, 8, 8)
    drawn = Drawn()
    parametrize.register_parametrization(getattr(network, layer), "weight", drawn)
    drawn.looks = 0
    wanted = [network(x) for _ in range(3)]
    assert drawn.looks == 3
    network(x)  # the trace looks, too
    drawn.looks = 0
    with folded(network, x) as pairs:
        drawn.looks = 0
        found = [network(x) for _ in range(3)]
    assert pairs == 1
    assert drawn.looks == 3
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_noise_that_is_added_later_is_seen_though_the_trace_is_remembered():
    network, x = lived_in(Block()), torch.rand(2, 3, 8, 8)
    with folded(network, x) as before:
        pass
    perturb(network, input_shape=(3, 8, 8), sites=["conv"])
    with folded(network, x) as after:
        pass
    assert (before, after) == (1, 0)


def other_norm(network: nn.Module) -> None:
    network.layer1[0].bn1 = lived_in(nn.BatchNorm2d(16))
    network.layer1[0].bn1.weight.data.mul_(3)


def other_convolution(network: nn.Module) -> None:
    network.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1)


def no_norm(network: nn.Module) -> None:
    network.layer1[0].bn1 = nn.Identity()


def something_between(network: nn.Module) -> None:
    network.layer1[0].conv1 = nn.Sequential(network.layer1[0].conv1, nn.Tanh())


def other_dilation(network: nn.Module) -> None:
    network.layer1[0].conv1.dilation, network.layer1[0].conv1.padding = (2, 2), (2, 2)


def hook_on_a_container(network: nn.Module) -> None:
    block = network.layer1[0]
    block.conv1 = nn.Sequential(block.conv1)
    with torch.no_grad(), folded(network, torch.rand(2, 3, 32, 32)):
        pass  # a trace without the hook
    block.conv1.register_forward_hook(lambda module, args, output: output + 1)


@pytest.mark.parametrize(
    "change", [hook_on_a_container, other_norm, other_convolution, no_norm, something_between, other_dilation]
)
def test_a_network_that_was_changed_is_folded_as_it_is_now(change):
    torch.manual_seed(0)
    network, x = lived_in(build_model("resnet20")), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        with folded(network, x):
            before = network(x)
        change(network)
        wanted = network(x)
        with folded(network, x):
            found = network(x)
    assert (before - wanted).norm() > 0.01 * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_the_layers_as_they_were():
    network, x = lived_in(Block()), torch.rand(2, 3, 8, 8)
    wanted = network(x)
    with pytest.raises(ZeroDivisionError), folded(network, x):
        raise ZeroDivisionError
    assert torch.equal(network(x), wanted)


def test_only_attacks_in_eval_mode_in_a_mode_that_folds_are_folded():
    network, x = lived_in(Block()), torch.rand(2, 3, 8, 8)
    for mode, in_eval, wanted in ((execution.FAST, True, 1), (execution.FAST, False, 0), (execution.PLAIN, True, 0)):
        with execution.running(mode), execution.attacking(network, x, in_eval) as count:
            assert count == wanted
