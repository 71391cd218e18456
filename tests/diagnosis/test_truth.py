"""Check 10: gradients of the function itself, and of something else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK, diagnose, truth
from learn2perturb.diagnosis.measure import Attacked, Bench, Subject
from learn2perturb.diagnosis.truth import Ratios, _quantiles, averaged_ratios, ratios, true_gradient, truth_of
from learn2perturb.diagnosis.verdict import judge
from learn2perturb.engine import execution
from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.evaluation.passes import Model

BUDGET = dataclasses.replace(QUICK, name="few", images=24, some=24, scorings=2, eot=1, sweep_eot=1)


def network(seed: int) -> nn.Module:
    with isolated_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


NETWORK, OTHER = network(0), network(1)


def noisy(x: Tensor) -> Tensor:
    return NETWORK(x + 0.3 * torch.randn_like(x))


def noisy_for_a_batch(x: Tensor) -> Tensor:
    return NETWORK(x + 0.3 * torch.randn(x.shape[1:]))


def clipped(x: Tensor) -> Tensor:
    return NETWORK(x.clamp(0, 1))


def rounded(x: Tensor) -> Tensor:
    return NETWORK(torch.round(x * 7) / 7)


def straight_through(x: Tensor) -> Tensor:
    return NETWORK(x + (torch.round(x * 7) / 7 - x).detach())


def of_another(x: Tensor) -> Tensor:
    shown = OTHER(x)
    return shown + (NETWORK(x) - shown).detach()


def bench_of(model: Model, *, stochastic: bool = False) -> Bench:
    generator = torch.Generator().manual_seed(0)
    # Many pixels at both ends of the box, as real images have.
    x = torch.rand(24, 1, 4, 4, generator=generator).mul_(2).sub_(0.5).clamp_(0, 1)
    with torch.no_grad():
        y = NETWORK(x).argmax(dim=1)
    return Bench(
        Subject(model, stochastic), x, y, PGD(0.1, 0.05, 3), BUDGET, seed=0, mode=execution.PLAIN, batch_size=10,
        expected_passes=1, progress=None,
    )  # fmt: skip


@pytest.mark.parametrize("model", [NETWORK, clipped, noisy, noisy_for_a_batch])
def test_the_gradient_of_an_honest_network_is_its_own(model):
    found = ratios(bench_of(model, stochastic=model in (noisy, noisy_for_a_batch)))
    assert found.median == pytest.approx(1, abs=0.01)
    assert 0.9 < found.low <= found.high < 1.1
    assert found.none == 0
    assert found.near


@pytest.mark.parametrize("model", [rounded, straight_through, of_another])
def test_the_gradient_of_something_else_is_not(model):
    found = ratios(bench_of(model))
    assert not found.near
    assert found.none == (model is rounded)


def finely_rounded(x: Tensor) -> Tensor:
    """A straight-through staircase of steps of 1/31, of which a ball of radius 0.1 holds some."""
    return NETWORK(x + (torch.round(x * 31) / 31 - x).detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("model", "leads"),
    [(finely_rounded, True), (rounded, False), (of_another, False)],
)
def test_a_staircase_has_the_gradient_of_its_slope_and_nothing_else_has(model, leads, norm):
    bench = bench_of(model)
    bench.attack = PGD(0.1 if norm == "linf" else 0.3, 0.05, 3, norm=norm)
    found = truth_of(bench)
    assert not found.near
    assert found.leads is leads, found


def test_an_honest_network_is_true_over_neighbourhoods_as_well():
    for model in (NETWORK, clipped, noisy):
        assert averaged_ratios(bench_of(model, stochastic=model is noisy)).near


@pytest.mark.parametrize(
    ("median", "low", "high", "near"),
    [
        (0.91, 0.76, 1.24, True),
        (1.09, 0.76, 1.24, True),
        (0.89, 0.76, 1.24, False),
        (1.11, 0.76, 1.24, False),
        (1.0, 0.74, 1.24, False),
        (1.0, 0.76, 1.26, False),
    ],
)
def test_a_tenth_off_the_median_and_a_quarter_off_the_quantiles(median, low, high, near):
    assert Ratios(median, low, high, 0.0).near is near


def diagnosed(model: Model, *, left: float = 0.0, rivals: float | None = None):
    """``left`` by the gradients, ``rivals`` by Square and a source, on 24 images; None is as much."""
    bench = bench_of(model)

    def leaving(share: float) -> Attacked:
        right = torch.zeros(2, 24, dtype=torch.bool).numpy()
        right[:, : round(24 * share)] = True
        return Attacked("canned", bench.x, Scores(right))

    other = leaving(left if rivals is None else rivals)
    draft = true_gradient(bench, truth_of(bench), leaving(left), {"Square": other, "transfer from twin": other})
    return judge([draft])[0], bench


def test_a_true_gradient_passes_without_another_attack():
    check, bench = diagnosed(NETWORK)
    assert check.status == "passed"
    assert not bench.measurements


def test_another_gradient_is_no_failure_but_needs_attacks_without():
    check, bench = diagnosed(straight_through)
    assert check.status == "passed"
    assert "attacks by gradients says little" in check.notes[0]
    assert bench.rivals["descent on values"] == check.evidence["descent on values"]
    assert {"Square", "transfer from twin"} <= set(check.evidence)


@pytest.mark.parametrize(("rivals", "status"), [(0.5, "passed"), (11 / 24, "not shown")])
def test_what_may_be_stronger_than_false_gradients_is_not_shown(rivals, status, monkeypatch):
    monkeypatch.setattr(truth, "descent", lambda bench, _: Attacked("d", bench.x, Scores(np.arange(24)[None] < 12)))
    check, _ = diagnosed(straight_through, left=0.5, rivals=rivals)
    assert check.status == status
    assert ("Square and transfer from twin may be stronger" in check.sentence) == (status == "not shown")


def test_a_gradient_that_is_worth_less_than_none_fails():
    check, _ = diagnosed(rounded, left=1.0)
    assert check.status == "failed"
    assert "worth less than none" in check.sentence


@pytest.mark.parametrize(("model", "staircase"), [(finely_rounded, True), (of_another, False)])
def test_rivals_of_a_staircase_are_held_against_its_best_descent(model, staircase):
    """One descent ends on a stair by luck; a search that keeps its best point is ahead of it, and of no better one."""
    bench = bench_of(model)
    budget = dataclasses.replace(
        BUDGET, steps=3, unbounded_steps=3, samples=4, judge_draws=2, eps_grid=(0.1, 0.5), draw_curve=(1, 4),
        step_curve=(2, 4), restarts=4, square_queries=5, real_queries=20, descent_steps=2, descent_directions=2,
        surrogate_queries=24,
    )  # fmt: skip
    found = diagnose(
        model, (bench.x, bench.y), budget=budget, attack=PGD(0.1, 0.05, 3), engine="plain", progress=False
    )  # fmt: skip
    names = {one.name for one in found.measurements}
    assert ("best by gradients" in names) is staircase
    own = found.measurement("best by gradients" if staircase else "reported").accuracy
    assert found.check(2).evidence["white-box"] == own
    assert ("a staircase" in found.check(10).sentence) is staircase
    if staircase:
        parts = [one.accuracy for one in found.measurements if one.name.startswith("4 restarts by")]
        assert len(parts) == 2
        assert own <= min(*parts, found.measurement("reported").accuracy)


def test_ratios_are_the_median_and_the_tenths_at_both_ends_of_all_draws():
    parts = torch.arange(101.0)[torch.randperm(101)]
    assert _quantiles([(parts[:60], 5), (parts[60:], 10)]) == Ratios(50.0, 10.0, 90.0, 15 / 101)
