"""Budgets from records, and what a diagnosis by them costs; their numbers are in tests/evaluation/test_defaults.py."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis.budget import (
    FULL,
    QUICK,
    Budget,
    budget_from,
    really_searched,
    value_queries,
    with_grid,
)
from learn2perturb.diagnosis.checks import CHECKS, gradient_passes, passes_by_part
from learn2perturb.diagnosis.measure import Attacked, Subject
from learn2perturb.diagnosis.whitebox import distortion
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation.intervals import Scores

# Numbers that no two products of which are equal by chance.
ODD = Budget(
    name="odd", images=101, some=31, scorings=3, eot=7, steps=11, sweep_eot=5, unbounded_steps=13, unbounded_eot=3,
    samples=21, sample_draws=2, finalists=4, judge_draws=9, eps_grid=(0.1, 0.2, 0.3), draw_curve=(1, 2, 8),
    step_curve=(3, 6), restarts=2, targets=4, square_queries=17, square_draws=6, slope_images=8, slope_repeats=5,
    real_queries=19, descent_steps=23, descent_directions=29, surrogate_queries=37,
)  # fmt: skip


def test_a_budget_of_plain_values():
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(ODD).items()}
    assert budget_from(plain) == ODD
    late = ("real_queries", "descent_steps", "descent_directions", "surrogate_queries", "near")  # of older records
    older = budget_from({key: value for key, value in plain.items() if key not in late})
    assert older == replace(ODD, real_queries=1000, descent_steps=40, descent_directions=16, surrogate_queries=10_000)
    with pytest.raises(ConfigError, match="lacks some, steps;"):
        budget_from({key: value for key, value in plain.items() if key not in ("steps", "some")})
    with pytest.raises(UnknownNameError, match="step_curve"):
        budget_from({**plain, "step_curv": [1, 2]})


def test_square_gets_its_queries_where_it_decides():
    assert really_searched(QUICK).square_queries == 1000
    assert really_searched(replace(QUICK, square_queries=2000)).square_queries == 2000
    assert really_searched(FULL).square_queries == 5000


def test_the_queries_of_a_diagnosis_by_values():
    # clean and 23 steps, of two sides of 29 directions and the point; Square and RayS; random points and finalists;
    # 8 attacks judged, 6 scored
    each = 24 * 59 + 2 * 17
    assert value_queries(ODD, stochastic=False) == 101 * (each + 21 + 4 + 8 + 6) + 37
    each = 24 * 59 + 2 * 17 * 6
    assert value_queries(ODD, stochastic=True) == 101 * (each + 21 * 2 + 4 * 9 + 8 * 9 + 6 * 3) + 37 * 6


def test_the_passes_of_a_diagnosis():
    steps = 11
    quiet = {3: 31 * 1, 5: 31 * steps * 3, 7: 31 * (3 + 6), 8: 31 * steps * (4 + 2)}
    noisy = {
        3: 31 * 1 * 3, 4: 31 * 21 * 2 / 3, 5: 31 * steps * 3 * 5, 6: 2 * 101 * steps,
        7: 31 * (steps * (1 + 2 + 8) + 5 * (3 + 6)), 8: 31 * 5 * steps * (6 + 4 + 2),
    }  # fmt: skip
    far = replace(ODD, eps_grid=tuple(range(1, 8)), near=4.0)  # of seven radii three are far
    assert CHECKS[5].cost(far, True) == 31 * steps * (4 * 5 + 3)
    assert CHECKS[5].cost(far, False) == 31 * steps * 7
    for stochastic, expected in ((False, quiet), (True, noisy)):
        costs = {number: check.cost(ODD, stochastic) for number, check in CHECKS.items() if number <= 8}
        assert costs == pytest.approx({number: expected.get(number, 0) for number in costs})
    rest = {stochastic: sum(CHECKS[n].cost(ODD, stochastic) for n in CHECKS if n > 8) for stochastic in (False, True)}
    assert gradient_passes(ODD, stochastic=False, sources=2) == int(101 * steps * 3 + sum(quiet.values()) + rest[False])
    found = 101 * steps * (7 + 2) + 31 * 17 * 6 / 3 + sum(noisy.values()) + rest[True]
    assert gradient_passes(ODD, stochastic=True, sources=2) == int(round(found, 6))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(
    ("norm", "eps", "pixels"), [("linf", 8 / 255, 3072), ("linf", 0.2, 64), ("l2", 0.5, 3072), ("l2", 0.02, 3072)]
)
def test_what_check_5_is_said_to_take_is_what_it_takes(norm, eps, pixels, stochastic):
    """Where one draw leaves nothing at far radii: which are far is one rule for both."""
    plan = with_grid(replace(ODD, eps_grid=()), norm, eps, pixels)
    taken: list[int] = []

    def attacked(name: str, attack: PGD, n: int, **_: object) -> Attacked:
        taken.append(n * attack.steps * (attack.eot if stochastic else 1))
        return Attacked(name, torch.zeros(n, 1), Scores(np.zeros((1, n), bool)))

    bench = SimpleNamespace(
        attack=PGD(eps, eps / 4, 11, norm=norm, eot=7), budget=plan, num_classes=10, attacked=attacked,
        subject=Subject(lambda x: x, stochastic),
    )  # fmt: skip
    distortion(bench, Attacked("clean", torch.zeros(101, 1), Scores(np.ones((1, 101), bool))))
    assert sum(taken) == CHECKS[5].cost(plan, stochastic)
    assert len({*taken}) == (2 if stochastic else 1)  # some are far, some are not


def test_the_radius_from_which_one_draw_is_tried():
    assert [QUICK.is_far(radius) for radius in (0.01, 1e9)] == [False, False]  # not known yet
    plan = with_grid(QUICK, "linf", 8 / 255, 3072)
    assert [plan.is_far(radius) for radius in plan.eps_grid] == [False] * 4 + [True] * 3
    assert with_grid(replace(QUICK, near=0.3), "linf", 8 / 255, 3072).near == 0.3
    with pytest.raises(ConfigError, match="near is -1; it is a radius above 0"):
        replace(QUICK, near=-1)


def test_the_parts_add_up_to_the_whole():
    parts = passes_by_part(ODD, stochastic=True, sources=2)
    assert list(parts) == ["what all checks share", *(f"check {number}" for number in CHECKS)]
    assert int(round(sum(parts.values()), 6)) == gradient_passes(ODD, stochastic=True, sources=2)
