"""The two-way variance of accuracies and of their differences, written again from its formulas with plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.intervals import (
    ONE_DRAW,
    Interval,
    Scores,
    accuracy_interval,
    follows,
    majority,
    mean_and_std,
    paired_difference,
    passes_of,
    worst_of,
)


def draws_of(scores):
    """(variance by the sums of the passes, its shared part, degrees of freedom, whether few), or None."""
    table = [list(map(float, row)) for row in scores.correct]
    scorings, n = len(table), len(table[0])
    sizes = scores.batches or (n,)
    passes, start = [], 0
    for size in sizes:
        passes.append(range(start, start + size))
        start += size
    effective = sum(size**2 for size in sizes) ** 2 / sum(size**4 for size in sizes)
    if scorings > 1:
        means = [sum(row[i] for row in table) / scorings for i in range(n)]
        freedom, factor = (scorings - 1) * effective, scorings / (scorings - 1)
    else:
        means = [sum(table[0]) / n] * n
        freedom = effective * (1 - 1 / len(sizes))
        if not scores.random or freedom < 2.7:
            return None
        shares = [size / n for size in sizes]  # what a pass and the mean of all have in common is taken out
        squares = sum(size**2 for size in sizes)
        kept = sum(
            sum(((b == c) - shares[b]) ** 2 * sizes[c] ** 2 for c in range(len(sizes))) for b in range(len(sizes))
        )
        factor = squares / kept
    sums = own = 0.0
    for row in table:
        for images in passes:
            rest = [row[i] - means[i] for i in images]
            sums += round(sum(rest), 12) ** 2
            own += sum(value**2 for value in rest)
    if scorings > 1 and own < 1e-12:
        return None
    scale = factor / (scorings * n) ** 2
    few = scorings == 1 or freedom < 4
    return scale * sums, scale * (sums - own) if sums - own > 1e-9 else 0.0, freedom, few


def total_of(images, draws):
    def freedom_of(total, parts):
        error = sum(variance**2 / freedom for variance, freedom in parts)
        if error == 0 or total == 0:
            return math.inf
        return max(total**2 / error, min(freedom for _, freedom in parts))

    whole = images + sum(shared for _, shared, _, _ in draws)
    found = [(whole, freedom_of(whole, [(d[0] if d[3] else d[1], d[2]) for d in draws]))]
    few = [d for d in draws if d[3]]
    if few:
        alone = sum(d[0] for d in few)
        found.append((alone, freedom_of(alone, [(d[0], d[2]) for d in few])))
    return max(found, key=lambda one: stats.t.ppf(0.975, one[1]) * one[0] ** 0.5)


def solved(mean, total, t):
    """The ends p of Wilson's interval, where (mean - p)^2 = t^2 total p (1 - p) / (mean (1 - mean))."""
    w = t * t * total / (mean * (1 - mean))
    return np.sort(np.roots([1 + w, -2 * mean - w, mean**2]).real)


def table(seed, scorings, sizes, *, shared=0.3, random=True):
    """Scores in which the images of a pass share some of their luck."""
    generator = np.random.default_rng(seed)
    luck = np.repeat(generator.normal(size=(scorings, len(sizes))), sizes, axis=1)
    ease = generator.normal(0.4, 1, size=sum(sizes))
    return Scores(ease + shared * luck + 0.5 * generator.normal(size=luck.shape) > 0, tuple(sizes), random)


CASES = [
    (2, (6, 6)), (3, (12,)), (5, (12,)), (4, (5, 5, 2)), (6, (4,) * 5), (2, (1,) * 12), (8, (30,)), (3, (7, 3)),
    (1, (6,) * 6), (1, (4,) * 4), (1, (5, 5, 5, 5, 3)), (1, (9, 5, 5, 5)), (5, (12, 12)), (2, (3,) * 4), (4, (9, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("scorings", "sizes"), CASES)
def test_an_interval_is_wilsons_with_the_variance_over_images_and_draws(scorings, sizes):
    for seed, confidence, shared in itertools.product(range(4), (0.95, 0.8), (0.2, 2.0)):
        scores = table(seed, scorings, sizes, shared=shared)
        found, mean = accuracy_interval(scores, confidence=confidence), float(scores.correct.mean())
        draws = draws_of(scores)
        if draws is None or mean in (0, 1):
            assert found.method == "wilson"
            continue
        images = float(sum((p - mean) ** 2 for p in scores.correct.mean(axis=0))) / scores.n**2
        total, freedom = total_of(images, [draws])
        low, high = solved(mean, total, stats.t.ppf((1 + confidence) / 2, freedom))
        assert (found.method, found.confidence, found.note, found.resamples) == ("two-way", confidence, "", 0)
        assert (found.low, found.high) == pytest.approx((max(low, 0), min(high, 1)), abs=1e-9)
        assert found.freedom == pytest.approx(freedom)
        assert found.quantile == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom))


@pytest.mark.parametrize(("scorings", "sizes"), CASES)
@pytest.mark.parametrize("against", [0.5, (1, (6,) * 6), (3, (8, 4)), None])
def test_a_difference_has_the_variances_of_both_sides(scorings, sizes, against):
    n = sum(sizes)
    for seed in range(3):
        first = table(seed, scorings, sizes)
        if isinstance(against, float):
            second, tables, other = against, [first], np.full(n, against)
        elif against is None:  # a fixed function
            second = table(seed + 9, 1, (n,), random=False)
            tables, other = [first, second], second.correct.mean(axis=0)
        else:
            count, parts = against
            parts = (*parts, n - sum(parts)) if sum(parts) < n else (n,)
            second = table(seed + 9, count, parts)
            tables, other = [first, second], second.correct.mean(axis=0)
        values = first.correct.mean(axis=0) - other
        mean = float(values.mean())
        draws = [part for part in map(draws_of, tables) if part is not None]
        total, freedom = total_of(float(values.var(ddof=1)) / n, draws)
        found = paired_difference(first, second, confidence=0.9)
        assert (found.mean, found.standard_error, found.freedom) == pytest.approx((mean, total**0.5, freedom))
        if not draws and len(tables) == 2:
            # Bonett and Price: one image more on either side.
            more = np.concatenate([values, [1, -1]])
            centre, half = float(more.mean()), stats.norm.ppf(0.95) * float(more.std()) / len(more) ** 0.5
        else:
            centre, half = mean, stats.t.ppf(0.95, freedom) * total**0.5
        interval = found.interval
        assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half))
        unknown = any(one.random and len(one.correct) == 1 and draws_of(one) is None for one in tables)
        assert (interval.method, interval.confidence) == ("two-way", 0.9)
        assert interval.note == (ONE_DRAW if unknown else "")


def test_the_freedom_that_a_single_scoring_must_have():
    """Four equal passes have three; by the fourth powers of unequal sizes, less."""
    for sizes, known in (((10,) * 3, False), ((10,) * 4, True), ((10, 10, 10, 7), True), ((10, 10, 10, 5), False)):
        effective = sum(s**2 for s in sizes) ** 2 / sum(s**4 for s in sizes) * (1 - 1 / len(sizes))
        assert (effective >= 2.7) is known, effective
        scores = table(0, 1, sizes)
        assert accuracy_interval(scores).method == ("two-way" if known else "wilson")
        assert accuracy_interval(scores).note == ("" if known else ONE_DRAW)
        assert accuracy_interval(Scores(scores.correct, sizes, False)).note == ""
    assert accuracy_interval(np.array([[True, False]])) == accuracy_interval(Scores(np.array([[True, False]])))


def test_scores_of_alike_scorings_and_of_all_right_are_wilsons():
    row = np.array([[True, False, True, True]])
    alike = accuracy_interval(Scores(np.repeat(row, 3, axis=0), (2, 2), True))
    assert alike == accuracy_interval(Scores(row)) and alike.method == "wilson"
    for value in (False, True):
        for scorings in (1, 3):
            every = accuracy_interval(Scores(np.full((scorings, 8), value), (2,) * 4, True))
            assert every.method == "wilson" and (every.high if value else 1 - every.low) == 1.0


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9, 12, 20])
def test_the_first_images_keep_the_passes_that_they_were_in(n):
    scores = table(1, 2, (4, 5, 3))
    first = scores.first(n)
    assert first.correct.shape == (2, min(n, 12)) and first.random
    assert first.batches == {1: (1,), 3: (3,), 4: (4,), 5: (4, 1), 9: (4, 5)}.get(n, (4, 5, 3))
    assert Scores(scores.correct).first(n).batches == ()


@pytest.mark.parametrize(("n", "size", "expected"), [(10, 4, (4, 4, 2)), (8, 4, (4, 4)), (3, 4, (3,)), (0, 4, ())])
def test_passes_are_of_the_batch_size_but_the_last(n, size, expected):
    assert passes_of(n, size) == expected


@pytest.mark.parametrize("shape", [(4,), (1, 0), (0, 4), (1, 2, 2)])
def test_scores_are_a_table(shape):
    with pytest.raises(InputError, match="correct has shape"):
        Scores(np.ones(shape, dtype=bool))


@pytest.mark.parametrize("batches", [(3,), (5,), (4, 0), (2, 2, 1), (5, -1)])
def test_passes_have_all_images(batches):
    with pytest.raises(InputError, match="passes of"):
        Scores(np.ones((1, 4), dtype=bool), batches)
    assert Scores(np.ones((1, 4), dtype=bool), (1, 3)).n == 4


@pytest.mark.parametrize("n", range(1, 5))
def test_the_worst_of_n_draws_is_the_mean_over_all_choices(n):
    correct = np.random.default_rng(3).random((4, 30)) < 0.7
    every = [correct[list(rows)].all(axis=0).mean() for rows in itertools.combinations(range(4), n)]
    assert worst_of(correct, n) == pytest.approx(np.mean(every))
    for outside in (0, 5):
        with pytest.raises(ConfigError, match="worst of"):
            worst_of(correct, outside)


def test_mean_deviation_and_votes():
    correct = np.array([[True, True, False, False], [True, False, False, False]])
    assert mean_and_std(correct) == pytest.approx((0.375, np.std([0.5, 0.25], ddof=1)))
    assert mean_and_std(correct[:1]) == (0.5, None)
    predictions = np.array([[0, 2, 1], [1, 2, 0], [1, 0, 2]])
    assert majority(predictions, 3).tolist() == [1, 2, 0]
    assert majority(predictions[:, ::-1].astype(np.uint8), 3).tolist() == [0, 2, 1]


@pytest.mark.parametrize("changed", ["low", "high"])
def test_an_interval_follows_from_its_scores_or_does_not(changed):
    for scores in (table(2, 3, (6, 6)), table(2, 1, (12,)), table(2, 1, (5,) * 5)):
        found = accuracy_interval(scores)
        assert follows(found, scores, seed=0)
        for move, same in ((5e-10, True), (2e-9, False), (-2e-9, False)):
            ends = {"low": found.low, "high": found.high}
            ends[changed] += move
            moved = Interval(
                **ends, confidence=found.confidence, method=found.method, note=found.note, freedom=found.freedom
            )
            assert follows(moved, scores, seed=0) is same


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 1.5])
def test_a_confidence_is_between_0_and_1(confidence):
    for ask in (accuracy_interval, lambda one, confidence: paired_difference(one, 0.5, confidence=confidence)):
        with pytest.raises(ConfigError, match="confidence is"):
            ask(table(0, 2, (4,)), confidence=confidence)
    with pytest.raises(InputError, match="first has 4 images, second 5"):
        paired_difference(table(0, 2, (4,)), table(0, 2, (5,)))
