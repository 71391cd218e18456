from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.intervals import (
    Interval,
    Scores,
    _over_draws,
    accuracy_interval,
    bootstrap_mean,
    majority,
    mean_and_std,
    paired_bootstrap,
    paired_difference,
    wilson,
    worst_of,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (512, 1000), (9999, 10000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_the_formula(k: int, n: int, confidence: float) -> None:
    z, p = stats.norm.ppf((1 + confidence) / 2), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = wilson(k, n, confidence)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert interval.method == "wilson"


def test_wilson_known_value() -> None:
    interval = wilson(8, 10)  # Brown, Cai, DasGupta 2001: 0.490 to 0.943
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.490, 0.943)


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)]
)
def test_wilson_bad_input(k, n, confidence) -> None:
    with pytest.raises(ConfigError):
        wilson(k, n, confidence)


def test_bootstrap_agrees_with_scipy_and_with_the_standard_error() -> None:
    values = np.random.default_rng(0).integers(0, 11, 300) / 10
    ours = bootstrap_mean(values, resamples=20000, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, batch=1000, method="percentile", rng=2)
    interval = theirs.confidence_interval
    assert (ours.interval.low, ours.interval.high) == pytest.approx((interval.low, interval.high), abs=0.002)
    assert ours.standard_error == pytest.approx(values.std() / np.sqrt(300), rel=0.03)
    assert ours.mean == values.mean()


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        p = generator.beta(2, 2, 200)  # images of different difficulty: the true mean accuracy is 1/2
        interval = bootstrap_mean(generator.binomial(10, p) / 10, seed=trial).interval
        hits += interval.low <= 0.5 <= interval.high
    assert 0.91 <= hits / 200 <= 0.99


def test_bootstrap_is_a_function_of_its_seed_and_of_nothing_else() -> None:
    values = np.random.default_rng(0).random(50)
    before = np.random.get_state()[1].copy()
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_bootstrap_memory_is_bounded_for_distinct_values() -> None:
    values = np.random.default_rng(0).random(20000)  # all resamples at once would take 2000 x 20000 x 8 = 320 MB
    tracemalloc.start()
    bootstrap_mean(values, resamples=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_paired_bootstrap_uses_the_pairing() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(500)
    difference = paired_bootstrap(base + 0.01, base)
    assert difference.mean == pytest.approx(0.01)
    assert difference.standard_error < 1e-9
    assert difference.interval.low == pytest.approx(0.01)
    with pytest.raises(InputError, match="same ones"):
        paired_bootstrap(base, base[1:])


@pytest.mark.parametrize("values", [[], [[0.5]], [float("nan")], 0.5])
def test_bootstrap_bad_values(values) -> None:
    with pytest.raises(InputError):
        bootstrap_mean(values)


def test_bootstrap_bad_settings() -> None:
    with pytest.raises(ConfigError, match="resamples"):
        bootstrap_mean([0.5], resamples=0)
    with pytest.raises(ConfigError, match="confidence"):
        bootstrap_mean([0.5], confidence=95)


def test_one_resample_is_a_point_without_an_error() -> None:
    found = bootstrap_mean([0.0, 1.0, 1.0, 1.0], resamples=1)
    assert (found.mean, found.standard_error) == (0.75, 0.0)
    assert found.interval.low == found.interval.high


@pytest.mark.parametrize("resamples", [2, 3])
def test_two_resamples_have_an_error_already(resamples: int) -> None:
    """The interval of two ends at quantiles of two means; their distance gives back the standard deviation."""
    found = bootstrap_mean(np.arange(20.0), resamples, seed=1)
    assert found.standard_error > 0
    if resamples == 2:
        assert (found.interval.high - found.interval.low) / 0.95 == pytest.approx(found.standard_error * 2**0.5)


# Rows are scorings, columns images.
CORRECT = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]], dtype=bool)


def test_mean_and_std_by_hand() -> None:
    mean, std = mean_and_std(CORRECT)
    assert mean == pytest.approx(7 / 12)
    assert std == pytest.approx(np.sqrt(((1 / 2 - 7 / 12) ** 2 * 2 + (3 / 4 - 7 / 12) ** 2) / 2))
    assert mean_and_std(CORRECT[:1]) == (0.5, None)
    assert mean_and_std(CORRECT[1:])[1] == pytest.approx(0.25 / np.sqrt(2))


def test_worst_of_by_hand() -> None:
    # c = 3, 2, 0, 2 of 3: pairs that are all correct 3/3, 1/3, 0, 1/3; triples 1, 0, 0, 0.
    assert worst_of(CORRECT, 1) == pytest.approx(7 / 12)
    assert worst_of(CORRECT, 2) == pytest.approx((1 + 1 / 3 + 0 + 1 / 3) / 4)
    assert worst_of(CORRECT, 3) == pytest.approx(1 / 4)
    for n in (0, 4):
        with pytest.raises(ConfigError, match="worst of"):
            worst_of(CORRECT, n)


def test_majority_breaks_ties_to_the_smallest_class() -> None:
    predictions = np.array([[2, 1, 0, 3], [1, 1, 2, 3], [2, 2, 2, 0], [1, 0, 0, 0]])
    assert majority(predictions, 4).tolist() == [1, 1, 0, 0]


def test_which_interval() -> None:
    assert accuracy_interval(CORRECT[:1]).method == "wilson"
    assert accuracy_interval(CORRECT).method == "two-way"
    never = accuracy_interval(np.zeros((10, 50), dtype=bool))  # a bootstrap of zeros would claim [0, 0]
    assert never == wilson(0, 50)


@pytest.mark.parametrize("resamples", [200, 2000])
@pytest.mark.parametrize("n", [30, 1000])
def test_a_bootstrap_agrees_with_one_that_was_drawn_elsewhere(resamples: int, n: int) -> None:
    values = np.random.default_rng(0).integers(0, 11, n) / 10
    here, *there = (bootstrap_mean(values, resamples, seed).interval for seed in range(40))
    assert len({(interval.low, interval.high) for interval in there}) > 1
    assert all(here.agrees(interval) and interval.agrees(here) for interval in there)


@pytest.mark.parametrize(
    "changed",
    [
        {"low": 0.38},
        {"high": 0.62},
        {"low": 0.42},
        {"high": 0.58},
        {"low": 0.0, "high": 1.0},
        {"method": "wilson", "resamples": 0},
        {"resamples": 200},
        {"confidence": 0.9},
    ],
)
def test_an_interval_of_other_data_does_not_agree(changed) -> None:
    here = {"low": 0.4, "high": 0.6 - 0.05, "confidence": 0.95, "method": "bootstrap", "resamples": 2000}
    assert not Interval(**{**here, **changed}).agrees(Interval(**here))
    assert not Interval(**here).agrees(Interval(**{**here, **changed}))


def test_wilson_agrees_up_to_rounding_only() -> None:
    one = wilson(8, 10)
    assert one.agrees(Interval(one.low + 1e-12, one.high, 0.95, "wilson"))
    assert not one.agrees(Interval(one.low + 1e-6, one.high, 0.95, "wilson"))


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("gained", "lost", "same"), [(5, 1, 14), (0, 0, 30), (3, 3, 1), (7, 0, 0)])
def test_a_paired_difference_of_answers_is_bonett_and_prices(gained, lost, same, confidence):
    """The interval of their paper: of the shares of images that only one of the two has right, each with one more."""
    n = gained + lost + same
    first = Scores(np.array([[True] * gained + [False] * lost + [True] * same]))
    second = Scores(np.array([[False] * gained + [True] * lost + [True] * same]))
    one, other = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = one - other
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((one + other - centre**2) / (n + 2))
    found = paired_difference(first, second, confidence=confidence)
    assert found.mean == pytest.approx((gained - lost) / n)
    assert (found.interval.low, found.interval.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("sizes", [(3,) * 9, (1, 1, 2, 3, 3, 4, 4, 5, 6)])
def test_the_variance_by_the_draws_of_passes_is_right_in_the_mean_from_one_scoring(sizes):
    """Of passes that are right or wrong as a whole, over all that can come out; of passes of unlike sizes as well."""
    n, found = sum(sizes), []
    for right in itertools.product([True, False], repeat=len(sizes)):
        part = _over_draws(Scores(np.repeat(right, sizes)[None], sizes, random=True))
        assert part is not None
        found.append(part.seen)
        squares, fourths = (sum(size**power for size in sizes) for power in (2, 4))
        assert part.freedom == pytest.approx(squares**2 / fourths * (1 - 1 / len(sizes)))
    assert np.mean(found) == pytest.approx(0.25 * sum(size**2 for size in sizes) / n**2)


def test_the_error_of_a_difference_of_two_images_is_that_of_two():
    one, other = np.array([[True, True]]), np.array([[True, False]])
    assert paired_difference(Scores(one), Scores(other)).standard_error == pytest.approx(0.5)
    assert paired_difference(Scores(one), 0.5).standard_error == 0
