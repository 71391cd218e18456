"""Noise in networks whose weights are shared or computed, and in joined networks: right, or refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from learn2perturb.defenses import build_defense
from learn2perturb.errors import SiteError
from learn2perturb.noise import (
    fixed_noise,
    noise_modules,
    noise_sites,
    perturb,
    perturb_weights,
    remove_noise,
    vary_weights,
)

SHAPE = (1, 8, 8)
MAKERS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def network(made) -> nn.Module:
    """A plain layer, and one whose weight is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), made(nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("made", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("noisy", [perturb_weights, vary_weights])
def test_weight_noise_names_the_layer_whose_weight_is_computed_and_skips_none(noisy, made):
    plain = network(made)
    with pytest.raises(SiteError, match=r"site '2' \(Conv2d\) gets its weight from a .* make it a parameter first: "):
        noisy(plain)
    assert noise_modules(plain) == []
    assert noise_sites(noisy(plain, sites=["0", "4"])) == ["0", "4"]


@pytest.mark.parametrize("made", MAKERS.values(), ids=MAKERS)
def test_pixeldp_names_a_first_convolution_that_it_cannot_set(made):
    with pytest.raises(SiteError, match=r"the first convolution, '2', gets its weight from a .* make it a parameter"):
        build_defense("pixeldp").prepare(network(made)[2:], (4, 6, 6))


def test_layers_without_weights_yet_are_refused():
    with pytest.raises(SiteError, match=r"'0' \(LazyLinear\) has no weights yet; run one pass"):
        perturb_weights(nn.Sequential(nn.LazyLinear(4)))


class Shared(nn.Module):
    """Two layers with one weight, and a layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.other.weight = self.one.weight
        self.alias = self.head

    def forward(self, x):
        return self.alias(self.other(torch.relu(self.one(x.flatten(1)))))


@pytest.mark.parametrize("noisy", [lambda net: perturb(net, input_shape=SHAPE, sites="*"), perturb_weights])
def test_shared_weights_stay_shared_and_plain_checkpoints_load_under_every_name(noisy):
    plain, other = Shared(), Shared()
    noisy_one = noisy(copy.deepcopy(plain))
    noisy_one.load_state_dict(other.state_dict())
    twin = copy.deepcopy(noisy_one)
    twin.load_state_dict(noisy_one.state_dict())
    for one in (noisy_one, twin):
        removed = remove_noise(one)
        assert removed.one.weight is removed.other.weight
        assert list(removed.state_dict()) == list(other.state_dict())
        assert torch.equal(removed(torch.ones(2, *SHAPE)), other(torch.ones(2, *SHAPE)))


def test_a_posterior_of_a_weight_that_two_layers_share_is_refused():
    with pytest.raises(SiteError, match="sites 'one' and 'other' share one weight"):
        vary_weights(Shared())


@pytest.mark.parametrize("noisy", [lambda net: perturb(net, input_shape=(4,), sites="0"), perturb_weights])
def test_networks_joined_after_they_were_perturbed_replay_draws_of_their_own(noisy):
    one = noisy(nn.Sequential(nn.Linear(4, 4), nn.Flatten()))
    joined = nn.ModuleList([one, copy.deepcopy(one)])
    x = torch.rand(2, 4)
    with fixed_noise(joined, seed=3):
        first, second = (net(x) for net in joined)
        assert torch.equal(joined[1](x), second)
        with fixed_noise(joined[1], seed=3):  # alone it is the only one of its name
            assert torch.equal(joined[1](x), first)
        assert torch.equal(joined[1](x), second)
    assert not torch.equal(first, second)
    with fixed_noise(one, seed=3):
        assert torch.equal(one(x), first)
    assert all(module.replay is None for module in noise_modules(joined))
