"""Which of several runs an image keeps, who drops out, which targets are likely, and whether a model is random."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.attacks import PGD
from learn2perturb.attacks.probing import passes_differ
from learn2perturb.attacks.query import Query
from learn2perturb.attacks.runs import best_of, likely_targets

X = torch.zeros(4, 1, 1, 1)
Y = torch.zeros(4, dtype=torch.int64)


class Judge:
    """A query whose verdict is written in the pixel: tens are the share in tenths, ones the margin."""

    def __init__(self, clean: float = -1.0) -> None:
        self.clean, self.asked = clean, []

    def score(self, x, y, draws):
        self.asked.append(("score", len(x), draws))
        return torch.full((len(x),), self.clean) * torch.tensor([1.0, 1.0, 1.0, -1.0])[: len(x)]

    def broken(self, x, y, margins):
        return margins > 0

    def success(self, x, y, draws):
        self.asked.append(("success", len(x), draws))
        pixel = x.flatten()
        return (pixel // 10) / 10, pixel % 10


def runs_of(*points, broken=()):
    """Runs that return these pixels for images 0 to 3, and their number; ``broken``: by run which images they break."""
    seen = []

    def run(left, some):
        seen.append(left.tolist())
        found = torch.cat([torch.tensor(points[number])[left] for number in some])
        gone = [int(i) in broken[number] if number < len(broken) else False for number in some for i in left]
        return found.view(-1, 1, 1, 1), torch.tensor(gone)

    return (run, len(points)), seen


def test_a_larger_share_wins_then_a_larger_margin_and_of_equals_the_first():
    runs, seen = runs_of([52.0, 52.0, 52.0, 20.0], [55.0, 39.0, 62.0, 20.0])
    judge = Judge()
    best = best_of(judge, X, Y, *runs, drop=False, draws=7)
    assert best.flatten().tolist() == [55, 52, 62, 20]
    assert seen == [[0, 1, 2, 3]] * 2
    assert judge.asked == [("success", 4, 7)] * 2
    again, _ = runs_of([55.0] * 4, [52.0] * 4, [49.0] * 4)
    assert best_of(Judge(), X, Y, *again, drop=False, draws=7).flatten().tolist() == [55] * 4


def test_one_run_is_not_judged():
    runs, seen = runs_of([1.0, 2.0, 3.0, 4.0])
    judge = Judge()
    assert best_of(judge, X, Y, *runs, drop=False, draws=3).flatten().tolist() == [1, 2, 3, 4]
    assert seen == [[0, 1, 2, 3]]
    assert judge.asked == []


def test_images_that_are_broken_leave_and_keep_what_broke_them():
    # The last one is broken as it is, image 1 by the first run though its share is less, image 0 by the second.
    runs, seen = runs_of([52.0, 1.0, 30.0, 9.0], [1.0, 99.0, 40.0, 9.0], [99.0, 99.0, 20.0, 9.0], broken=([1], [0]))
    judge = Judge()
    best = best_of(judge, X, Y, *runs, drop=True, draws=1)
    assert best.flatten().tolist() == [1, 1, 40, 0]
    assert seen == [[0, 1, 2], [0, 2], [2]]
    assert judge.asked[0] == ("score", 4, 1)


def test_where_none_is_left_no_run_begins():
    runs, seen = runs_of([1.0] * 4, [2.0] * 4, broken=([0, 1, 2], []))
    best_of(Judge(), X, Y, *runs, drop=True, draws=1)
    assert seen == [[0, 1, 2]]
    kept, seen = runs_of([1.0] * 4)
    right = Judge(clean=1.0)
    assert best_of(right, X[:3], Y[:3], *kept, drop=True, draws=1).flatten().tolist() == [0, 0, 0]
    assert seen == []


@pytest.mark.parametrize(("count", "found"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_likely_targets_are_the_wrong_classes_in_order(count, found):
    logits = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    y = torch.tensor([0, 2])
    query = Query(lambda x: logits, PGD(), y, strict=True)
    targets = likely_targets(query, torch.rand(2, 1, 2, 2), y, count)
    assert torch.stack(targets).T.tolist() == [[2, 4, 3, 1][:found], [4, 3, 1, 0][:found]]


# --- whether a model is random


@pytest.mark.parametrize(("number", "seen"), [(1, True), (7, True), (8, False)])
@pytest.mark.parametrize(("image", "looked_at"), [(0, True), (15, True), (16, False)])
@pytest.mark.parametrize("by", [1.0, 1e-6, 0.0])
def test_eight_passes_over_sixteen_images_are_compared_bit_by_bit(number, seen, image, looked_at, by):
    passes = []

    def model(images):
        logits = torch.zeros(len(images), 2)
        if len(passes) == number and image < len(images):
            logits[image] = by
        passes.append(len(images))
        return logits

    differs = seen and looked_at and by > 0
    assert passes_differ(model, torch.rand(20, 1, 2, 2)) == differs
    assert passes == [16] * (number + 1 if differs else 8)  # the first difference is enough


def test_asking_draws_nothing_from_the_callers_generator_and_needs_no_gradient():
    state = torch.get_rng_state()
    assert passes_differ(lambda x: x.flatten(1) + torch.rand(1), torch.rand(2, 1, 2, 2, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    grads = []
    passes_differ(lambda x: (grads.append(torch.is_grad_enabled()), x.flatten(1))[1], torch.rand(1, 1, 2, 2))
    assert set(grads) == {False}


def test_of_points_that_are_equally_good_the_first_is_kept():
    judge = Judge()
    judge.success = lambda x, y, draws: (torch.full((len(x),), 0.5), torch.full((len(x),), 2.0))
    runs, _ = runs_of([1.0] * 4, [2.0] * 4)
    assert best_of(judge, X, Y, *runs, drop=False, draws=3).flatten().tolist() == [1.0] * 4
