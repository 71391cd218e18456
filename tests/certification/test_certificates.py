"""Certified radii against transcriptions of their formulas and a case in which the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from learn2perturb.certification.bounds import (
    gaussian_dp_radius,
    gaussian_radius,
    laplace_radius,
    pixeldp_radius,
    vote_bounds,
)
from learn2perturb.errors import ConfigError

# The two closest pairs have their best delta at the least one of the grid, and between two of its coarse steps.
PAIRS = [(0.99, 0.01), (0.9, 0.05), (0.7, 0.2), (0.55, 0.45), (0.4, 0.1), (0.5015, 0.4985), (0.503, 0.497),
         (0.999, 0.0), (1.0, 0.0)]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), PAIRS[:-2])
def test_the_tight_radius_is_its_formula(low, high):
    expected = 0.3 / (2 * 1.7) * (stats.norm.ppf(low) - stats.norm.ppf(high))
    assert gaussian_radius(low, high, sigma=0.3, sensitivity=1.7) == pytest.approx(expected)


def test_the_tight_radius_of_a_linear_classifier_is_its_margin():
    """f(x) = sign(w x - b) under noise D x + sigma eps: p = Phi(D m / sigma), so R is the distance m to the plane."""
    margin, sigma, d = 0.8, 0.5, 2.0
    p = stats.norm.cdf(d * margin / sigma)
    assert gaussian_radius(p, 1 - p, sigma=sigma, sensitivity=d) == pytest.approx(margin)


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_the_privacy_radius_is_the_best_over_delta_and_epsilon(low, high):
    """By brute force: L (eps / eps_tr) sqrt(ln(1.25 / delta_tr) / ln(1.25 / delta)), eps bisected for each delta."""
    bound, eps_tr, delta_tr, multiplier = 0.1, 1.0, 0.05, 1.3
    best = 0.0
    for delta in np.arange(0.001, 0.3, 0.0005):
        bottom, top = 0.0, 1.0
        for _ in range(40):
            eps = (bottom + top) / 2
            holds = low >= math.exp(2 * eps) * high + (1 + math.exp(eps)) * delta
            bottom, top = (eps, top) if holds else (bottom, eps)
        size = bound * bottom / eps_tr * math.sqrt(math.log(1.25 / delta_tr) / math.log(1.25 / delta)) / multiplier
        best = max(best, size)
    sigma = bound * math.sqrt(2 * math.log(1.25 / delta_tr)) / eps_tr  # the noise that was made for L, with D = 1
    assert gaussian_dp_radius(low, high, sigma=sigma, sensitivity=multiplier) == pytest.approx(best, abs=1e-9)
    assert gaussian_dp_radius(low, high, sigma=sigma) <= gaussian_radius(low, high, sigma=sigma)


def test_the_laplace_radius_is_its_formula_and_true_in_one_dimension():
    """x + Laplace(b) > 0: for x >= 0, p = 1 - exp(-x/b)/2, and the prediction changes at 0, never before R."""
    b = 0.7
    for x in (0.1, 0.5, 2.0):
        p = 1 - math.exp(-x / b) / 2
        radius = laplace_radius(p, 1 - p, sigma=math.sqrt(2) * b)
        assert radius == pytest.approx(b / 2 * math.log(p / (1 - p)))
        assert 0 < radius <= x
    # The noise is behind a map that stretches the image threefold, so the image may move a third as far.
    assert laplace_radius(0.9, 0.2, sigma=math.sqrt(2) * b, sensitivity=3.0) == pytest.approx(b / 6 * math.log(4.5))


def test_nothing_is_certified_where_the_bounds_cross():
    for rule in ("tight", "dp"):
        radii = pixeldp_radius([0.5, 0.4, 0.0, 1.0], [0.5, 0.6, 1.0, 1.0], sigma=1.0, rule=rule)
        assert radii.tolist() == [0, 0, 0, 0]
    assert laplace_radius([0.3], [0.4], sigma=1.0).tolist() == [0]
    assert laplace_radius([0.3, 0.3, 0.0], [0.3, 0.0, 0.0], sigma=1.0).tolist() == [0, math.inf, 0]
    assert math.isinf(laplace_radius(1.0, 0.0, sigma=1.0))
    assert math.isinf(gaussian_radius(1.0, 0.3, sigma=1.0))


@pytest.mark.parametrize("radius", [pixeldp_radius, gaussian_radius, gaussian_dp_radius, laplace_radius])
def test_noise_on_the_image_itself_has_a_sensitivity_of_one(radius):
    assert radius(0.9, 0.05, sigma=0.5) == radius(0.9, 0.05, sigma=0.5, sensitivity=1.0) > 0


def test_the_rule_and_mechanism_choose():
    arguments = {"sigma": 0.5, "sensitivity": 2.0}
    assert pixeldp_radius(0.9, 0.05, **arguments) == gaussian_radius(0.9, 0.05, **arguments)
    assert pixeldp_radius(0.9, 0.05, rule="dp", **arguments) == gaussian_dp_radius(0.9, 0.05, **arguments)
    assert pixeldp_radius(0.9, 0.05, mechanism="laplace", **arguments) == laplace_radius(0.9, 0.05, **arguments)


def test_vote_bounds_are_clopper_pearson_with_bonferroni():
    counts = np.array([[90, 8, 2], [0, 100, 0]])
    for top, level in ((None, 0.05 / 6), ([0, 1], 0.05 / 3)):
        low, high = vote_bounds(counts, 0.05, top=top)
        first = stats.binomtest(90, 100).proportion_ci(1 - 2 * level, method="exact")
        other = stats.binomtest(8, 100).proportion_ci(1 - 2 * level, method="exact")
        assert (low[0], high[0]) == pytest.approx((first.low, other.high))
        assert low[1] == pytest.approx(level ** (1 / 100))
        assert high[1] == pytest.approx(1 - level ** (1 / 100))
    assert vote_bounds([[90, 8, 2]]) == vote_bounds([[90, 8, 2]], 0.05)
    assert [float(bound[0]) for bound in vote_bounds([[0, 7]], top=[0])] == [0, 1]
    low, high = vote_bounds([[30, 70]], top=[0])  # chosen on other draws, outvoted here: nothing is certified
    assert low[0] < high[0]


def test_vote_bounds_fail_no_more_often_than_alpha():
    generator = np.random.default_rng(0)
    p = np.array([0.45, 0.35, 0.2])
    counts = generator.multinomial(60, p, size=4000)
    low, high = vote_bounds(counts, 0.1)
    top = counts.argmax(1)
    others = np.array([np.delete(p, index).max() for index in top])
    failures = ((low > p[top]) | (high < others)).mean()
    assert failures <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 4000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixeldp_radius(0.9, 0.1, sigma=0.0), "sigma is 0.0"),
        (lambda: pixeldp_radius(0.9, 0.1, sigma=1.0, sensitivity=-1.0), "both must be above 0"),
        (lambda: pixeldp_radius(90, 10, sigma=1.0), "divide votes"),
        (lambda: pixeldp_radius(0.9, 0.1, sigma=1.0, rule="best"), "allowed: tight, dp"),
        (lambda: pixeldp_radius(0.9, 0.1, sigma=1.0, mechanism="uniform"), "gaussian, laplace"),
        (lambda: gaussian_radius(0.9, 0.1, sigma=1.0, sensitivity=0.0), "sensitivity 0.0; both must be above 0"),
        (lambda: gaussian_dp_radius(0.9, 0.1, sigma=-1.0), "sigma is -1.0"),
        (lambda: laplace_radius(0.9, 0.1, sigma=math.nan), "sigma is nan"),
        (lambda: gaussian_radius(1.1, 0.1, sigma=1.0), "must be probabilities"),
        (lambda: gaussian_radius(-0.1, 0.1, sigma=1.0), "must be probabilities"),
        (lambda: gaussian_radius(0.9, 1.1, sigma=1.0), "must be probabilities"),
        (lambda: gaussian_radius(0.9, -0.1, sigma=1.0), "must be probabilities"),
        (lambda: gaussian_radius([0.9, 0.9], [0.1, 1.1], sigma=1.0), "must be probabilities"),
        (lambda: vote_bounds([3, 4]), "classes >= 2"),
        (lambda: vote_bounds([[3], [4]]), "classes >= 2"),
        (lambda: vote_bounds([[3, -1]]), "classes >= 2"),
        (lambda: vote_bounds([[[3, 4]]]), "classes >= 2"),
        (lambda: vote_bounds([[0, 0]]), "at least one"),
        (lambda: vote_bounds([[3, 4], [0, 0]]), "at least one"),
        (lambda: vote_bounds([[3, 4]], 0.0), "alpha is 0.0"),
        (lambda: vote_bounds([[3, 4]], 1.0), "alpha is 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
