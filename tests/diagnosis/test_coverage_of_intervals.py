"""How often the intervals hold the truth, by simulation: draws for each image, for each pass, rare members, none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from learn2perturb.diagnosis.verdict import Draft, Statement, judge
from learn2perturb.errors import InputError
from learn2perturb.evaluation import compare, evaluate
from learn2perturb.evaluation.intervals import (
    ONE_DRAW,
    Interval,
    Scores,
    accuracy_interval,
    bootstrap_mean,
    paired_difference,
    passes_of,
    wilson,
)
from learn2perturb.evaluation.significance import TWO_SIGMA, exceeds

BATCH = 256  # of evaluate
KINDS = ("none", "image", "pass", "rare")


def tables(kind: str, scorings: int, n: int, batch: int, rng: np.random.Generator, count: int = 1) -> list[Scores]:
    """Return ``count`` models with draws of their own, scored on the same images: equally accurate, but not alike."""
    sizes = passes_of(n, batch)
    difficulty = rng.normal(0, 1.5, n)
    found = []
    for _ in range(count):
        own = difficulty + rng.normal(0, 0.7, n)
        if kind == "image":
            own = own + rng.normal(0, 1, (scorings, n))
        elif kind == "pass":
            own = own + np.repeat(rng.normal(0, 0.2, (scorings, len(sizes))), sizes, axis=1)
        elif kind == "rare":  # one member in ten passes, which is about 11 points worse
            own = own - 0.5 * np.repeat(rng.random((scorings, len(sizes))) < 0.1, sizes, axis=1)
        right = np.broadcast_to(own > 0, (scorings, n))
        found.append(Scores(right, sizes, random=kind != "none"))
    return found


def truth(kind: str) -> float:
    """Return the mean accuracy over images and draws."""
    from scipy.stats import norm

    spread = (1.5**2 + 0.7**2 + {"image": 1.0, "pass": 0.04}.get(kind, 0.0)) ** 0.5
    rare = float(norm.cdf(-0.5 / spread))
    return 0.9 * 0.5 + 0.1 * rare if kind == "rare" else float(norm.cdf(0 / spread))


def holds(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def coverage(kind: str, scorings: int, n: int, batch: int, trials: int) -> tuple[float, float, float]:
    """Return how often the interval of the accuracy holds, that of a difference, and a false alarm is raised."""
    rng = np.random.default_rng([scorings, n, batch, KINDS.index(kind)])
    mean = truth(kind)
    inside = paired = alarms = 0
    for _ in range(trials):
        one, other = tables(kind, scorings, n, batch, rng, 2)
        inside += holds(accuracy_interval(one), mean)
        found = paired_difference(one, other)
        paired += holds(found.interval, 0.0)
        alarms += exceeds(found.mean, 0.0, found.standard_error, found.freedom) < TWO_SIGMA
    return inside / trials, paired / trials, alarms / trials


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scorings", "n", "batch"), [(5, 200, 200), (10, 200, 200), (10, 600, BATCH)])
def test_intervals_hold_as_often_as_they_say(kind, scorings, n, batch):
    inside, paired, alarms = coverage(kind, scorings, n, batch, 300)
    assert 0.915 <= inside <= 0.985  # three deviations of 300 trials around 93 and 97 % are more
    assert 0.915 <= paired <= 0.985
    assert alarms <= TWO_SIGMA + 3 * (TWO_SIGMA / 300) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scorings", [5, 10, 30])
@pytest.mark.parametrize(("n", "batch"), [(200, 200), (200, 50), (1000, BATCH)])
def test_coverage_is_93_to_97_per_cent(kind, scorings, n, batch):
    inside, paired, alarms = coverage(kind, scorings, n, batch, 2000)
    assert 0.93 <= inside <= 0.97
    assert 0.93 <= paired <= 0.975
    assert 0.01 <= alarms <= 0.035


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["image", "pass"])
def test_few_draws_are_honest(kind):
    """One scoring in four passes, or two of one: wider than needed, hardly ever narrower."""
    for scorings, n, batch in ((1, 1000, 250), (1, 1000, 100), (2, 200, 200), (3, 1000, 1000)):
        inside, paired, _ = coverage(kind, scorings, n, batch, 1000)
        assert min(inside, paired) >= 0.93


def shared(scorings: int, n: int, spread: float, seed: int = 0) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, n) + rng.normal(0, spread, (scorings, 1)) > 0


def test_shared_draws_widen_what_a_bootstrap_over_images_gave():
    correct = shared(10, 1000, 0.5)
    before = bootstrap_mean(correct.mean(axis=0)).interval
    now = accuracy_interval(correct)
    assert now.high - now.low > 2 * (before.high - before.low)


def test_a_model_without_noise_has_wilsons_interval_exactly():
    correct = shared(1, 400, 0.0)
    plain = wilson(int(correct.sum()), 400)
    for scorings in (1, 7):
        for passes in ((), (256, 144), (40,) * 10):
            assert accuracy_interval(Scores(correct.repeat(scorings, axis=0), passes)) == plain


def test_where_nothing_varies_the_interval_is_a_point():
    turned = (np.arange(10)[:, None] + np.arange(10)) % 10 < 3  # each image and each scoring has three in ten
    found = accuracy_interval(turned)
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))


def test_passes_that_are_not_known_count_as_one():
    correct = shared(10, 1000, 0.3)
    assert accuracy_interval(correct) == accuracy_interval(Scores(correct, (1000,), random=True))
    with pytest.raises(InputError, match="passes of"):
        Scores(correct, (400, 400))


@pytest.mark.parametrize("passes", [(), (500,), (256, 244), (167, 167, 166)])
def test_one_scoring_of_few_passes_says_what_it_does_not_know(passes):
    correct = shared(1, 500, 0.5)
    found = accuracy_interval(Scores(correct, passes, random=True))
    assert (found.low, found.high) == (wilson(int(correct.sum()), 500).low, wilson(int(correct.sum()), 500).high)
    assert found.note == paired_difference(Scores(correct, passes, True), 0.5).interval.note == ONE_DRAW
    assert accuracy_interval(Scores(correct, passes, random=False)).note == ""
    assert accuracy_interval(Scores(correct.repeat(2, axis=0) & shared(2, 500, 0.5), passes, random=True)).note == ""


def test_one_scoring_of_many_passes_is_told_by_their_differences():
    rng = np.random.default_rng(0)
    own = rng.normal(0, 1.5, 1000)
    alike, drawn = own > 0, own + np.repeat(rng.normal(0, 0.8, 10), 100) > 0
    widths = []
    for right in (alike, drawn):
        found = accuracy_interval(Scores(right[None], (100,) * 10, random=True))
        assert (found.method, found.note) == ("two-way", "")
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("scorings", [1, 2, 5])
def test_equal_images_of_passes_of_one_have_an_interval(scorings):
    """What all images have in common varies in no direction: no quantile of no degrees of freedom."""
    turned = (np.arange(scorings)[:, None] + np.arange(10 * scorings)) % max(scorings, 2) < 1
    scores = Scores(turned, (1,) * turned.shape[1], random=True)
    for found in (accuracy_interval(scores), paired_difference(scores, scores).interval):
        assert found.low <= found.high


def test_the_first_images_keep_their_passes():
    scores = Scores(shared(3, 10, 0.5), (4, 4, 2), random=True)
    assert [scores.first(n).batches for n in (3, 4, 9, 10)] == [(3,), (4,), (4, 4, 1), (4, 4, 2)]
    assert passes_of(10, 4) == (4, 4, 2)


def by_pass(x: Tensor) -> Tensor:
    score = x.flatten(1).mean(dim=1) - 0.5 + 0.1 * torch.randn(1)
    return torch.stack([score, torch.zeros(len(x))], dim=1)


IMAGES = torch.rand(300, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(300, dtype=torch.int64)


def test_evaluate_knows_which_images_shared_a_pass():
    found = evaluate(by_pass, IMAGES, draws=6, batch_size=128)
    row = found.row("clean")
    assert found.batches is not None
    assert found.batches.unpack().tolist() == [128, 128, 44]
    scores = found.scores(row)
    assert row.interval == accuracy_interval(scores)
    old = bootstrap_mean(scores.per_image).interval
    assert row.interval.high - row.interval.low > 1.5 * (old.high - old.low)
    one = evaluate(by_pass, IMAGES, draws=1, batch_size=300)
    assert one.row("clean").interval.note == ONE_DRAW
    assert ONE_DRAW in str(one)


def test_two_evaluations_of_one_random_model_are_not_told_apart():
    one, other = (evaluate(by_pass, IMAGES, draws=5, batch_size=300, seed=seed) for seed in (0, 1))
    found = compare(one, other).differences[0]
    assert found.test == "t"
    assert "neither" in found.sentence
    assert found.mcnemar < 0.05 < found.decided  # one draw of each is told apart: they are two networks


def test_a_claim_of_equal_models_with_shared_draws_seldom_fails():
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(200):
        one, other = tables("pass", 10, 200, 200, rng, 2)
        check = judge([Draft(1, "good", (Statement("text", "broken", one, other),))])[0]
        failures += check.status == "failed"
        assert check.claims[0].freedom > 1
    assert failures <= 12
