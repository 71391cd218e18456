"""Check 9's slopes against a transcription of what they are, from passes that are written down beforehand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK
from learn2perturb.diagnosis import draws as module
from learn2perturb.diagnosis.draws import (
    REPLAYED,
    SAME,
    TOLERANCE,
    Slope,
    _rows_differ,
    gradient_slope,
    real,
    row_slope,
    value_slope,
)
from learn2perturb.diagnosis.measure import Bench, Subject
from learn2perturb.engine import execution
from learn2perturb.evaluation.passes import Model

COUNTS = (1, 4, 16)
IMAGES, CLASSES = 3, 4
X = torch.zeros(IMAGES, 1, 1, 1, dtype=torch.float64)


class Script:
    """Logits of one pass after the other, and then the first again."""

    def __init__(self, passes: np.ndarray) -> None:
        self.passes, self.calls = torch.from_numpy(passes), 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.passes[(self.calls - 2) % len(self.passes)]  # the first call asks for the shape only


def draws(passes: int, seed: int = 0) -> np.ndarray:
    """Return passes that are not independent, on a mean that differs between images."""
    noise = np.random.default_rng(seed).normal(size=(passes, IMAGES, CLASSES))
    return noise + 0.3 * np.roll(noise, 1, axis=0) + np.arange(IMAGES)[:, None]


def slopes(passes: np.ndarray) -> np.ndarray:
    """Return each image's slope of log variance, over averages of K successive passes, against log K."""
    logs = []
    for count in COUNTS:
        averages = passes.reshape(len(passes) // count, count, *passes.shape[1:]).mean(axis=1)
        logs.append(np.log(averages.var(axis=0, ddof=1).sum(axis=1)))
    return np.polyfit(np.log(COUNTS), np.array(logs), 1)[0]


@pytest.mark.parametrize("blocks", [3, 11, 12, 13, 30])
def test_the_slope_and_its_jackknife_error_are_their_definitions(blocks):
    passes = draws(16 * blocks)
    found = value_slope(Script(passes), X, 16 * blocks + 15)  # what is no whole block is left alone
    assert found is not None
    assert found.value == pytest.approx(slopes(passes).mean(), abs=1e-9)
    parts = min(12, blocks)
    of = np.repeat(np.arange(parts), np.diff(np.linspace(0, blocks, parts + 1).astype(int)))
    others = np.array([slopes(passes.reshape(blocks, 16, IMAGES, CLASSES)[of != part].reshape(-1, IMAGES, CLASSES))
                       .mean() for part in range(parts)])  # fmt: skip
    error = np.sqrt((parts - 1) / parts * ((others - others.mean()) ** 2).sum())
    assert found.standard_error == pytest.approx(error, rel=1e-6)


def test_too_few_passes_tell_nothing():
    assert value_slope(Script(draws(48)), X, 47) is None
    assert value_slope(Script(draws(48)), X, 48) is not None


@pytest.mark.parametrize(("size", "varies"), [(0.9e-6, False), (1.1e-6, True)])
def test_a_variance_of_a_millionth_of_a_millionth_is_rounding(size, varies):
    """Of one logit that is 1 or nearly so, the others are 0."""
    passes = np.zeros((16 * 64, IMAGES, CLASSES))
    passes[..., 0] = 1 + size * np.where(np.arange(16 * 64) % 2, 1.0, -1.0)[:, None]
    assert (value_slope(Script(passes), X, 16 * 64) is not None) is varies


def test_images_that_do_not_vary_are_left_out_of_the_mean():
    passes = draws(16 * 20)
    passes[:, 1] = 5.0
    found = value_slope(Script(passes), X, 16 * 20)
    assert found is not None
    assert found.value == pytest.approx(slopes(passes[:, [0, 2]]).mean(), abs=1e-9)


def test_draws_that_run_in_a_circle_have_a_steep_slope_and_no_infinite_one():
    cycle = np.array([1.0, -1.0, 2.0, -2.0])
    passes = np.tile(cycle, 4 * 10)[:, None, None] * np.ones((1, IMAGES, CLASSES))
    found = value_slope(Script(passes), X, 160)
    assert found is not None
    floor = np.log(1e-12)
    assert found.value == pytest.approx(np.polyfit(np.log(COUNTS), [0, floor, floor], 1)[0], rel=1e-6)


def test_the_slope_of_gradients_is_of_the_margin_and_independent_draws_have_minus_one():
    def model(x: Tensor) -> Tensor:
        score = (x * (1 + torch.randn_like(x))).flatten(1)
        return torch.cat([score, torch.zeros_like(score)], dim=1)

    found = gradient_slope(model, torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64), 16 * 200)
    assert found is not None
    assert found.value == pytest.approx(-1, abs=3 * found.standard_error)
    assert 0 < found.standard_error < 0.1


@pytest.mark.parametrize("images", [1, 3])
def test_the_slope_of_rows_is_its_definition(images):
    repeats = 7
    logits = np.random.default_rng(1).normal(size=(images, repeats, 16, CLASSES))
    logits += 0.5 * logits[:, :, :1]  # a part of the draw is shared
    answers = iter(torch.from_numpy(logits).flatten(0, 1))

    def model(x: Tensor) -> Tensor:
        assert x.shape == (16, 1, 1, 1)
        return next(answers)

    found = row_slope(model, X[:images], repeats)
    assert found is not None
    expected = []
    for image in logits:
        means = [image.reshape(repeats, 16 // count, count, CLASSES).mean(axis=2) for count in COUNTS]
        variances = [mean.var(axis=0, ddof=1).mean(axis=0).sum() for mean in means]
        expected.append(np.polyfit(np.log(COUNTS), np.log(variances), 1)[0])
    assert found.value == pytest.approx(np.mean(expected))
    error = np.std(expected, ddof=1) / np.sqrt(images) if images > 1 else TOLERANCE
    assert found.standard_error == pytest.approx(error)


def test_rows_that_are_alike_have_no_slope():
    assert row_slope(lambda x: torch.ones(len(x), 2), X, 3) is None


@pytest.mark.parametrize(("size", "differ"), [(0.9e-4, False), (1.1e-4, True), (-1.1e-4, True)])
def test_rows_differ_by_more_than_rounding(size, differ):
    """Logits are 9 at most: a hundred-thousandth of one more than that is rounding."""

    def model(x: Tensor) -> Tensor:
        logits = torch.full((len(x), 2), 9.0, dtype=torch.float64) - torch.tensor([0.0, 3.0], dtype=torch.float64)
        assert x.shape == (16, 1, 1, 1)
        logits[5, 1] += size
        return logits

    assert _rows_differ(model, X) is differ


@pytest.mark.parametrize(
    ("value", "error", "fits"),
    [(-1.1, 0.0, True), (-0.9, 0.0, True), (-0.89, 0.0, False), (-0.7, 0.1, True), (-0.69, 0.1, False),
     (-1.3, 0.1, True), (-1.31, 0.1, False)],
)  # fmt: skip
def test_a_slope_fits_within_a_tenth_and_two_errors(value, error, fits):
    inwards = 1e-12 if value < -1 else -1e-12
    assert Slope(value + inwards, error).fits is fits


@pytest.mark.parametrize(("recurs", "fits"), [(0.001, False), (0.0011, True), (0.5, True)])
def test_of_passes_it_is_decisive_whether_they_resemble_earlier_ones(recurs, fits):
    assert Slope(-3.0, 0.0, recurs).fits is fits  # one order in a thousand


# --- the whole check


def bench(model: Model, *, repeats: int = 8, gradient: bool = True) -> Bench:
    budget = dataclasses.replace(QUICK, images=6, some=6, slope_images=3, slope_repeats=repeats)
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Bench(
        Subject(model, stochastic=True, gradient=gradient), x, torch.arange(6) % 2, PGD(0.1), budget, seed=0,
        mode=execution.PLAIN, batch_size=6, expected_passes=1, progress=None,
    )  # fmt: skip


def plain(x: Tensor) -> Tensor:
    score = x.flatten(1).sum(dim=1, keepdim=True)
    return torch.cat([score, 1 - score], dim=1)


def noisy(x: Tensor) -> Tensor:
    return plain(x * (1 + 0.5 * torch.randn_like(x)))


def test_a_model_that_is_not_said_to_be_random_is_not_asked():
    assert real(bench(plain), claimed=False).does_not_apply.startswith("two calls give the same answer, and nothing")


@pytest.mark.parametrize(("model", "replay", "reason"), [(plain, "", SAME), (plain, "seeded", "seeded"),
                                                         (noisy, "seeded", "seeded")])  # fmt: skip
def test_draws_that_are_missing_or_replayed_are_wrong(model, replay, reason):
    found = real(bench(model), claimed=True, replay=replay)
    assert (found.number, found.wrong) == (9, (f"{reason}: {REPLAYED}",))
    assert found.evidence == {"calls differ": float(model is noisy)}


@pytest.mark.parametrize("gradient", [True, False])
def test_fresh_draws_are_real_by_gradients_and_by_values(gradient):
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return noisy(x)

    found = real(bench(model, gradient=gradient), claimed=True)
    of = "gradient" if gradient else "logits"
    assert found.evidence["rows differ"] == 1.0
    assert found.evidence[f"slope of {of}"] == pytest.approx(-1, abs=0.3)
    assert found.wrong == ()
    # Three images, in 16 passes for each of 8 repeats; and 16 copies, 8 times, of each.
    assert 128 <= sizes.count(3) <= 128 + 10
    assert sizes.count(16) == 1 + 8 * 3


def test_one_repetition_tells_nothing_of_rows_and_too_few_nothing_of_passes():
    found = real(bench(noisy, repeats=1), claimed=True)
    assert set(found.evidence) == {"calls differ", "rows differ"}
    assert found.not_shown
    assert "slope of rows of a batch" in real(bench(noisy, repeats=2), claimed=True).evidence


def test_draws_that_a_batch_shares_are_a_note():
    def shared(x: Tensor) -> Tensor:
        return plain(x * (1 + 0.5 * torch.randn(x.shape[1:])))

    found = real(bench(shared), claimed=True)
    assert found.evidence["rows differ"] == 0.0
    assert len(found.notes) == 1
    assert "slope of rows of a batch" not in found.evidence


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    ("seen", "fails", "asked"),
    [([0.5], False, 1), ([1 / 1001, 0.5], False, 2), ([1 / 1001, 0.011], False, 2), ([1 / 1001, 0.01], True, 2),
     ([1 / 1001, 1 / 1001], True, 2)],
)  # fmt: skip
def test_draws_that_come_again_must_do_so_twice(gradient, seen, fails, asked, monkeypatch):
    values, streams = list(seen), []

    def measured(*_: object) -> Slope:
        streams.append(torch.initial_seed())
        return Slope(-1.0, 0.01, values.pop(0))

    monkeypatch.setattr(module, "gradient_slope" if gradient else "value_slope", measured)
    found = real(bench(noisy, gradient=gradient), claimed=True)
    assert bool(found.wrong) is fails
    assert len(streams) == len(set(streams)) == asked, "each on passes of its own"
    assert not fails or "1000 other orders, new passes as well" in found.wrong[0]


def test_a_pool_that_is_run_through_is_caught_twice():
    pool, calls = torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(3)), iter(range(100_000))

    def pooled(x: Tensor) -> Tensor:
        torch.rand(1)  # so that the global generator is seen to move
        return plain(x * (1 + 0.5 * pool[next(calls) % len(pool)]))

    assert "draws come again" in real(bench(pooled), claimed=True).wrong[0]
