"""The parts of choosing sites: what the probe sees, where channels are, which candidates are named, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from learn2perturb.errors import ConfigError, InputError, NoiseError, SiteError
from learn2perturb.models import build_model
from learn2perturb.noise import insert, noise_modules, noise_sites, noise_spec, perturb, perturb_weights, remove_noise
from learn2perturb.noise.laws import _positive
from learn2perturb.noise.sites import _candidates, _channels_are_last, guess, probe
from learn2perturb.registry import MODELS


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision: over the channels of images, which it moves to the end and back."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("module", "shape", "last"),
    [
        (nn.Linear(8, 8), (8,), True),
        (nn.Linear(8, 8), (3, 4, 8), True),
        (nn.LayerNorm(8), (5, 8), True),
        (nn.LayerNorm(8), (5, 7, 8), True),
        (nn.LayerNorm(8), (8, 7, 8), True),  # a plain one works on the last axis
        (nn.LayerNorm(8), (8, 7, 5), False),
        (nn.LayerNorm((7, 8)), (5, 7, 8), False),  # over an image
        (LayerNorm2d(8), (8, 5, 5), False),
        (LayerNorm2d(8), (8, 8, 8), False),
        (LayerNorm2d(8), (8, 7, 8), False),
        (LayerNorm2d(8), (5, 7, 8), True),
        (nn.Identity(), (5, 8), True),  # tokens
        (nn.Identity(), (3, 8, 8), False),
        (nn.Identity(), (8,), False),
        (nn.BatchNorm1d(5), (5, 8), False),
        (nn.Conv1d(5, 5, 1), (5, 8), False),
    ],
)
def test_channels_are_last_in_tokens_and_first_in_images(module, shape, last):
    assert _channels_are_last(module, shape) is last


# --- the probe


def test_the_probe_sees_two_random_images_in_eval_mode_without_gradients():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(
                (tuple(x.shape), x.min().item() >= 0, x.max().item() <= 1, self.training, torch.is_grad_enabled())
            )
            return x.flatten(1)

    network = nn.Sequential(Look(), nn.Linear(12, 2))
    state = torch.get_rng_state()
    probe(network, (3, 2, 2))
    assert seen == [((2, 3, 2, 2), True, True, False, False)]
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("shape", [5, None, (), (0, 2), (3, -1), (3, 2.0), ("3", "2"), "33"])
def test_a_shape_is_of_one_image(shape):
    with pytest.raises(InputError, match=r"input_shape is .*; give the shape of one image, e.g. \(3, 32, 32\)"):
        probe(nn.Identity(), shape)


def test_a_network_is_probed_where_it_is_and_in_its_type():
    probe(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, device="meta")), (1, 2, 2))
    probe(nn.Sequential(nn.Flatten(), nn.Linear(4, 2).double()), [1, 2, 2])
    assert list(probe(nn.Sequential(nn.Flatten()), (1, 2, 2)).calls) == ["0"]  # no parameter: on the CPU


def test_a_submodule_that_is_called_by_keyword_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(input=x.flatten(1))

    (call,) = probe(Named(), (1, 2, 2)).calls.values()
    assert call.input is None
    assert call.output.shape == (2, 2)
    assert call.times == 1


def test_a_network_that_fails_is_told_with_its_own_words():
    with pytest.raises(
        InputError, match=r"failed on images of input_shape \(1, 2, 2\): (addmm: )?mat1 and mat2 .*; give the shape"
    ):
        probe(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (1, 2, 2))


class Skip(nn.Module):
    """``x + f(x)`` from the first layer on: there is no stem."""

    def __init__(self, in_place: bool = False):
        super().__init__()
        self.inner, self.end = nn.Linear(4, 4), nn.Linear(4, 4)
        self.in_place = in_place

    def forward(self, x):
        x = x.flatten(1)
        out = self.end(self.inner(x).relu())
        if self.in_place:
            out += x
            return out
        return x + out


@pytest.mark.parametrize("in_place", [False, True])
def test_without_a_stem_the_ends_of_branches_are_all(in_place):
    network = nn.Sequential(nn.Sequential(nn.Flatten()), Skip(in_place), Skip(in_place), nn.Linear(4, 2))
    seen = probe(network, (1, 2, 2))
    assert guess(seen) == seen.branch_ends
    assert "2.end" in seen.branch_ends


class Sum(nn.Module):
    """Two layers on what a third gives, and a sum."""

    def __init__(self, added):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.flat, self.parameter = nn.Flatten(), nn.Parameter(torch.ones(2, 4))
        self.added = added

    def forward(self, x):
        self.images = self.flat(x)
        return self.added(self, self.one(self.images))


@pytest.mark.parametrize(("added", "ends", "shortcuts"), [
    # of equal depth: the first is the branch, which has an end if a layer made it
    (lambda net, h: net.two(h) + net.three(h), ["two"], ["three"]),
    (lambda net, h: net.two(input=h) + net.three(h), ["two"], ["three"]),
    (lambda net, h: net.two(h) + net.three(h).relu(), ["two"], []),
    (lambda net, h: net.two(h).relu() + net.three(h), [], ["three"]),
    (lambda net, h: net.two(h).relu() + net.three(h).sigmoid(), [], []),
    # the deeper one is the branch, on whichever side it stands
    (lambda net, h: net.two(h) + h, ["two"], ["one"]),
    (lambda net, h: h + net.two(h), ["two"], ["one"]),
    (lambda net, h: h.relu() + net.three(net.two(h)), ["three"], []),
    (lambda net, h: torch.add(net.three(net.two(h)), net.two(h)), ["three"], ["two"]),
    (lambda net, h: net.three(net.two(h)) + net.two(h).relu_(), ["three"], ["two"]),  # in place: the layer's still
    # what no layer has met is at no depth
    (lambda net, h: net.parameter.sigmoid() + h, ["one"], []),
    (lambda net, h: net.images + net.parameter.sigmoid(), [], []),
    (lambda net, h: torch.zeros(2, 4) + h, ["one"], []),
    (lambda net, h: h + net.two(net.parameter), ["one"], ["two"]),
    (lambda net, h: net.two(net.parameter) + h, ["two"], ["one"]),
    # no sum of two activations
    (lambda net, h: net.two(h) + net.parameter, [], []),
    (lambda net, h: net.two(h) + 1, [], []),
    (lambda net, h: net.two(h) + h[:1], [], []),
])  # fmt: skip
def test_of_a_sum_the_deeper_operand_is_the_branch(added, ends, shortcuts):
    seen = probe(nn.Sequential(Sum(added)), (1, 2, 2))
    assert [name.removeprefix("0.") for name in seen.branch_ends] == ends
    assert [name.removeprefix("0.") for name in seen.shortcuts] == shortcuts


# --- what is named


def test_candidates_are_norms_first_twelve_at_most_and_called_once():
    layers = [nn.Linear(4, 4) for _ in range(13)] + [nn.LayerNorm(4)]
    seen = probe(nn.Sequential(nn.Flatten(), *layers), (1, 2, 2))
    assert _candidates(seen) == "14, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more"
    assert _candidates(seen, most=15) == "14, " + ", ".join(map(str, range(14)))
    assert _candidates([str(k) for k in range(12)]) == ", ".join(map(str, range(12)))
    assert _candidates([]) == "none"
    twice = nn.Linear(4, 4)
    assert (
        _candidates(probe(nn.Sequential(nn.Flatten(), twice, nn.Sequential(nn.ReLU(), twice)), (1, 2, 2)))
        == "0, 2.0, 2"
    )


def test_near_names_are_three_at_most():
    network = nn.Sequential()
    for name in ("conv1", "conv2", "conv3", "conv4", "other"):
        network.add_module(name, nn.Flatten())
    network.add_module("end", nn.Linear(4, 2))
    with pytest.raises(SiteError) as caught:
        perturb(network, input_shape=(1, 2, 2), sites="conv5")
    near = str(caught.value).split("near: ")[1].split("; ")[0].split(", ")
    assert len(near) == 3
    assert set(near) < {"conv1", "conv2", "conv3", "conv4"}
    with pytest.raises(SiteError, match="site 'zzzzzzzzz' matches no submodule; candidates: "):
        perturb(network, input_shape=(1, 2, 2), sites="zzzzzzzzz")


# --- insertion


def test_a_registered_network_has_the_sites_of_its_registry_and_says_nothing(capsys):
    network = perturb(build_model("resnet20", input_shape=(3, 8, 8)), input_shape=(3, 8, 8))
    assert len(noise_sites(network)) == 10
    assert all(site == "bn1" or site.endswith("bn2") for site in noise_sites(network))
    assert "bn1" in MODELS.entry("resnet20").facts["sites"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["of another registry", 5, None])
def test_another_network_is_guessed_and_told(name, capsys):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    network.registered_name = name
    perturb(network, input_shape=(1, 2, 2))
    assert noise_sites(network) == ["1"]
    captured = capsys.readouterr()
    assert "perturb: no sites given; chose 1: 1" in captured.err + captured.out


@pytest.mark.parametrize("mark", ["module", "call"])
def test_a_compiled_network_is_known_by_what_compilation_leaves(mark):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    if mark == "module":
        network.add_module("_orig_mod", nn.Identity())
    else:
        network[1]._compiled_call_impl = lambda x: x
    for insertion in (lambda: perturb(network, input_shape=(1, 2, 2), sites="1"), lambda: perturb_weights(network)):
        with pytest.raises(NoiseError, match="the network is compiled"):
            insertion()
    with pytest.raises(NoiseError, match="the network is compiled"):
        remove_noise(network)


def test_noise_goes_to_the_device_of_its_layer():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    for noisy in (
        perturb_weights(copy.deepcopy(plain)),
        perturb(copy.deepcopy(plain), input_shape=(1, 2, 2), sites="0"),
    ):
        there = insert(copy.deepcopy(plain).to("meta"), noise_spec(noisy))
        assert {p.device.type for module in noise_modules(there) for p in module.parameters()} == {"meta"}


def test_removed_noise_is_off_for_whoever_still_holds_it():
    network = perturb(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=(1, 2, 2), sites="1")
    (module,) = noise_modules(network)
    remove_noise(network)
    assert module.enabled is False
    assert noise_modules(network) == []


@pytest.mark.parametrize(("value", "good"), [
    (1e-9, True), (3, True), (0, False), (-1.0, False), (True, False), (False, False), ("1", False), (None, False),
    (float("inf"), False), (float("nan"), False),
])  # fmt: skip
@pytest.mark.parametrize("zero", [False, True])
def test_standard_deviations_are_positive_numbers(value, good, zero):
    if good or (zero and value == 0 and value is not False):
        found = _positive("init", value, or_zero=zero)
        assert isinstance(found, float)
        assert found == value
        return
    with pytest.raises(ConfigError, match=f"init is .*; it must be a number {'at least' if zero else 'above'} 0, such"):
        _positive("init", value, or_zero=zero)


class Branch(nn.Module):
    """``x + norm(conv(x))``: its first convolution is at once the first of the network."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        return x + self.norm(self.convolution(x))


def test_a_stem_is_before_the_end_of_the_first_branch():
    assert guess(probe(nn.Sequential(Branch(), Branch()), (2, 2, 2))) == ["0.convolution", "0.norm", "1.norm"]


@pytest.mark.parametrize(("layers", "expected"), [(1, None), (2, ["1"]), (3, ["1", "2"]), (4, ["1", "2", "3"])])
def test_of_linear_layers_alone_the_last_gives_the_logits(layers, expected):
    seen = probe(nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(layers))), (1, 2, 2))
    if expected is not None:
        assert guess(seen) == expected
        return
    with pytest.raises(SiteError, match="no norm, convolution or linear layer to perturb was found"):
        guess(seen)


@pytest.mark.parametrize("sites", [5, 0.5, [], [""], ["0", 3], ""])
def test_sites_that_name_nothing_are_refused(sites):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(SiteError, match=r"sites is .*; give a glob, a list of names, or a predicate"):
        perturb(network, input_shape=(1, 2, 2), sites=sites)


class Both(nn.Module):
    """A layer of two inputs, of which the second matters."""

    def forward(self, x, y):
        return x + 10 * y


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = Both()

    def forward(self, x):
        return self.both(x.flatten(1), x.flatten(1))


def test_noise_on_what_a_layer_takes_leaves_its_other_inputs_alone():
    network = perturb(Two(), input_shape=(1, 2, 2), sites="both", place="input", init=0.01).eval()
    x = torch.rand(3, 1, 2, 2)
    assert (network(x) - 11 * x.flatten(1)).abs().max() < 0.1


class Scores(nn.Module):
    """Gives one number an image, or whole numbers."""

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.Flatten()
        self.inner.forward = lambda x: x.flatten(1)[:, 0] if kind == "flat" else x.flatten(1).long()

    def forward(self, x):
        return self.inner(x).float()


@pytest.mark.parametrize(("kind", "shape"), [("flat", r"\(2,\)"), ("whole", r"\(2, 4\)")])
def test_noise_needs_features_of_each_image_in_floating_point(kind, shape):
    with pytest.raises(SiteError, match=rf"the output of site 'inner' has shape {shape} and type torch"):
        perturb(Scores(kind), input_shape=(1, 2, 2), sites="inner")


class Named(nn.Module):
    """A residual branch of one layer after a stem, each called as ``layer(x)`` or as ``layer(input=x)``."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.stem, self.branch = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        x = self.stem(input=x) if self.named else self.stem(x)
        return x + (self.branch(input=x) if self.named else self.branch(x))


@pytest.mark.parametrize("named", [False, True])
def test_a_layer_that_is_called_by_keyword_is_as_deep_as_any(named):
    seen = probe(Named(named), (2, 4, 4))
    assert (seen.branch_ends, seen.shortcuts) == (["branch"], ["stem"])
    assert guess(seen) == ["stem", "branch"]
