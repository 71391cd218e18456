"""What a diagnosis keeps of each attack: its cost, its scores, the images of the strongest, and what is a rival."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import FGSM, PGD
from learn2perturb.diagnosis import QUICK
from learn2perturb.diagnosis.measure import Bench, Subject
from learn2perturb.engine import execution
from learn2perturb.engine.random import seed_everything
from learn2perturb.evaluation import pace
from learn2perturb.evaluation.passes import Model
from learn2perturb.evaluation.pieces import NOTHING, Pieces

N = 5
PLAN = dataclasses.replace(QUICK, images=N, some=N, scorings=3)
X = torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
OWN = PGD(0.1, 0.05, 3)


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT


def noisy(x: Tensor) -> Tensor:
    return linear(x) + torch.randn(len(x), 3)


Y = linear(X).argmax(dim=1)


def bench_of(model: Model = linear, *, stochastic: bool = False, progress: object = None) -> Bench:
    return Bench(
        Subject(model, stochastic=stochastic), X, Y, OWN, PLAN, seed=0, mode=execution.PLAIN, batch_size=2,
        expected_passes=4, progress=progress,
    )  # fmt: skip


def test_what_an_attack_costs_is_that_of_an_image_over_all_batches():
    bench, started = bench_of(), time.perf_counter()
    bench.attacked("reported", OWN, N)
    took = time.perf_counter() - started
    alone = OWN.run(linear, X, Y)
    kept = bench.measured("reported")
    assert (kept.forward_passes, kept.backward_passes) == (alone.forward_passes, alone.backward_passes)
    assert 0 < kept.seconds < took
    assert (kept.n, kept.attack, kept.parameters["steps"], "seed" in kept.parameters) == (N, "PGD", 3, False)


def test_the_progress_is_of_passes_and_never_more_than_is_expected():
    told: list[tuple[float, float, str]] = []
    bench = bench_of(progress=lambda *words: told.append(words))
    bench.attacked("reported", OWN, N)
    assert [done for done, *_ in told] == [2 * 3, 4 * 3, 5 * 3]
    assert [total for _, total, _ in told] == [6, 12, 15]  # more than the four that were expected
    assert [name for *_, name in told] == ["reported (40%)", "reported (80%)", "reported (100%)"]


def test_progress_moves_within_a_batch_and_says_at_which_check(monkeypatch):
    monkeypatch.setattr(pace, "_INTERVAL", 0.0)
    told: list[tuple[float, float, str]] = []
    bench = bench_of(progress=lambda *words: told.append(words))
    bench.stage = "check 7, 1 of 10 checks done"
    bench.attacked("50 steps", PGD(0.1, 0.05, 50), N)
    done = [passes for passes, *_ in told]
    assert len(done) > 100 and done == sorted(done) and done[-1] == 50 * N
    assert max(done) <= 50 * N
    assert {name.rpartition(" (")[0] for *_, name in told} == {"check 7, 1 of 10 checks done, 50 steps"}
    assert {"(10%)", "(50%)", "(100%)"} < {name.rpartition(" ")[2] for *_, name in told}


def test_what_was_finished_before_is_neither_done_nor_left(monkeypatch, tmp_path):
    monkeypatch.setattr(Pieces, "WORTH", 0.0)
    ends = []
    for _ in range(2):
        told: list[tuple[float, float, str]] = []
        subject = Subject(linear, stochastic=False, identity="mine")
        bench = Bench(
            subject, X, Y, OWN, PLAN, seed=0, mode=execution.PLAIN, batch_size=2, expected_passes=60,
            progress=lambda *words, told=told: told.append(words), pieces=Pieces(tmp_path),
        )  # fmt: skip
        bench.attacked("reported", OWN, N)
        bench.pieces = NOTHING
        bench.attacked("another", OWN, N)
        ends.append(told[-1][:2])
    assert ends == [(30, 60), (15, 45)]


def test_an_attack_on_our_model_by_itself_is_one_that_settings_repeat():
    bench, other = bench_of(), Subject(lambda x: -linear(x), stochastic=False)
    bench.attacked("own", OWN, N)
    bench.attacked("of another", OWN, N, source=other)
    bench.attacked("on another", OWN, N, victim=other)
    bench.attacked("chosen classes", dataclasses.replace(OWN, targeted=True), N, targets=(Y + 1) % 3)
    bench.attacked("no rival", OWN, N, rival=False)
    assert {one.name: one.by_itself for one in bench.measurements} == {
        "own": True, "of another": False, "on another": False, "chosen classes": False, "no rival": True,
    }  # fmt: skip
    assert set(bench.rivals) == {"own", "of another", "chosen classes"}
    assert bench.measured("on another").accuracy != bench.measured("own").accuracy


def test_images_are_kept_of_attacks_at_the_size_that_is_diagnosed():
    bench = bench_of()
    for name, attack in {
        "own": OWN, "one step": FGSM(0.1), "larger": PGD(0.2, 0.05, 3), "l2": PGD(0.1, 0.05, 3, norm="l2"),
    }.items():  # fmt: skip
        bench.attacked(name, attack, N)
    assert set(bench.kept) == {"own", "one step"}


def test_of_many_attacks_the_strongest_keep_their_images_and_the_reported_one_always():
    bench = bench_of()
    for number in range(12):  # weaker and weaker: of more and more clean images
        x = torch.cat([1 - X[: N - number % 6], X[N - number % 6 :]])
        bench.scored("reported" if number == 11 else f"{number}", x, kind="canned", rival=True)
    accuracy = {one.name: one.accuracy for one in bench.measurements}
    kept = {name: accuracy[name] for name in bench.kept}
    assert len(kept) == 9 and "reported" in kept
    left_out = [value for name, value in accuracy.items() if name not in kept]
    assert max(value for name, value in kept.items() if name != "reported") <= min(left_out)
    assert bench.scored("quiet", X, kind="canned").accuracy == 1
    assert "quiet" not in bench.kept and "quiet" not in bench.rivals


def test_of_equally_strong_attacks_the_earlier_keep_their_images():
    bench = bench_of()
    for number in range(12):
        bench.scored("reported" if number == 11 else f"{number}", X, kind="canned", rival=True)
    assert list(bench.kept) == [*map(str, range(8)), "reported"]


def test_images_that_no_attack_has_just_made_cost_nothing():
    bench = bench_of()
    pool = [bench.scored(name, x, kind="canned") for name, x in (("clean", X), ("opposite", 1 - X))]
    best = bench.assembled("best", pool, np.array([1, 0, 1, 0, 1]))
    assert torch.equal(best.x[::2], 1 - X[::2]) and torch.equal(best.x[1::2], X[1::2])
    assert bench.rivals == {"best": best.accuracy} and set(bench.kept) == {"best"}
    for one in bench.measurements:
        assert (one.forward_passes, one.backward_passes, one.seconds, one.by_itself) == (0, 0, 0, False)
    assert [one.attack for one in bench.measurements] == ["canned", "canned", "best of"]


def test_another_scoring_of_the_same_images_has_the_attack_of_the_first():
    bench = bench_of(noisy, stochastic=True)
    found = bench.attacked("reported", OWN, N)
    bench.record("afresh", "reported", bench.score("afresh", found.x, bench.subject))
    one, other = bench.measured("reported"), bench.measured("afresh")
    changed = {item.name for item in dataclasses.fields(one) if getattr(one, item.name) != getattr(other, item.name)}
    assert changed <= {"name", "accuracy", "interval", "correct"}


def test_draws_of_a_score_are_fresh_each_time_and_the_same_in_each_run():
    bench = bench_of(noisy, stochastic=True)
    x = torch.cat([X] * 20)
    bench.x, bench.y = x, torch.cat([Y] * 20)
    first, again, other = (bench.score(name, x, bench.subject).correct for name in ("a", "a", "b"))
    assert first.shape == (3, 100) and np.array_equal(first, again) and not np.array_equal(first, other)
    assert len({row.tobytes() for row in first}) == 3
    assert bench.score("a", x, Subject(linear, stochastic=False)).correct.shape == (1, 100)
    assert bench.score("a", x, bench.subject).batches == (2,) * 50


def test_means_are_over_as_many_draws_as_are_asked_for():
    bench = bench_of(noisy, stochastic=True)

    def drawn(purpose: str) -> Tensor:
        parts = []
        for batch, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
            seed_everything(0, purpose, batch)
            parts.append(torch.stack([noisy(X[rows]) for _ in range(7)]))
        return torch.cat(parts, dim=1)

    torch.testing.assert_close(bench.mean_logits("logits", X, 7), drawn("logits").mean(0))
    draws = drawn("success")
    right = draws.gather(2, Y.expand(7, N).unsqueeze(2)).squeeze(2)
    margins = draws.scatter(2, Y.expand(7, N).unsqueeze(2), -torch.inf).amax(2) - right
    wrong, found = bench.mean_success("success", X, Y, 7)
    torch.testing.assert_close(found, margins.mean(0))
    torch.testing.assert_close(wrong, (margins > 0).float().mean(0))
    torch.testing.assert_close(bench.mean_margin("success", X, Y, 7), margins.mean(0))
    expected = (drawn("vote").softmax(2).mean(0).argmax(1) == Y).float().mean().item()
    assert bench.vote("vote", X, Y, 7) == pytest.approx(expected)
    quiet = bench_of().mean_logits("logits", X, 7)
    assert torch.equal(quiet, torch.cat([linear(one) for one in X.split(2)]))  # one draw, not seven of the same


def test_batches_hold_every_image_once():
    assert bench_of().batches(N) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert bench_of().batches(2) == [slice(0, 2)]
