"""BatchNorm folded into the convolution before it: the same function, and nothing folded that must not be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.hooks import RemovableHandle

from learn2perturb.engine import execution, folding
from learn2perturb.engine.folding import folded, input_only, rectified
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


@pytest.fixture
def joined(monkeypatch):
    """Return the list that the weights of every convolution which rectifies by itself are put on."""
    weights = []
    real = folding._Rectified.apply
    monkeypatch.setattr(folding._Rectified, "apply", lambda *given: weights.append(given[2]) or real(*given))
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["digits_cnn", "resnet20", "resnet18", "resnext29_2x64d"])
def test_folded_convolutions_rectify_by_themselves(name, dtype, joined):
    torch.manual_seed(0)
    network = lived_in(build_model(name)).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    layers = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    shortcuts = sum(isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) for module in network.modules())
    low = dtype == torch.bfloat16

    def answer() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            logits = network(x)
        return logits, torch.autograd.grad(logits.float().logsumexp(dim=1).sum(), x)[0]

    logits, gradient = answer()
    assert not joined
    with folded(network, x.detach()):
        found, slope = answer()
        count = len(joined)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            torch.testing.assert_close(network(x), found, rtol=0, atol=0)
    assert len(joined) == 2 * count and layers - shortcuts <= count <= layers
    assert found.dtype == logits.dtype and slope.dtype == gradient.dtype
    torch.testing.assert_close(found, logits, rtol=0, atol=(0.02 if low else 1e-5) * float(logits.detach().abs().max()))
    # In bfloat16 either is 0.2 of its length from that of float64; in float32 a sign of a feature may differ.
    assert (slope - gradient).norm() <= (0.4 if low else 2e-3) * gradient.norm()


class Rectified(nn.Module):
    """``relu(norm(conv(x)) + x)``, as the package's networks say it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return rectified(self.conv, self.norm, x, lambda: x)


def hooked(network: Rectified) -> list[Callable[[], RemovableHandle]]:
    return [
        lambda: network.norm.register_full_backward_hook(lambda module, of_input, of_output: (of_input[0] * 2,)),
        lambda: network.conv.register_full_backward_pre_hook(lambda module, of_output: (of_output[0] * 3,)),
        lambda: network.norm.register_forward_hook(lambda module, args, output: output + 1),
        lambda: network.conv.register_forward_pre_hook(input_only(lambda module, args: (args[0] * 2,))),
        lambda: register_module_forward_hook(
            lambda module, args, output: output * 2 if module is network.norm else None
        ),
    ]


@pytest.mark.parametrize("number", range(5))
def test_hooks_look_between_the_convolution_and_the_activation(number, joined):
    torch.manual_seed(0)
    network, x = lived_in(Rectified()), torch.randn(2, 3, 8, 8, requires_grad=True)
    given = x.detach().clone()

    def answer() -> tuple[Tensor, Tensor]:
        out = network(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    handle = hooked(network)[number]()
    try:
        wanted = answer()
        with folded(network, given):
            torch.testing.assert_close(answer(), wanted)
    finally:
        handle.remove()
    assert not joined
    with folded(network, given):
        bare = answer()
    assert len(joined) == 1 and not torch.allclose(bare[1], wanted[1])
    torch.testing.assert_close(bare, answer())
    assert torch.equal(x, given)  # what is added stays as it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_have_moved_are_those_of_the_next_folded_passes(dtype, joined):
    torch.manual_seed(0)
    network, x = lived_in(Rectified()), torch.randn(2, 3, 8, 8)

    def folded_answer() -> Tensor:
        with folded(network, x), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            return network(x).float()

    before = folded_answer()
    with torch.no_grad():
        network.conv.weight.add_(0.1)
        network.norm.running_mean.add_(1.0)
        wanted = network(x)
    found = folded_answer()
    assert len(joined) == 2
    assert (before - wanted).norm() > 0.1 * wanted.norm() > 10 * (found - wanted).norm()


def test_a_gradient_of_a_gradient_passes_through_both_ways():
    torch.manual_seed(0)
    network, x = lived_in(Rectified()), torch.randn(2, 3, 8, 8, requires_grad=True)

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    with folded(network, x.detach()):
        found = penalty()
    torch.testing.assert_close(found, penalty())


def test_a_norm_that_is_not_folded_normalises(joined):
    torch.manual_seed(0)
    network, x = lived_in(Rectified()), torch.randn(2, 3, 8, 8)
    network.norm.train()
    with torch.no_grad():
        wanted = copy.deepcopy(network)(x)
        with folded(network, x) as pairs:
            assert pairs == 0
            torch.testing.assert_close(network(x), wanted)
    assert not joined
