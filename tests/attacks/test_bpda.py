"""BPDA: the values are the model's own, the gradient that of the stand-in, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from learn2perturb.attacks import APGD, BPDA, CW, FGSM, PGD, Square, bpda
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError, InputError
from tests.problems import Linear, NoisyLinear

SHAPE = (3, 4, 4)
EPS = 0.15


class Rounding(nn.Module):
    """Sixteen levels; its gradient is zero."""

    def forward(self, x):
        return (x * 15).round() / 15


class Thermometer(nn.Module):
    """One channel for each level that the pixel has reached: another shape."""

    def forward(self, x):
        levels = torch.arange(1, 9, device=x.device).view(1, -1, 1, 1) / 9
        return (x >= levels).to(x.dtype)


class BlockTransform(nn.Module):
    """JPEG-like: a cosine transform of blocks of 4 x 4, its coefficients rounded."""

    def __init__(self):
        super().__init__()
        k = torch.arange(4.0)
        basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 4) * (2 / 4) ** 0.5
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)

    def forward(self, x):
        n, channels, height, width = x.shape
        blocks = x.view(n, channels, height // 4, 4, width // 4, 4).permute(0, 1, 2, 4, 3, 5)
        coefficients = (self.basis @ blocks @ self.basis.T * 6).round() / 6
        blocks = self.basis.T @ coefficients @ self.basis
        return blocks.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


class Detached(nn.Module):
    """By way of numpy, and in place."""

    def forward(self, x):
        rounded = torch.from_numpy(x.detach().numpy().round(1))
        x.mul_(0)
        return rounded


def state_of(model):
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    return hooks, [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("transform", [Rounding, BlockTransform, Detached])
def test_a_shattered_gradient_that_stops_pgd_does_not_stop_bpda(transform, trained):
    network, x, y = trained
    model = nn.Sequential()
    model.add_module("transform", transform())
    model.add_module("network", network)
    attack = PGD(EPS, steps=20, random_start=False, seed=0)
    clean = (model(x.clone()).argmax(dim=1) == y).double().mean().item()
    before = state_of(model)
    if transform is Detached:
        with pytest.raises(InputError, match="no gradient"):
            attack(model, x, y)
    else:
        assert attack.run(model, x, y).zero_gradients == len(x)
        assert 1 - attack.run(model, x, y).success_rate > clean - 0.05
    result = BPDA(attack=attack, modules="transform", seed=0).run(model, x, y)
    own = 1 - attack.run(network, x, y).success_rate
    assert 1 - result.success_rate < own + 0.1 < clean - 0.2
    assert result.zero_gradients == 0
    assert (result.forward_passes, result.backward_passes) == (20, 20)
    assert state_of(model) == before
    with bpda(model, [model[0]]):
        assert torch.equal(attack(model, x, y), result.x_adv)
    assert state_of(model) == before


def test_values_are_exactly_those_of_the_model_and_the_gradient_is_the_stand_ins():
    x = torch.rand(5, *SHAPE)
    weight = torch.randn(SHAPE)
    model = nn.Sequential(Rounding(), nn.Flatten(), nn.Linear(48, 3))
    expected = model(x)
    with bpda(model, "0", lambda images: images * weight) as same:
        assert same is model
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        assert torch.equal(logits, expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        logits.sum().backward()
    torch.testing.assert_close(leaf.grad, model[2].weight.detach().sum(dim=0).view(SHAPE) * weight.expand_as(x))
    assert model(x.requires_grad_()).grad_fn is not None


def test_another_shape_needs_a_surrogate_and_gets_one(trained):
    _, x, y = trained
    torch.manual_seed(0)
    model = nn.Sequential(Thermometer(), nn.Flatten(), nn.Linear(8 * 64, 10))
    with (
        bpda(model, "0"),
        pytest.raises(InputError, match=r"'0' answers with \(100, 8, 8, 8\) where the identity gives"),
    ):
        model(x)
    levels = torch.arange(1, 9).view(1, -1, 1, 1) / 9

    def smooth(images):
        return ((images - levels) * 9 + 0.5).clamp(0, 1)

    attack = PGD(0.2, steps=10, random_start=False, seed=0)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    with pytest.raises(InputError, match="no gradient"):
        attack.run(model, x, y)
    assert BPDA(attack=attack, modules="0", surrogate=smooth, seed=0).run(model, x, y).success_rate > 0.5


def test_globs_lists_nesting_and_a_module_used_twice():
    inner = nn.Sequential(Rounding(), Rounding())
    shared = Rounding()
    model = nn.Sequential(inner, shared, shared, nn.Flatten(), nn.Linear(48, 3))
    x = torch.rand(2, *SHAPE)
    for modules in ("0,1,2", "0.*,1", ["0", shared], [inner, "1"], "[012]"):
        leaf = x.clone().requires_grad_()
        with bpda(model, modules):
            model(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, model[4].weight.detach().sum(dim=0).view(SHAPE).expand_as(x))
    assert all(not module._forward_hooks for module in model.modules())


def test_the_model_is_as_before_after_a_failure():
    model = nn.Sequential(Rounding(), nn.Flatten(), nn.Linear(48, 3))
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), bpda(model, "0", lambda images: 1 / 0):
        model(torch.rand(1, *SHAPE))
    assert state_of(model) == before


def test_settings_of_the_outside_reach_the_attack_inside():
    model, x, y = nn.Sequential(nn.Identity(), NoisyLinear(SHAPE)), torch.rand(4, *SHAPE), torch.zeros(4).long()
    inner = PGD(0.1, 0.03, 3, eot=2, eot_average="probability", norm="l2", loss="margin")
    attack = BPDA(attack=inner, modules="0", seed=3)
    for name in ("eps", "eot", "eot_average", "norm", "loss"):
        assert getattr(attack, name) == getattr(inner, name)
    assert attack.run(model, x, y).backward_passes == 6
    assert dataclasses.replace(attack, eot=1).run(model, x, y).backward_passes == 3
    assert attack.resized(0.02).run(model, x, y).l2.max() <= 0.02 + 1e-6
    # The identity of an identity changes nothing.
    torch.testing.assert_close(attack(model, x, y), dataclasses.replace(inner, seed=3)(model, x, y))
    assert BPDA(attack=CW(steps=5, search_steps=1), modules="0").eps == math.inf
    BPDA(attack=APGD(0.1, steps=3), modules="0").run(model, x, y)


BAD = {
    "no such": (
        lambda: bpda(nn.Sequential(nn.ReLU()), "pre.*").__enter__(),
        "the model has no submodule 'pre.*'; it has: 0",
    ),
    "no module": (lambda: bpda(len, "0").__enter__(), "model is a builtin_function_or_method, must be a module"),
    "foreign": (lambda: bpda(nn.Sequential(nn.ReLU()), [nn.ReLU()]).__enter__(), "the model has no submodule ReLU"),
    "empty": (lambda: bpda(nn.Sequential(nn.ReLU()), []).__enter__(), "modules is empty"),
    "number": (lambda: bpda(nn.Sequential(nn.ReLU()), [0]).__enter__(), "modules has a int"),
    "surrogate": (lambda: bpda(nn.Sequential(nn.ReLU()), "0", 3).__enter__(), "surrogate is a int, must be callable"),
    "attack": (lambda: BPDA(attack=None, modules="0"), "attack must be one by gradients"),
    "black box": (lambda: BPDA(attack=Square(), modules="0"), "attack must be one by gradients"),
    "modules": (lambda: BPDA(attack=FGSM(), modules=" "), "modules must be globs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    make, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_function_has_no_submodules():
    x = torch.rand(2, *SHAPE)
    with pytest.raises(InputError, match="the model is a function, which has none; give the network itself"):
        BPDA(attack=FGSM(), modules="0")(lambda images: Linear(SHAPE)(images), x, torch.zeros(2).long())


class Caller(nn.Module):
    """Calls its submodule as it is told to."""

    def __init__(self, call):
        super().__init__()
        self.inner = Takes()
        self.call = call

    def forward(self, x):
        return self.call(self.inner, x)


class Takes(nn.Module):
    def forward(self, x=None, scale=1):
        return x[0] if isinstance(x, list) else scale * x


@pytest.mark.parametrize(
    "call", [lambda inner, x: inner(x=x), lambda inner, x: inner([x]), lambda inner, x: inner(2, x)]
)
def test_a_submodule_that_gets_no_tensor_first_is_refused(call):
    x = torch.rand(2, *SHAPE)
    model = Caller(call)
    assert model(x).shape == x.shape
    with bpda(model, "inner"), pytest.raises(InputError, match="'inner' gets no tensor as its first argument"):
        model(x)


def test_what_else_the_submodule_gets_reaches_it():
    x = torch.rand(2, *SHAPE)
    model = Caller(lambda inner, images: inner(images, 3))
    with bpda(model, "inner"):
        assert torch.equal(model(x), 3 * x)


@pytest.mark.parametrize(("layers", "named"), [(8, "0, 1, 2, 3, 4, 5, 6, 7$"), (9, r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$")])
def test_a_refusal_names_eight_submodules(layers, named):
    with (
        pytest.raises(ConfigError, match=f"it has: {named}"),
        bpda(nn.Sequential(*[nn.ReLU() for _ in range(layers)]), "x"),
    ):
        pass


@pytest.mark.parametrize(("surrogate", "whose"), [(None, "the identity"), (lambda x: x[:, :2], "the surrogate")])
def test_a_refusal_says_whose_shape_is_another(surrogate, whose):
    shape = (2, 2 if surrogate else 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 5, 1))
    with bpda(model, "0", surrogate), pytest.raises(InputError) as caught:
        model(torch.rand(2, *SHAPE))
    assert f"answers with (2, 5, 4, 4) where {whose} gives {shape}; give bpda() a surrogate" in str(caught.value)


class Stage(nn.Module):
    """A convolution, and a norm inside another module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.after = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.after(self.conv(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("modules", ["after", "after.0", "other"])
def test_a_norm_between_is_not_folded_away(modules):
    """In fast modes the convolution would answer for the norm, whose gradient is the one to replace."""
    torch.manual_seed(0)
    model = Stage().eval()
    model.after[0].running_var.fill_(0.01)
    model.after[0].weight.data.copy_(torch.tensor([4.0, -1.0, 0.1, -2.0]))
    model.other = nn.Identity()
    x, y = torch.rand(8, 3, 4, 4), torch.randint(3, (8,))
    attack = BPDA(attack=FGSM(0.1), modules=modules)
    wanted = attack(model, x, y)
    for _ in range(2):
        with execution.running(execution.FAST32):
            found = attack(model, x, y)
        torch.testing.assert_close(found, wanted)
    assert not any("forward" in module.__dict__ for module in model.modules())
    # What the convolution alone would have been given, had the norm's part of the gradient stayed in it.
    assert modules == "other" or not torch.allclose(FGSM(0.1)(model, x, y), wanted)
