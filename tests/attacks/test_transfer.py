"""Transfer: the images are those of the source, the success is that of the target."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from learn2perturb import build_model, evaluate, load_data, perturb
from learn2perturb.attacks import CW, PGD, FewPixel, Source, Transfer, build_attack
from learn2perturb.errors import ConfigError
from learn2perturb.noise import NoiseFree, noise_disabled
from tests.problems import Linear, NoisyLinear

SHAPE = (3, 4, 4)


@pytest.fixture
def batch():
    return torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_crafting_on_the_source_at_equal_seeds(norm, batch):
    source, target = NoisyLinear(SHAPE), Linear(SHAPE)
    attack = PGD(0.1, norm=norm, steps=3, eot=2)
    result = Transfer(attack=attack, source=source, seed=4).run(target, *batch)
    crafted = dataclasses.replace(attack, seed=4).run(source, *batch)
    assert torch.equal(result.x_adv, crafted.x_adv)
    assert torch.equal(result.success, target(result.x_adv).argmax(dim=1) != batch[1])
    assert (result.forward_passes, result.backward_passes) == (crafted.forward_passes, crafted.backward_passes)
    assert (result.attack.eps, result.attack.norm) == (0.1, norm)


def test_the_target_plays_no_part_and_both_get_their_modes_back(batch):
    source, targets = Linear(SHAPE), [nn.Sequential(Linear(SHAPE), nn.Dropout()) for _ in range(2)]
    attack = Transfer(attack=PGD(steps=2), source=source, seed=1)
    assert torch.equal(*(attack(target, *batch) for target in targets))
    assert source.training
    assert all(target.training and target[1].training for target in targets)
    assert all(weight.requires_grad for model in (source, *targets) for weight in model.parameters())


def test_eps_replaces_that_of_the_attack(batch):
    attack = Transfer(attack=PGD(0.1, steps=2), source=Linear(SHAPE), seed=0)
    assert dataclasses.replace(attack, eps=0.05).run(Linear(SHAPE), *batch).linf.max() <= 0.05 + 1e-6


def test_the_noise_free_twin_as_a_source():
    network = build_model("digits_cnn", input_shape=(1, 8, 8))
    model = perturb(network, input_shape=(1, 8, 8)).eval()
    x = load_data("digits", "test", limit=8).images.float() / 255
    twin = NoiseFree(model)
    with noise_disabled(model):
        expected = model(x)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), model(x))
    y = expected.argmax(dim=1)
    crafted = Transfer(attack=PGD(0.2, steps=3, random_start=False), source=twin)(model, x, y)
    with noise_disabled(model):
        assert torch.equal(crafted, PGD(0.2, steps=3, random_start=False)(model, x, y))


def test_usable_in_evaluate_and_records_name_the_source():
    models = [build_model("digits_cnn", input_shape=(1, 8, 8)) for _ in range(2)]
    data = load_data("digits", "test", limit=16)
    attacks = {"transfer": Transfer(attack=PGD(0.2, steps=2), source=Source(models[1], "the other"))}
    result = evaluate(models[0], data, attacks, eps=[0.1, 0.2], seed=0)
    rows = [result.row("transfer", eps=eps) for eps in (0.1, 0.2)]
    assert [row.parameters["source"] for row in rows] == ["the other"] * 2
    assert rows[0].linf == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "attack must be a white-box attack such as PGD.*got None"),
        ({"attack": PGD()}, "source must be a model to craft images on, got None"),
        ({"attack": PGD(), "source": 3}, "source must be a model to craft images on, got 3"),
        ({"attack": FewPixel(), "source": Linear(SHAPE)}, "attack must be of norm linf or l2, got norm 'l0'"),
        ({"attack": CW(), "source": Linear(SHAPE)}, "eps must be finite"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_attack("transfer", **settings)
