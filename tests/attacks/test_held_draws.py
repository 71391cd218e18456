"""Draws that are held through an attack: the same in every step, others in every restart, none of those that judge."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import PGD
from learn2perturb.attacks.gradients import AVERAGES
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.spec import build_attacks
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import comparing as comparison
from learn2perturb.presets import parse_attack
from tests.problems import two_logits

X, Y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
SOURCES = {
    "torch": lambda: float(torch.randn(())),
    "numpy": lambda: float(np.random.randn()),
    "random": random.random,
}


class Listening:
    """Keeps what it drew, whatever it drew it from."""

    def __init__(self, draw) -> None:
        self.draw, self.drawn = draw, []

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn.append(self.draw())
        return two_logits(x.flatten(1).sum(dim=1) + self.drawn[-1])


def drawn(attack: PGD, source: str = "torch") -> list[list[float]]:
    """What each step drew; the pass that verifies is left out."""
    model = Listening(SOURCES[source])
    attack(model, X, Y)
    each = attack.eot * (1 if attack.eot == 1 or attack.eot_average == "loss" else 2)
    return [model.drawn[at : at + each] for at in range(0, each * attack.steps, each)]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", [None, 3])
def test_every_step_has_the_same_draws_or_others(average, source, seed):
    settings = {"eot": 3, "eot_average": average, "seed": seed}
    held = drawn(PGD(0.1, 0.02, 4, eot_draws="held", **settings), source)
    assert held == [held[0]] * 4
    assert len(set(held[0])) == len(held[0])  # K draws, not one K times
    fresh = [value for step in drawn(PGD(0.1, 0.02, 4, **settings), source) for value in step]
    assert len(set(fresh)) == len(fresh)


def test_a_restart_holds_others_and_is_judged_by_none_of_them():
    model = Listening(SOURCES["torch"])
    PGD(0.1, 0.02, 2, eot=2, eot_draws="held", restarts=2, seed=0)(model, X, Y)
    # two steps, their judgement; the same again; the pass that verifies
    first, again, judged, second, last, others, verified = (model.drawn[at : at + 2] for at in (0, 2, 4, 6, 8, 10, 12))
    assert (first, second) == (again, last)
    apart = [*first, *judged, *second, *others, *verified]
    assert len(set(apart)) == len(apart) == 9


def test_a_seed_makes_held_draws_a_function_of_it_and_none_follows_the_callers():
    attack = PGD(0.1, 0.02, 2, eot_draws="held", seed=1)
    assert drawn(attack) == drawn(attack)
    torch.manual_seed(5)
    once = drawn(PGD(0.1, 0.02, 2, eot_draws="held"))
    assert drawn(PGD(0.1, 0.02, 2, eot_draws="held")) != once
    torch.manual_seed(5)
    assert drawn(PGD(0.1, 0.02, 2, eot_draws="held")) == once


@pytest.mark.parametrize("average", AVERAGES)
def test_the_command_line_says_what_is_averaged_and_whether_draws_are_held(average):
    name, settings = parse_attack(f"pgd:steps=20,eot=10,eot_average={average},eot_draws=held")
    (attack,) = build_attacks({"row": (name, settings)}).values()
    assert attack == PGD(steps=20, eot=10, eot_average=average, eot_draws="held")
    with pytest.raises(ConfigError, match="eot_draws is 'kept'; allowed: fresh, held"):
        PGD(eot_draws="kept")


def test_a_record_from_before_there_were_held_draws_is_of_the_same_attack():
    older, newer, held = (
        types.SimpleNamespace(parameters={"steps": 20} | more, eps=0.1)
        for more in ({}, {"eot_draws": "fresh"}, {"eot_draws": "held"})
    )
    assert comparison._differing(older, newer) == []
    assert comparison._differing(older, held) == ["eot_draws"]


def test_what_is_held_is_drawn_from_very_many():
    query = Query(lambda x: two_logits(x.flatten(1).sum(dim=1)), PGD(0.1, 0.02, 1), Y, strict=True)
    seen = set()
    for _ in range(60):
        with query.held():
            seen.add(query._held)
        assert query._held is None
    assert len(seen) == 60
