"""Budgets from records, and what a diagnosis by them costs; their numbers are in tests/evaluation/test_defaults.py."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from learn2perturb.diagnosis.budget import (
    FULL,
    QUICK,
    Budget,
    budget_from,
    really_searched,
    value_queries,
)
from learn2perturb.diagnosis.checks import CHECKS, gradient_passes
from learn2perturb.errors import ConfigError, UnknownNameError

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
    late = ("real_queries", "descent_steps", "descent_directions", "surrogate_queries")  # of older records
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
    far = replace(ODD, eps_grid=tuple(range(1, 8)))  # of seven radii three are far beyond the one in question
    assert CHECKS[5].cost(far, True) == 31 * steps * (4 * 5 + 3)
    assert CHECKS[5].cost(far, False) == 31 * steps * 7
    for stochastic, expected in ((False, quiet), (True, noisy)):
        costs = {number: check.cost(ODD, stochastic) for number, check in CHECKS.items() if number <= 8}
        assert costs == pytest.approx({number: expected.get(number, 0) for number in costs})
    rest = {stochastic: sum(CHECKS[n].cost(ODD, stochastic) for n in CHECKS if n > 8) for stochastic in (False, True)}
    assert gradient_passes(ODD, stochastic=False, sources=2) == int(101 * steps * 3 + sum(quiet.values()) + rest[False])
    found = 101 * steps * (7 + 2) + 31 * 17 * 6 / 3 + sum(noisy.values()) + rest[True]
    assert gradient_passes(ODD, stochastic=True, sources=2) == int(round(found, 6))
