"""The attacks that checks 1, 3, 5 and 7 run, setting by setting, and the images that each of them gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from learn2perturb.attacks import FGSM, PGD, Attack
from learn2perturb.diagnosis import QUICK, whitebox
from learn2perturb.diagnosis.measure import Attacked, Subject
from learn2perturb.evaluation.intervals import Scores

PIXELS, N, SOME = 16, 12, 8
BUDGET = dataclasses.replace(
    QUICK, images=N, some=SOME, eps_grid=(0.05, 0.1, 0.4), draw_curve=(5, 20), step_curve=(15, 30), sweep_eot=3,
    unbounded_steps=50, unbounded_eot=2,
)  # fmt: skip
ATTACK = PGD(0.1, 0.025, 20, eot=20, loss="margin", eot_average="probability", random_start=True, restarts=2)


class Recording:
    """A bench that notes what it is asked to run; each attack leaves half of the images, or as many as is said."""

    def __init__(self, attack: PGD = ATTACK, *, stochastic: bool = True, leaves: float = 0.5) -> None:
        self.leaves = leaves
        self.attack, self.budget, self.seed, self.num_classes = attack, BUDGET, 0, 10
        self.subject = Subject(lambda x: x, stochastic)
        self.x = torch.zeros(N, 1, 4, 4)
        self.y = torch.zeros(N, dtype=torch.int64)
        self.run: dict[str, tuple[Attack, int, dict[str, Any]]] = {}

    def attacked(self, name: str, attack: Attack, n: int, **settings: Any) -> Attacked:
        self.run[name] = attack, n, settings
        return left(self.leaves, n)


def left(share: float, n: int = N) -> Attacked:
    return Attacked("canned", torch.zeros(n, 1, 4, 4), Scores(np.arange(20)[:, None].repeat(n, axis=1) < 20 * share))


def test_1_one_step_is_the_reported_attack_in_one_step():
    bench = Recording()
    draft = whitebox.iterative(bench, left(0.25))
    assert bench.run == {
        "one step (FGSM)": (FGSM(0.1, loss="margin", eot=20, eot_average="probability"), N, {}),
    }
    assert draft.good == "20 steps leave 25.0 %, one step 50.0 %"
    assert draft.evidence == {"iterative": 0.25, "one step": 0.5}
    (claim,) = draft.claims
    assert (claim.first.mean(), claim.second.mean(), claim.allowed, claim.absolute) == (0.25, 0.5, 0.0, False)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1.0), ("l2", 4.0)])
@pytest.mark.parametrize(("steps", "share"), [(50, 2.5 / 50), (2, 1.0), (1, 1.0)])
def test_3_the_whole_box_is_crossed_two_and_a_half_times(norm, eps, steps, share):
    bench = Recording(dataclasses.replace(ATTACK, norm=norm))
    bench.budget = dataclasses.replace(BUDGET, unbounded_steps=steps)
    draft = whitebox.unbounded(bench)
    assert len(bench.run) == (1 if steps == 1 else 2)  # an eighth of the steps first, which leave too much here
    (attack, n, settings) = bench.run["unbounded" if steps == 1 else f"unbounded, {steps} steps"]
    assert attack == dataclasses.replace(
        ATTACK, norm=norm, eps=eps, step_size=share * eps, steps=steps, random_start=False, restarts=1,
        eot=2,
    )  # fmt: skip
    assert (n, settings) == (SOME, {"rival": False})
    assert draft.evidence == {"accuracy": 0.5}
    assert draft.good == f"with eps = {eps:.4g} and {steps} steps 50.0 % are left"
    assert f"{steps} steps still leave 50.0 % (allowed 1 %)" in draft.wrong[0]


def test_3_an_eighth_of_the_steps_will_do_where_it_leaves_nothing():
    bench = Recording(leaves=0.0)
    bench.budget = dataclasses.replace(BUDGET, unbounded_steps=80)
    draft = whitebox.unbounded(bench)
    assert {name: (made.steps, made.step_size) for name, (made, *_) in bench.run.items()} == {"unbounded": (10, 0.25)}
    assert not draft.wrong


def test_5_every_size_gets_the_reported_attack_with_its_steps_scaled():
    bench = Recording()
    bench.budget = dataclasses.replace(BUDGET, near=0.2)
    clean = left(0.75)
    draft, curve = whitebox.distortion(bench, clean)
    far, _, _ = bench.run.pop("eps 102/255")  # one draw, which leaves too much
    assert far == dataclasses.replace(ATTACK, eps=0.4, step_size=far.step_size, eot=1)
    assert list(bench.run) == ["eps 0.05", "eps 0.1", "eps 102/255, 3 draws"]
    assert [(attack.eps, attack.step_size) for attack, *_ in bench.run.values()] == [
        (0.05, pytest.approx(0.0125)), (0.1, pytest.approx(0.025)), (0.4, pytest.approx(0.1)),
    ]  # fmt: skip
    for attack, n, settings in bench.run.values():
        same = dataclasses.replace(attack, eps=0.1, step_size=0.025)
        assert same == dataclasses.replace(ATTACK, eot=3)
        assert (n, settings) == (SOME, {"rival": False})
    assert [point.at for point in curve.points] == [0.0, 0.05, 0.1, 0.4]
    assert [point.accuracy for point in curve.points] == [0.75, 0.5, 0.5, 0.5]
    assert curve.n == SOME
    seconds = [one.second if isinstance(one.second, float) else one.second.mean() for one in draft.claims]
    assert list(zip([claim.first.mean() for claim in draft.claims], seconds, strict=True)) == [
        (0.5, 0.75), (0.5, 0.5), (0.5, 0.5), (0.5, 0.1),
    ]  # fmt: skip
    assert [claim.first.n for claim in draft.claims] == [SOME] * 4
    assert list(draft.evidence.values()) == [0.75, 0.5, 0.5, 0.5]
    assert draft.good == "accuracy falls from 75.0 % to 50.0 % at eps 102/255"
    assert draft.claims[-1].text == "accuracy falls to chance (10.0 %) at eps 102/255"
    assert draft.claims[0].text == "accuracy does not rise from eps 0 to 0.05"


@pytest.mark.parametrize(
    ("leaves", "before", "stochastic", "names"),
    [
        (0.1, 0.1, True, ["eps 102/255"]),
        (0.1, 0.05, True, ["eps 102/255", "eps 102/255, 3 draws"]),  # more than the radius before
        (0.15, 0.2, True, ["eps 102/255", "eps 102/255, 3 draws"]),  # more than chance
        (0.15, 0.2, False, ["eps 102/255"]),
    ],
)
def test_5_far_beyond_the_radius_one_draw_does_where_it_leaves_no_more_than_chance(leaves, before, stochastic, names):
    bench = Recording(stochastic=stochastic, leaves=leaves)
    bench.budget = dataclasses.replace(BUDGET, eps_grid=(0.4,), near=0.2)
    whitebox.distortion(bench, left(before))
    assert list(bench.run) == names
    assert [attack.eot for attack, *_ in bench.run.values()] == [1, 3][: len(names)] if stochastic else [3]


def test_7_more_draws_and_more_steps_are_the_reported_attack_otherwise():
    bench = Recording()
    draft, (draws, steps) = whitebox.converged(bench, left(0.25))
    assert bench.run == {
        "5 draws": (dataclasses.replace(ATTACK, eot=5, restarts=1), SOME, {}),
        "20 draws": (dataclasses.replace(ATTACK, eot=20, restarts=1), SOME, {}),
        "15 steps": (dataclasses.replace(ATTACK, steps=15, eot=3, restarts=1), SOME, {}),
        "30 steps": (dataclasses.replace(ATTACK, steps=30, eot=3, restarts=1), SOME, {}),
    }
    assert [point.at for point in draws.points] == [5, 20]
    assert [point.at for point in steps.points] == [15, 30]
    assert draft.good == "5 draws leave 50.0 %, 20 draws 50.0 %, 15 steps leave 50.0 %, 30 steps 50.0 %"
    assert draft.evidence == {"5 draws": 0.5, "20 draws": 0.5, "15 steps": 0.5, "30 steps": 0.5}
    assert [(claim.allowed, claim.absolute, claim.first.n) for claim in draft.claims] == [(0.005, True, SOME)] * 2


def test_7_what_the_reported_attack_has_shown_is_not_run_again():
    once = dataclasses.replace(ATTACK, restarts=1)
    bench = Recording(once)
    draft, _ = whitebox.converged(bench, left(0.25))
    assert "20 draws" not in bench.run
    assert draft.evidence["20 draws"] == 0.25
    assert draft.claims[0].second.n == SOME


def test_7_without_noise_only_steps_count():
    bench = Recording(stochastic=False)
    draft, curves = whitebox.converged(bench, left(0.25))
    assert list(bench.run) == ["15 steps", "30 steps"]
    assert [curve.axis for curve in curves] == ["steps"]
    assert len(draft.claims) == 1


@pytest.mark.parametrize(
    ("eot", "stochastic", "title"), [(20, True, "EOT-PGD-20"), (1, True, "PGD-20"), (20, False, "PGD-20")]
)
def test_the_attack_is_called_eot_where_it_averages_over_draws(eot, stochastic, title):
    assert whitebox.title(dataclasses.replace(ATTACK, eot=eot), stochastic=stochastic) == title


@pytest.mark.parametrize(("eps", "step"), [(0.2, 0.05), (0.05, 0.0125)])
def test_another_size_has_steps_in_proportion(eps, step):
    found = whitebox.with_eps(ATTACK, eps)
    assert (found.eps, found.step_size) == (eps, pytest.approx(step))
    assert whitebox.with_eps(PGD(0.1, 0.1, 1), eps).step_size == pytest.approx(eps)
