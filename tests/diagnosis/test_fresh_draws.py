"""Draws that are rare, shared or unseen are no fault; draws that come again are, at whatever distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.diagnosis.draws import gradient_slope, recurrence, value_slope
from learn2perturb.engine.modes import dropouts_off, in_mode, live_dropouts
from learn2perturb.evaluation.inputs import in_train_mode
from learn2perturb.evaluation.passes import passes_differ
from learn2perturb.evaluation.replays import HIDDEN, SEEDS, draws_afresh, draws_anew, replayed

X = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(8, dtype=torch.int64)
FIRST, SECOND = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))


def rare(x: Tensor, chance: float = 0.1) -> Tensor:
    """One of two networks, for the whole pass."""
    return x.flatten(1).tanh() @ (SECOND if torch.rand(()) < chance else FIRST)


def sure_vote(x: Tensor) -> Tensor:
    """Counts of labels that the noise never changes."""
    noisy = torch.stack([x.flatten(1) @ FIRST + 1e-9 * torch.randn(len(x), 3) for _ in range(4)])
    return F.one_hot(noisy.argmax(dim=2), 3).sum(dim=0).float()


def seeded_vote(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (x.flatten(1) @ FIRST + 0.1 * torch.randn(3, generator=generator)).sign()


def seeded_dropout(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(x.flatten(1), 0.5) @ FIRST


def seeded_beside_a_fresh_draw_that_does_nothing(x: Tensor) -> Tensor:
    torch.randint(2, ())
    return seeded_vote(x)


def one_member_in_a_thousand(x: Tensor) -> Tensor:
    members = [FIRST] * 999 + [SECOND]
    return x.flatten(1) @ members[int(torch.randint(1000, ()))]


class Pool:
    """Draws that come again after ``length`` passes, or each of which serves ``times`` passes."""

    def __init__(self, length: int = 10**6, times: int = 1) -> None:
        self.length, self.times, self.passes = length, times, 0

    def __call__(self, x: Tensor) -> Tensor:
        seed = self.passes // self.times % self.length
        self.passes += 1
        noise = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        return (x.flatten(1) + noise).sigmoid() @ FIRST


def test_rare_draws_are_found_and_never_taken_for_replays():
    """Eight passes miss one draw in ten in 43 % of all models."""
    assert all(passes_differ(rare, X, seed) for seed in range(40))
    assert {replayed(rare, X, seed) for seed in range(10)} == {""}
    for seed in range(30):
        torch.manual_seed(seed)
        assert gradient_slope(rare, X[:2], Y[:2], 96).fits


@pytest.mark.parametrize("pool", [Pool(12), Pool(60), Pool(times=2), Pool(times=4)], ids=lambda pool: str(vars(pool)))
def test_a_pool_is_found_at_any_distance(pool):
    found = gradient_slope(pool, X, Y, 192)
    assert not found.fits
    assert found.recurs < 0.001


def test_the_p_value_of_independent_passes_is_uniform():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(64, 2, 3, generator=generator, dtype=torch.float64) ** 5 for _ in range(100)]
    found = torch.tensor([recurrence(one - one.mean(dim=0)) for one in values])
    assert 0.35 < float(found.mean()) < 0.65
    assert float((found < 0.1).float().mean()) < 0.2


class OwnGenerator:
    """A rare choice by a generator that goes on from pass to pass: the default ones do not move."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        members = [FIRST] * 9 + [SECOND]
        return x.flatten(1) @ members[int(torch.randint(10, (), generator=self.generator))]


@pytest.mark.parametrize("model", [sure_vote, one_member_in_a_thousand, rare, OwnGenerator()])
def test_draws_that_no_answer_shows_are_fresh(model):
    assert draws_afresh(model, X)
    assert draws_anew(model, X, 0)
    assert replayed(model, X, 0) == ""


def test_draws_that_come_again_are_not():
    assert not draws_afresh(seeded_vote, X)
    assert replayed(seeded_vote, X, 0) == HIDDEN
    assert replayed(seeded_beside_a_fresh_draw_that_does_nothing, X, 0) == HIDDEN
    assert not draws_afresh(seeded_dropout, X)
    assert replayed(seeded_dropout, X, 0) == SEEDS
    assert not draws_afresh(lambda x: x.flatten(1) @ FIRST, X)


def test_a_vote_is_judged_by_its_values():
    def vote(x: Tensor) -> Tensor:
        noisy = torch.stack([x.flatten(1) @ FIRST + torch.randn(len(x), 3) for _ in range(4)])
        return F.one_hot(noisy.argmax(dim=2), 3).sum(dim=0).float()

    assert value_slope(vote, X, 96).fits
    assert value_slope(sure_vote, X, 96) is None


class MonteCarlo(nn.Dropout):
    """Ignores eval mode."""

    def train(self, mode: bool = True) -> MonteCarlo:
        return super().train(True)


def test_dropouts_that_are_left_on_in_eval_mode_are_noise():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), MonteCarlo(0.5), nn.Linear(4, 3)).eval()
    model[1].train()
    assert live_dropouts(model) == [model[1], model[2]]
    assert in_train_mode(model) == []
    with in_mode(model, False):
        assert passes_differ(model, X, 0)
        with dropouts_off(model):
            assert not passes_differ(model, X, 0)
        assert model[1].training
    model.train()
    assert live_dropouts(model) == []  # nothing was meant
    with in_mode(model, False):
        assert not model[1].training
