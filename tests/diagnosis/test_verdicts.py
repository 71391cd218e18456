"""Every threshold of every verdict, just inside and just outside: a threshold that moves changes what a user reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK, blackbox, whitebox
from learn2perturb.diagnosis.blackbox import OWN
from learn2perturb.diagnosis.draws import Slope, _told
from learn2perturb.diagnosis.measure import Attacked, Bench, Subject
from learn2perturb.diagnosis.verdict import Draft, judge
from learn2perturb.engine import execution
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.evaluation.passes import Model

N, SCORINGS = 200, 200
BUDGET = dataclasses.replace(
    QUICK, name="canned", images=N, some=N, eps_grid=(25 / 255, 51 / 255), draw_curve=(5, 20), step_curve=(20, 40),
    targets=1, restarts=2,
)  # fmt: skip


def measured(accuracy: float, n: int = N) -> Attacked:
    """Of each image and of each scoring as many are right as ``accuracy`` says, so that differences have no spread."""
    right = round(accuracy * SCORINGS)
    assert right == pytest.approx(accuracy * SCORINGS)
    turned = (np.arange(SCORINGS)[:, None] + np.arange(n)) % SCORINGS
    return Attacked("canned", torch.zeros(n, 1, 1, 1), Scores(turned < right, random=True))


class Canned:
    """A bench whose attacks leave what they are said to leave."""

    def __init__(self, left: Mapping[str, float], *, stochastic: bool = True) -> None:
        self.left, self.budget, self.seed, self.num_classes = left, BUDGET, 0, 10
        self.attack = PGD(0.1, 0.025, 20, eot=20)
        self.subject = Subject(lambda x: x, stochastic)
        self.x = torch.zeros(N, 1, 1, 1)
        self.y = torch.zeros(N, dtype=torch.int64)
        self.rivals: dict[str, float] = {}

    def attacked(self, name: str, attack: object, n: int, **_settings: object) -> Attacked:
        return measured(self.left[name], n)

    scored = attacked


def status(draft: Draft) -> str:
    return judge([draft])[0].status


def says(value: bool) -> str:
    return "failed" if value else "passed"


@pytest.mark.parametrize(("left", "fails"), [(0.5, False), (0.505, True)])
def test_1_one_step_may_not_leave_less(left, fails):
    assert status(whitebox.iterative(Canned({"one step (FGSM)": 0.5}), measured(left))) == says(fails)


@pytest.mark.parametrize(("square", "transfer", "fails"), [(0.5, 0.5, False), (0.495, 0.5, True), (0.5, 0.495, True)])
def test_2_nothing_without_gradients_may_leave_less(square, transfer, fails):
    transfers = {"twin": measured(transfer)}
    rivals = blackbox.rivals_of(measured(square), transfers, {})
    assert status(blackbox.blackbox(Canned({}), measured(0.5), rivals, transfers)) == says(fails)


@pytest.mark.parametrize(("left", "fails"), [(0.5, False), (0.495, True)])
def test_2_neither_may_gradients_that_pass_by_a_submodule(left, fails):
    rivals = blackbox.rivals_of(measured(0.6), {"twin": measured(0.6)}, {"BPDA through pre": measured(left)})
    draft = blackbox.blackbox(Canned({}), measured(0.5), rivals, {"twin": measured(0.6)})
    assert status(draft) == says(fails)
    assert draft.evidence["BPDA through pre"] == left


@pytest.mark.parametrize(("left", "fails"), [(0.01, False), (0.015, True)])
def test_3_one_per_cent_may_be_left_by_an_unbounded_attack(left, fails):
    assert status(whitebox.unbounded(Canned({"unbounded": left, "unbounded, 200 steps": left}))) == says(fails)
    assert status(whitebox.unbounded(Canned({"unbounded": 0.9, "unbounded, 200 steps": left}))) == says(fails)


@pytest.mark.parametrize(("middle", "last", "fails"), [(0.5, 0.1, False), (0.5, 0.105, True), (0.905, 0.1, True)])
def test_5_accuracy_may_not_rise_and_must_reach_chance(middle, last, fails):
    bench = Canned({"eps 25/255": middle, "eps 51/255": last})
    assert status(whitebox.distortion(bench, measured(0.9))[0]) == says(fails)


def noise_off(on: float, off: float, pgd: float | None, transfer: float = 0.9) -> Draft:
    quiet = Subject(lambda x: x, stochastic=False)
    sources = {} if pgd is None else {"pgd_at": quiet}
    bench = Canned({"noise off": off, "pgd_at itself": pgd or 0.0})
    return blackbox.noise_off(bench, measured(on), sources, {OWN: measured(transfer)}, quiet)


@pytest.mark.parametrize(
    ("on", "off", "pgd", "expected"),
    [
        (0.6, 0.35, 0.4, "passed"),  # five points below PGD training
        (0.6, 0.345, 0.4, "failed"),
        (0.4, 0.35, 0.6, "passed"),  # PGD training is better, but so is the network without its noise than with it
        (0.4, 0.345, 0.6, "failed"),
        (0.4, 0.45, 0.6, "passed"),  # stronger without its noise: it does not live on it
        (0.4, 0.35, None, "passed"),  # the lesser of the two is no more than the one that is known
        (0.4, 0.345, None, "not shown"),
    ],
)
def test_6_five_points_below_the_lesser_of_pgd_training_and_itself(on, off, pgd, expected):
    draft = noise_off(on, off, pgd)
    assert status(draft) == expected
    assert bool(draft.missing) == (expected == "not shown")


@pytest.mark.parametrize(("transfer", "fails"), [(0.4, False), (0.395, True)])
def test_6_the_twin_may_not_betray_the_noisy_one(transfer, fails):
    assert status(noise_off(0.4, 0.4, 0.4, transfer)) == says(fails)


@pytest.mark.parametrize("axis", ["draws", "steps"])
@pytest.mark.parametrize(("more", "fails"), [(0.495, False), (0.49, True), (0.505, False), (0.51, True)])
def test_7_half_a_point_is_convergence(axis, more, fails):
    left = {"5 draws": 0.5, "20 draws": 0.5, "20 steps": 0.5, "40 steps": 0.5}
    left[{"draws": "5 draws", "steps": "40 steps"}[axis]] = more
    bench = Canned(left)
    draft, _ = whitebox.converged(bench, measured(0.5))
    assert status(draft) == says(fails)


@pytest.mark.parametrize(("best", "fails"), [(0.48, False), (0.475, True), (0.6, False)])
def test_8_the_best_may_be_two_points_ahead(best, fails, monkeypatch):
    varied = ("loss margin", "loss dlr", "average probability", "average logits", "held draws")
    bench = Canned(dict.fromkeys((*varied, "target 1", "2 restarts"), 0.5))
    bench.mean_logits, bench.vote = lambda *_: torch.zeros(N, 10), lambda *_: 0.5
    bench.assembled = lambda *_: measured(best)
    bench.score = lambda *_: measured(0.5).scores
    monkeypatch.setattr(whitebox, "_winners", lambda *_: np.zeros(N, dtype=np.int64))
    draft = whitebox.losses(bench, measured(0.5))
    assert status(draft) == says(fails)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-0.91, 0.0, "passed"),
        (-0.89, 0.0, "failed"),
        (-1.09, 0.0, "passed"),
        (-1.11, 0.0, "failed"),
        (-0.75, 0.08, "passed"),  # a tenth and two standard errors
        (-0.73, 0.08, "failed"),
        (-0.55, 0.08, "failed"),
    ],
)
def test_9_a_tenth_and_two_errors_off_the_slope_of_independence(value, error, expected):
    check = judge([_told(Slope(value, error), "logits", Slope(-1.0, 0.0), differ=True, rows_differ=True, enough=True)])[
        0
    ]
    assert check.status == expected
    assert check.notes == ()


@pytest.mark.parametrize(("value", "noted"), [(-0.91, False), (-0.89, True), (0.0, True)])
def test_9_draws_that_rows_share_are_a_note(value, noted):
    check = judge([_told(Slope(-1.0, 0.0), "logits", Slope(value, 0.0), differ=True, rows_differ=True, enough=True)])[0]
    assert check.status == "passed"
    assert [("EOT must average over fresh passes" in note) for note in check.notes] == [True] * noted


# --- check 8: which is the best


def bench_of(model: Model, n: int, **budget: int) -> Bench:
    plan = dataclasses.replace(BUDGET, images=n, some=n, **budget)
    return Bench(
        Subject(model, stochastic=True), torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64), PGD(0.1), plan,
        seed=0, mode=execution.PLAIN, batch_size=n, expected_passes=1, progress=None,
    )  # fmt: skip


def by_chance(x: Tensor) -> Tensor:
    """Wrong as often as the pixel says, by a margin of 10; right by one of 1."""
    chance = x.flatten(1)[:, 0]
    lead = torch.where(torch.rand(len(x)) < chance, 10.0, -1.0)
    return torch.stack([torch.zeros_like(lead), torch.where(chance > 0.95, 0.1, lead)], dim=1)


def best_of(bench: Bench, images: list[Tensor]) -> Attacked:
    pool = [bench.scored(f"attack {number}", x, kind="canned") for number, x in enumerate(images)]
    best = bench.assembled("best", pool, whitebox._winners(bench, pool))
    # The score of each image is one that an attack has: made by draws that chose nothing, and no better by luck.
    same = [
        (part.x == best.x).flatten(1).all(dim=1).numpy() & (part.scores.correct == best.scores.correct).all(axis=0)
        for part in pool
    ]
    assert np.any(same, axis=0).all()
    return best


def test_8_the_best_is_the_one_that_is_wrong_most_often_not_by_most():
    bench = bench_of(by_chance, 40)
    seldom, always = (torch.full((40, 1, 1, 1), value) for value in (0.4, 1.0))  # mean margins 3.4 and 0.1
    best = best_of(bench, [seldom, always])
    assert torch.equal(best.x, always)
    assert best.accuracy == bench.rivals["best"] == 0


def test_8_the_best_for_each_image_is_put_together():
    bench = bench_of(by_chance, 40)
    first = torch.where(torch.arange(40) % 2 == 0, 1.0, 0.4).view(40, 1, 1, 1)  # 0.4 has the larger mean margin
    assert torch.equal(best_of(bench, [first, 1.4 - first]).x, torch.ones_like(first))


def test_8_the_best_is_no_worse_than_an_attack_that_is_better_everywhere():
    """By five draws the best for an image is mostly another one, which was lucky."""
    bench = bench_of(by_chance, 200, judge_draws=5)
    better, others = torch.full((200, 1, 1, 1), 0.6), [torch.full((200, 1, 1, 1), 0.5) for _ in range(8)]
    assert torch.equal(best_of(bench, [*others, better]).x, better)


def test_8_the_best_is_not_scored_by_the_draws_that_chose_it():
    bench = bench_of(by_chance, 200, judge_draws=5, scorings=10)
    best = best_of(bench, [torch.full((200, 1, 1, 1), 0.5) for _ in range(10)])
    assert best.accuracy == pytest.approx(0.5, abs=0.04)


# --- check 4: random points that break what gradients left


def searched(broken: int, left: int, monkeypatch) -> str:
    """``left`` images held out against gradients, ``broken`` of them are broken by a random point."""
    bench = SimpleNamespace(budget=dataclasses.replace(BUDGET, images=left, some=left), attack=PGD(0.1))
    bench.x, bench.y = torch.zeros(left, 1, 1, 1), torch.zeros(left, dtype=torch.int64)
    bench.mean_margin = lambda *_: -torch.ones(left)
    bench.each = lambda work, count, key=None: [work(number) for number in range(count)]
    monkeypatch.setattr(blackbox, "_best_samples", lambda _bench, x, _y: x.unsqueeze(0))

    def margins(_bench: object, purpose: str, x: Tensor, y: Tensor, draws: int | None = None) -> Tensor:
        return torch.where(torch.arange(len(x)) < broken, 1.0, -1.0)

    monkeypatch.setattr(blackbox, "_margin", margins)
    return status(blackbox.random_search(bench, Attacked("reported", bench.x, Scores(np.ones((1, left), bool)))))


@pytest.mark.parametrize(
    ("broken", "left", "expected"),
    [
        (10, 1000, "passed"),  # one per cent
        (18, 1000, "passed"),  # one per cent and two standard errors is 1.9 %
        (22, 1000, "failed"),
        (1, 1, "passed"),  # one image is no evidence
        (2, 20, "passed"),
        (4, 20, "failed"),
    ],
)
def test_4_one_per_cent_and_two_errors_may_be_broken_by_chance(broken, left, expected, monkeypatch):
    assert searched(broken, left, monkeypatch) == expected
