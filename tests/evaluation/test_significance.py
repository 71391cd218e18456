from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.significance import TWO_SIGMA, beyond, equals, exceeds, holm, least_seen, mcnemar


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    with pytest.raises(ConfigError, match="must lie in"):
        holm([1.2])


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(0)
    wrong = sum(min(holm(rng.random(15))) < 0.05 for _ in range(2000))
    assert wrong / 2000 == pytest.approx(0.05, abs=0.02)


def test_mcnemar_is_the_sign_test_of_the_disagreements():
    first = np.array([True] * 9 + [False] * 1 + [True] * 50 + [False] * 40)
    second = np.array([False] * 9 + [True] * 1 + [True] * 50 + [False] * 40)
    assert mcnemar(first, second) == pytest.approx(2 * stats.binom.cdf(1, 10, 0.5))
    assert mcnemar(first, first) == 1.0
    with pytest.raises(InputError, match="one boolean an image"):
        mcnemar(first, second[:-1])
    with pytest.raises(InputError, match="one boolean an image"):
        mcnemar(first.astype(float), second)


def test_two_sigma_is_the_level_of_two_standard_errors():
    assert exceeds(2.0, 0.0, 1.0) == pytest.approx(TWO_SIGMA)
    assert exceeds(3.0, 2.0, 1.0) == pytest.approx(stats.norm.sf(1))
    assert exceeds(0.5, 0.5, 0.0) == 1.0
    assert exceeds(0.6, 0.5, 0.0) == 0.0


@pytest.mark.parametrize(
    ("difference", "more"), [(0.02, False), (0.02 + 0.9e-9, False), (0.02 + 1.1e-9, True), (0.0, False), (-0.5, False)]
)
def test_a_difference_on_the_threshold_is_not_beyond_it(difference, more):
    assert beyond(difference, 0.02) is more
    assert exceeds(difference, 0.02, 0.0) == (0.0 if more else 1.0)
    assert exceeds(difference, 0.02, 0.9e-9) == (0.0 if more else 1.0)  # a spread of rounding is none


def test_a_spread_is_counted_from_rounding_on():
    assert exceeds(1.5e-9, 0.0, 1.5e-9) == pytest.approx(stats.norm.sf(1))
    assert exceeds(-0.1, 0.0, 0.1) == pytest.approx(stats.norm.cdf(1))


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.0, 1.0]])
def test_zero_and_one_are_probabilities(values):
    assert holm(values) == pytest.approx(values)


@pytest.mark.parametrize("values", [[-0.1], [1.1], [0.5, -0.1], [0.5, 1.1], [math.nan]])
def test_what_is_no_probability_is_refused(values):
    with pytest.raises(ConfigError, match="must lie in"):
        holm(values)


def test_one_image_that_differs_tells_nothing():
    one, other = np.array([True, True]), np.array([True, False])
    assert mcnemar(one, other) == mcnemar(other, one) == 1.0
    assert mcnemar([True] * 8, [False] * 8) == pytest.approx(2 * 0.5**8)
    for pair in ((one, other.astype(int)), (one[None], other[None])):
        with pytest.raises(InputError, match="one boolean an image"):
            mcnemar(*pair)


@pytest.mark.parametrize("freedom", [3.0, math.inf])
def test_differences_by_students_distribution(freedom):
    t = stats.t(freedom) if freedom < math.inf else stats.norm
    assert exceeds(0.5, 0.2, 0.1, freedom) == pytest.approx(t.sf(3))
    for difference in (-0.3, 0.3):
        assert equals(difference, 0.2, freedom) == pytest.approx(2 * t.sf(1.5))
    assert equals(0.0, 0.2, freedom) == 1.0 == equals(0.0, 0.0, freedom)
    assert equals(0.1, 0.0, freedom) == 0.0
    assert exceeds(0.2 + least_seen(0.1, freedom), 0.2, 0.1, freedom) == pytest.approx(TWO_SIGMA)
    assert least_seen(0.3) == pytest.approx(0.6)


def test_holm_in_any_order_with_ties():
    assert holm([0.04, 0.01, 0.01, 0.5]) == pytest.approx([0.08, 0.04, 0.04, 0.5])
    assert holm([0.02, 0.0201]) == pytest.approx([0.04, 0.04])  # in order: the larger one is no less


def test_a_corrected_p_value_is_at_most_one():
    assert holm([0.6, 0.9, 0.7]) == [1.0, 1.0, 1.0]
    assert equals(0.0, 0.1) == 1.0
