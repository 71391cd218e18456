"""Where weights lie: computed ones are told from parameters, and networks that hold them can be copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from learn2perturb.engine.weights import advice, copied, maker, settle, slots


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(4, 4), "weight", 0.3)


def frozen() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


@pytest.mark.parametrize(
    ("build", "made"),
    [
        (lambda: nn.Linear(4, 4), None),
        (lambda: nn.BatchNorm2d(4, affine=False), None),
        (nn.ReLU, None),
        (pruned, "a forward pre-hook"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "a forward pre-hook"),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "a parametrization"),
        (frozen, "a buffer"),
    ],
)
def test_what_computes_a_weight_is_named_with_what_makes_it_a_parameter_again(build, made):
    layer = build()
    assert maker(layer, "weight") == made
    text = advice(layer, "weight")
    assert bool(text) == (made is not None)
    if made in ("a parametrization", "a buffer"):
        names = {"layer": layer, "torch": torch}
        exec(text, names)
        assert maker(layer, "weight") is None
        assert isinstance(layer.weight, nn.Parameter)


def test_a_network_whose_hooks_left_graphs_behind_is_copied_and_settled():
    network, x = nn.Sequential(pruned(), nn.ReLU()), torch.rand(2, 4)
    answer = network(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(network)
    twin = copied(network)
    assert torch.equal(twin(x), answer)
    with torch.no_grad():
        twin[0].weight_orig.zero_()
    assert torch.equal(network(x), answer)  # they share nothing
    settle(network)
    assert torch.equal(copy.deepcopy(network)(x), answer)


def test_every_place_of_a_tensor_is_named_once():
    layer = nn.Linear(2, 2)
    other = nn.Linear(2, 2, bias=False)
    other.weight = layer.weight
    assert [name for name, _ in slots(nn.Sequential(layer, other, layer))] == ["0.weight", "0.bias", "1.weight"]
