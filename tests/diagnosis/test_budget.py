"""The budgets: their numbers written again, what is refused, and what a diagnosis by them costs."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from learn2perturb.diagnosis.budget import (
    BUDGETS,
    FULL,
    QUICK,
    Budget,
    budget_from,
    budget_of,
    really_searched,
    resized,
    value_queries,
    with_grid,
)
from learn2perturb.diagnosis.checks import CHECKS, gradient_passes
from learn2perturb.errors import ConfigError, UnknownNameError

# quick, full
NUMBERS = {
    "name": ("quick", "full"), "images": (200, 1000), "some": (100, 1000), "scorings": (10, 10), "eot": (10, 20),
    "steps": (20, 20), "sweep_eot": (4, 20), "unbounded_steps": (200, 200), "unbounded_eot": (1, 5),
    "samples": (200, 10_000), "sample_draws": (1, 2), "finalists": (3, 5), "judge_draws": (20, 100),
    "eps_grid": ((), ()), "draw_curve": ((1, 8, 32), (1, 5, 20, 80)),
    "step_curve": ((5, 20, 50, 100), (5, 20, 50, 100, 200)), "restarts": (5, 5), "targets": (1, 9),
    "square_queries": (300, 5000), "square_draws": (4, 20), "slope_images": (8, 16), "slope_repeats": (24, 48),
    "real_queries": (1000, 5000), "descent_steps": (40, 100), "descent_directions": (16, 32),
    "surrogate_queries": (10_000, 50_000),
}  # fmt: skip
# Numbers that no two products of which are equal by chance.
ODD = Budget(
    name="odd", images=101, some=31, scorings=3, eot=7, steps=11, sweep_eot=5, unbounded_steps=13, unbounded_eot=3,
    samples=21, sample_draws=2, finalists=4, judge_draws=9, eps_grid=(0.1, 0.2, 0.3), draw_curve=(1, 2, 8),
    step_curve=(3, 6), restarts=2, targets=4, square_queries=17, square_draws=6, slope_images=8, slope_repeats=5,
    real_queries=19, descent_steps=23, descent_directions=29, surrogate_queries=37,
)  # fmt: skip


@pytest.mark.parametrize(("place", "name"), [(0, "quick"), (1, "full")])
def test_the_numbers_of_a_budget(place, name):
    assert asdict(BUDGETS[name]) == {key: both[place] for key, both in NUMBERS.items()}
    assert budget_of(name) is BUDGETS[name]


WHOLE = [key for key, both in NUMBERS.items() if isinstance(both[0], int)]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
def test_numbers_are_whole_and_at_least_one(name, value):
    with pytest.raises(ConfigError, match=f"{name} of the budget is {value!r}"):
        replace(QUICK, **{name: value})


def test_one_is_enough():
    least = replace(ODD, draw_curve=(1, 4), step_curve=(1, 2), **dict.fromkeys(WHOLE, 1))
    assert all(getattr(least, name) == 1 for name in WHOLE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"some": 201}, "some is 201 and images 200"),
        ({"draw_curve": ()}, "draw_curve"),
        ({"draw_curve": (8, 2)}, "draw_curve"),
        ({"draw_curve": (2, 2, 8)}, "draw_curve"),
        ({"draw_curve": (1, 6)}, "divided by 4"),
        ({"draw_curve": (1, 7)}, "divided by 4"),
        ({"draw_curve": (1, 4, 8)}, "divided by 4"),
        ({"step_curve": (5, 11)}, "divided by 2"),
        ({"step_curve": (4, 10)}, "divided by 2"),
        ({"eps_grid": (0.2, 0.1)}, "eps_grid"),
        ({"eps_grid": (0.1, 0.1)}, "eps_grid"),
        ({"eps_grid": (0.0, 0.1)}, "eps_grid"),
    ],
)
def test_what_makes_no_budget_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        budget_of("quick", **changes)


def test_what_is_just_right_is_a_budget():
    found = budget_of(QUICK, some=200, draw_curve=(2, 8), step_curve=(5, 10), eps_grid=(1e-9, 0.1))
    assert (found.some, found.draw_curve, found.step_curve, found.eps_grid) == (200, (2, 8), (5, 10), (1e-9, 0.1))


def test_a_budget_is_named_or_given():
    with pytest.raises(UnknownNameError, match="quick"):
        budget_of("quikc")
    with pytest.raises(ConfigError, match="'quick', 'full' or a Budget"):
        budget_of(3)
    assert budget_of(QUICK) is QUICK


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


def test_a_budget_for_other_numbers_of_images():
    assert (resized(QUICK, 60).images, resized(QUICK, 60).some) == (60, 60)
    assert (resized(QUICK, 500).images, resized(QUICK, 500).some) == (500, 100)


def test_the_radii_of_a_budget():
    assert with_grid(QUICK, "linf", 8 / 255, 3072).eps_grid == pytest.approx(
        [k / 255 for k in (2, 4, 8, 16, 32, 64, 128)]
    )
    given = replace(QUICK, eps_grid=(0.1, 0.3))
    assert with_grid(given, "linf", 0.1, 3072).eps_grid == (0.1, 0.3, 0.5)
    enough = replace(QUICK, eps_grid=(0.1, 0.5))
    assert with_grid(enough, "linf", 0.1, 3072).eps_grid == (0.1, 0.5)
    beyond = replace(QUICK, eps_grid=(0.1, 0.7))
    assert with_grid(beyond, "linf", 0.1, 3072).eps_grid == (0.1, 0.7)


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
    quiet = {3: 31 * 13, 5: 31 * steps * 3, 7: 31 * (3 + 6), 8: 31 * steps * (4 + 2)}
    noisy = {
        3: 31 * 13 * 3, 4: 31 * 21 * 2 / 3, 5: 31 * steps * 3 * 5, 6: 2 * 101 * steps,
        7: 31 * (steps * (1 + 2 + 8) + 5 * (3 + 6)), 8: 31 * 5 * steps * (6 + 4 + 2),
    }  # fmt: skip
    for stochastic, expected in ((False, quiet), (True, noisy)):
        costs = {number: check.cost(ODD, stochastic) for number, check in CHECKS.items() if number <= 8}
        assert costs == pytest.approx({number: expected.get(number, 0) for number in costs})
    rest = {stochastic: sum(CHECKS[n].cost(ODD, stochastic) for n in CHECKS if n > 8) for stochastic in (False, True)}
    assert gradient_passes(ODD, stochastic=False, sources=2) == int(101 * steps * 3 + sum(quiet.values()) + rest[False])
    found = 101 * steps * 7 * 3 + 31 * 17 * 6 / 3 + sum(noisy.values()) + rest[True]
    assert gradient_passes(ODD, stochastic=True, sources=2) == int(round(found, 6))
