"""Numbers of attacks at their bounds: the last that is taken, the first that is refused."""

from __future__ import annotations

import math

import pytest

from learn2perturb.attacks import CW, FAB, SPSA, Square
from learn2perturb.errors import ConfigError

# name -> (attack, good values, bad values)
BOUNDS = {
    "p_init": (Square, [1, 1.0, 0.001], [0, 0.0, 1.001, -0.1, True, "0.8", None, math.nan]),
    "momentum": (SPSA, [0, 0.0, 0.999], [1, 1.0, -0.001, True, "0.9", None, math.nan]),
    "size": (SPSA, [0.001, 1.0, None], [0, -0.1, math.inf, True, "1"]),
    "confidence": (CW, [0, 0.0, 7.5], [-0.001, True, "0", None, math.nan]),
    "largest_c": (CW, [1e-3, 1.0], [0.9e-3, 0, -1.0, math.inf]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name):
    kind, good, bad = BOUNDS[name]
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            kind(**{name: value})


@pytest.mark.parametrize(("eps", "expected"), [(0.5, 0.05), (0.0, 1 / 255)])
def test_the_step_of_spsa_is_a_tenth_of_the_radius(eps, expected):
    assert SPSA(eps).step_size == pytest.approx(expected)


def test_fab_stops_early_inside_a_radius_only():
    assert FAB(0.1, early_stop=True).early_stop and not FAB(math.inf, early_stop=False).early_stop
    with pytest.raises(ConfigError, match="early_stop=True needs a finite eps"):
        FAB(math.inf, early_stop=True)
