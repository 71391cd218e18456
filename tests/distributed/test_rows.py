"""Draws on a share of a batch are those that its rows have in the whole batch; alone, nothing is watched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from learn2perturb.engine import execution, fused, rows
from learn2perturb.engine.ranks import ALONE, Ranks, Share, current_share
from learn2perturb.engine.rows import sharded, shared_by_all
from learn2perturb.noise import Perturbation

ROWS = Share(Ranks(1, 3), 11)  # rows 3 to 6


DRAWS = {
    "rand": lambda n: torch.rand(n, 3),
    "rand of a size": lambda n: torch.rand((n, 2)),
    "randn_like": lambda n: torch.randn_like(torch.empty(n, 2, 4, 4).contiguous(memory_format=torch.channels_last)),
    "randint": lambda n: torch.randint(0, 9, (n, 2)),
    "normal_": lambda n: torch.empty(n, 5).normal_(),
    "many numbers a row": lambda n: torch.empty(n, 8192).normal_(1.0, 0.5),
    "many of doubles": lambda n: torch.empty(n, 8192, dtype=torch.float64).normal_(),
    "many and no whole blocks": lambda n: torch.empty(n, 8191).normal_(),
    "one number a row": lambda n: torch.empty(n).uniform_(),
    "normal of tensors": lambda n: torch.normal(torch.zeros(n, 2), torch.ones(n, 2)),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n, 3), 0.3)),
    "bernoulli_": lambda n: torch.empty(n, 3).bernoulli_(0.3),
    "exponential_": lambda n: torch.empty(n, 3).exponential_(),
    "multinomial": lambda n: torch.multinomial(torch.tensor([0.2, 0.5, 0.3, 0.1]), n, replacement=True),
    "multinomial of rows": lambda n: torch.multinomial(torch.ones(n, 4), 2),
    "dropout": lambda n: F.dropout(torch.ones(n, 6), 0.4),
    "dropout2d": lambda n: nn.Dropout2d(0.4)(torch.ones(n, 6, 2, 2)),
    "gumbel_softmax": lambda n: F.gumbel_softmax(torch.zeros(n, 4)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_rows_have_the_draws_of_the_whole_batch_and_streams_stay_in_step(name):
    torch.manual_seed(5)
    whole, after = DRAWS[name](11), torch.rand(7)
    torch.manual_seed(5)
    with sharded(ROWS):
        part, then = DRAWS[name](ROWS.rows), torch.rand(7)
    assert torch.equal(part, whole[ROWS.start : ROWS.stop])
    assert torch.equal(then, after)


def test_normal_numbers_of_other_rows_are_passed_over_and_not_drawn(monkeypatch):
    drawn, draw = [], rows._blank
    monkeypatch.setattr(rows, "_blank", lambda *which: drawn.append(which) or draw(*which))
    with sharded(ROWS):
        torch.empty(ROWS.rows, 8192).normal_()
        assert not drawn
        torch.empty(ROWS.rows, 8192).uniform_()
        assert drawn


def test_two_batches_in_one_have_the_draws_of_both():
    torch.manual_seed(5)
    whole = torch.randn(22, 3)
    torch.manual_seed(5)
    with sharded(ROWS):
        part = torch.randn(2 * ROWS.rows, 3)
    assert torch.equal(part, torch.cat([whole[3:7], whole[14:18]]))


def test_what_no_row_has_is_drawn_alike_by_all_whatever_its_length():
    noise = Perturbation((4, 2), site="w", place="weight", init=1.0)
    torch.manual_seed(5)
    expected = noise.draw(torch.zeros(4, 2)), torch.randn(1, 3), torch.randn_like(nn.Parameter(torch.zeros(4, 2)))
    torch.manual_seed(5)
    with sharded(ROWS):
        found = noise.draw(torch.zeros(4, 2)), torch.randn(1, 3), torch.randn_like(nn.Parameter(torch.zeros(4, 2)))
        with shared_by_all():
            assert current_share() is None
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_alone_or_with_too_few_rows_nothing_is_watched():
    for share in (Share(ALONE, 8), Share(Ranks(1, 4), 7)):
        with sharded(share):
            assert _get_current_function_mode() is None
            assert current_share() is None
        assert (share.start, share.stop) == (0, share.total)
    assert Share(Ranks(1, 4), 7).weight == 0.25


def test_shares_are_all_rows_in_order_once_and_as_even_as_may_be():
    for world in range(1, 6):
        for total in range(2 * world, 23):
            shares = [Share(Ranks(rank, world), total) for rank in range(world)]
            assert [row for one in shares for row in range(one.start, one.stop)] == list(range(total))
            assert max(one.rows for one in shares) - min(one.rows for one in shares) <= 1
            assert sum(one.weight for one in shares) == pytest.approx(1)


def test_hashed_draws_of_a_share_are_those_of_its_rows():
    key, table = torch.tensor([12345, -678], dtype=torch.int32), fused.quantile_table("gaussian")
    whole = fused.draws(11, 6, key, table)
    assert torch.equal(fused.draws(4, 6, key, table, 3), whole[3:7])


@pytest.mark.slow
def test_noise_in_one_kernel_is_that_of_the_rows():
    noise = Perturbation((2, 3, 3), site="x", init=0.5)
    x = torch.randn(11, 2, 3, 3)
    with execution.running(execution.FAST), torch.no_grad():
        torch.manual_seed(5)
        whole = noise.perturb(x)
        torch.manual_seed(5)
        with sharded(ROWS):
            part = noise.perturb(x[3:7])
    assert torch.equal(part, whole[3:7])
