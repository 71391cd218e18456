"""Check 8: what varies beside the loss, and a best that is chosen by other draws than it is scored by."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK, decision, diagnose, whitebox
from learn2perturb.diagnosis.measure import Bench, Subject
from learn2perturb.diagnosis.verdict import judge
from learn2perturb.engine import execution
from learn2perturb.evaluation import exact_accuracy
from learn2perturb.models import RandomEnsemble
from tests.problems import two_logits

EPS, N = 0.1, 40
FEW = dataclasses.replace(
    QUICK, name="few", images=N, some=N, scorings=6, eot=4, steps=10, unbounded_steps=10, samples=3, judge_draws=8,
    draw_curve=(1, 4), step_curve=(2, 4), restarts=2, square_queries=5, square_draws=1, slope_images=2, slope_repeats=4,
    real_queries=20, descent_steps=2, descent_directions=2,
    surrogate_queries=48,
)  # fmt: skip


class Plane(nn.Module):
    """Wrong where ``w . (x - 1/2) > t``, for images of two pixels."""

    def __init__(self, first: float, second: float, threshold: float = 0.015) -> None:
        super().__init__()
        self.weight, self.threshold = torch.tensor([first, second]), threshold

    def forward(self, x: Tensor) -> Tensor:
        return two_logits(40 * ((x.flatten(1) - 0.5) @ self.weight - self.threshold))


def opposed(sharing: str, probabilities: tuple[float, float]) -> RandomEnsemble:
    """What fools one member saves the other, but for a corner where both are fooled."""
    return RandomEnsemble([Plane(1.0, 0.2), Plane(-1.0, 0.2, 0.016)], probabilities, sharing=sharing).eval()


def images() -> tuple[Tensor, Tensor]:
    y = torch.arange(N) % 2
    x = torch.full((N, 1, 1, 2), 0.5)
    x[y == 1, :, :, 1] = 0.9  # answered rightly by both
    return x, y


def bench_of(model, attack: PGD, budget=FEW, seed: int = 0) -> Bench:
    x, y = images()
    return Bench(
        Subject(model, stochastic=True), x, y, attack, budget, seed=seed, mode=execution.PLAIN, batch_size=N,
        expected_passes=1, progress=None,
    )  # fmt: skip


def names(attack: PGD, budget=FEW, *, stochastic: bool = True, model=None) -> set[str]:
    bench = bench_of(model or opposed("per_example", (0.5, 0.5)), attack, budget)
    bench.subject = dataclasses.replace(bench.subject, stochastic=stochastic)
    base = dataclasses.replace(attack, eot=budget.sweep_eot if stochastic else 1, restarts=1)
    found = whitebox._variants(bench, base)
    for name, one in found.items():
        assert name == "ARC" or sum(getattr(one, key) != value for key, value in vars(base).items()) == 1
    return set(found)


def test_everything_that_an_attack_can_be_is_varied():
    plain = {"loss margin", "average probability", "average logits", "held draws", "2 restarts"}
    noise = Plane(1.0, 1.0)
    assert names(PGD(EPS, 0.02), model=noise) == plain
    assert names(PGD(EPS, 0.02)) == plain | {"ARC"}
    assert names(PGD(EPS, 0.02, loss="margin", eot_average="logits", eot_draws="held"), model=noise) == {
        "loss ce", "average loss", "average probability", "fresh draws", "2 restarts"
    }  # fmt: skip
    one = dataclasses.replace(FEW, sweep_eot=1)  # the averages of one draw are the same
    assert names(PGD(EPS, 0.02), one, model=noise) == plain - {"average probability", "average logits"}
    assert names(PGD(EPS, 0.02), stochastic=False, model=noise) == {"loss margin", "2 restarts"}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.9, 0.1)])
def test_a_finite_ensemble_is_attacked_exactly(norm, sharing, probabilities, monkeypatch):
    model, (x, y) = opposed(sharing, probabilities), images()
    assert exact_accuracy(model, x, y) == pytest.approx(1)
    bench, pool = bench_of(model, PGD(EPS, 0.025, FEW.steps, norm=norm, eot=FEW.eot)), []
    assemble = bench.assembled
    monkeypatch.setattr(
        bench, "assembled", lambda name, parts, winner: pool.extend(parts) or assemble(name, parts, winner)
    )
    draft = whitebox.losses(bench, bench.attacked("reported", bench.attack, N))
    exact = {one.name: exact_accuracy(model, one.x, y) for one in pool}
    # What is left at best: half of the images keep the rarer member, none of the others any.
    assert exact["ARC"] == pytest.approx(min(probabilities) / 2, abs=0.14)
    assert exact["ARC"] <= exact["reported"] + 0.01
    best = next(one for one in bench.measurements if one.name.startswith("best of all"))
    assert best.accuracy == draft.evidence["best"]
    own = best.correct.unpack()
    assert all(any(np.array_equal(own[:, i], one.scores.correct[:, i]) for one in pool) for i in range(N))
    arc = next(one for one in bench.measurements if one.name == "ARC")
    assert arc.parameters["norm"] == norm


def test_diagnose_attacks_a_finite_ensemble_as_one():
    found = diagnose(opposed("per_example", (0.5, 0.5)), images(), budget=FEW, eps=EPS, engine="plain", progress=None)
    assert found.stochastic
    assert found.check(8).evidence["ARC"] < found.check(8).evidence["reported"]


class Always(nn.Module):
    """Answers one class; its gradients say nothing."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1).sum(dim=1) * 1e-3 + 1
        return torch.stack([lead, 0 * lead], dim=1).roll(self.answer, dims=1)


@pytest.mark.parametrize("seed", range(8))
def test_rare_shared_draws_fail_no_check_by_chance(seed):
    """One pass of ten is wrong as a whole, whatever the attack: by other draws each attack looks unlike another."""
    model = RandomEnsemble([Always(0), Always(1)], (0.9, 0.1), sharing="per_batch").eval()
    budget = dataclasses.replace(FEW, steps=1, sweep_eot=1, judge_draws=4, scorings=10)
    bench = bench_of(model, PGD(EPS, 0.02, 1), budget, seed=seed)
    bench.y = torch.zeros(N, dtype=torch.int64)
    draft = whitebox.losses(bench, bench.attacked("reported", bench.attack, N))
    assert judge([draft])[0].status == "passed", draft.evidence
    assert draft.evidence["best"] == draft.evidence["reported"]


def test_without_noise_the_best_is_as_low_as_the_lowest_of_each_image():
    plane, (x, y) = Plane(1.0, 0.2).eval(), images()
    found = diagnose(plane, (x, y), budget=FEW, eps=0.012, engine="plain", progress=None)
    names = {"reported", *found.check(8).evidence}
    tried = [one.correct.unpack()[0] for one in found.measurements if one.name in names]
    assert len(tried) >= 4
    best = next(one for one in found.measurements if one.name.startswith("best of all"))
    assert np.array_equal(best.correct.unpack()[0], np.logical_and.reduce(tried))


def test_the_vote_is_judged_under_the_attack_on_the_mean_probability():
    bench = bench_of(opposed("per_example", (0.9, 0.1)), PGD(EPS, 0.025, 10, eot=4))
    draft = whitebox.losses(bench, bench.attacked("reported", bench.attack, N))
    attacked = next(one for one in bench.measurements if one.name == "average probability")
    assert attacked.parameters["eot_average"] == "probability"
    assert 0 <= draft.evidence["mean probability"] <= 1

    def sure(x: Tensor) -> Tensor:  # wrong in four draws of ten, and surer where it is right
        return torch.where(torch.rand(len(x), 1) < 0.4, torch.tensor([0.0, 1.0]), torch.tensor([9.0, 0.0]))

    bench = bench_of(sure, PGD(EPS))
    assert bench.vote("vote", bench.x, torch.zeros(N, dtype=torch.int64), 60) == 1


def test_finalists_are_scored_by_the_same_fresh_draws():
    """Else the lowest of four equal attacks is the luckiest of four."""
    bench = bench_of(opposed("per_example", (0.5, 0.5)), PGD(EPS, EPS / 4, 2))
    for name in ("one", "another"):
        bench.scored(name, bench.x + torch.tensor([0.1, 0.0]), kind="none", rival=True)  # fools one member of two
    decision.decide(bench, None)
    one, another = (bench.measured(f"{name}, fresh draws").correct.unpack() for name in ("one", "another"))
    assert 0 < one.mean() < 1
    assert (one == another).all()
