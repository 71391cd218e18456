"""What the registry says a thing can do is what it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.defenses import Clock, build_defense
from learn2perturb.models import build_model
from learn2perturb.noise import is_stochastic
from learn2perturb.registry import ATTACKS, DEFENSES
from learn2perturb.training import TrainConfig

SHAPE = (1, 8, 8)
MADE = [entry for entry in ATTACKS if not entry.facts.get("needs")]


@pytest.mark.parametrize("entry", list(DEFENSES), ids=lambda entry: entry.name)
def test_a_defense_draws_noise_and_trains_on_adversarial_examples_as_it_says(entry):
    torch.manual_seed(0)
    config = TrainConfig(
        defense=entry.name, recipe="fast", model="digits_cnn", dataset="digits", attack_steps=1, batch_size=8
    ).resolve()
    defense = build_defense(entry.name, config.options)
    network = defense.prepare(build_model("digits_cnn", input_shape=SHAPE, **config.model_options), SHAPE).train()
    clock = Clock(1, 0, 4, 0, 1, 32)
    defense.begin_step(network, clock)
    assert is_stochastic(network) is entry.fact("stochastic")
    losses = defense.loss(network, torch.rand(8, *SHAPE), torch.arange(8) % 3, clock, config.closed())
    assert (losses.adversarial is not None) is entry.fact("adversarial")


class Numbers(nn.Module):
    """Logits of the mean pixel, as numbers that autograd knows nothing of."""

    def forward(self, x):
        with torch.no_grad():
            mean = x.flatten(1).mean(dim=1, keepdim=True)
            return torch.cat([mean, 0.5 * mean, 1 - mean], dim=1)


@pytest.mark.parametrize("entry", MADE, ids=lambda entry: entry.name)
def test_an_attack_needs_a_gradient_as_it_says(entry):
    kind = entry.load()
    few = {"steps": 2, "queries": 4, "search_steps": 1, "population": 4, "generations": 1, "directions": 2, "eot": 1}
    settings = {name: value for name, value in few.items() if name in kind.__dataclass_fields__}
    attack = kind(**{**entry.arguments, **settings})
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    try:
        attack(Numbers(), x, y)
    except Exception:
        assert entry.fact("needs_gradient", default=True)
    else:
        assert not entry.fact("needs_gradient", default=True)
