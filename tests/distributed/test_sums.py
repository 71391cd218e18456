"""Sums over processes: small ones are told to each, large ones go round; both are the same."""

from __future__ import annotations

import itertools

import torch

from learn2perturb.engine import ranks
from tests.distributed.processes import together


def test_a_sum_is_the_same_however_it_is_told(tmp_path, monkeypatch):
    def work(rank):
        found = []
        with ranks.joined() as them:
            for few in (8, 0):
                monkeypatch.setattr(ranks, "_FEW", few)
                for own in (torch.arange(6.0, dtype=torch.float64), torch.arange(6, dtype=torch.int32).view(2, 3).t()):
                    found.append((them.sum(own * 10**rank), len(them.spent)))
                found.append((them.sum(torch.full((20_000,), float(rank))), len(them.spent)))
        return found

    for found in together(3, work, tmp_path):
        sums, messages = zip(*found, strict=True)
        for one, other in zip(sums[:3], sums[3:], strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        assert torch.equal(sums[0], 111 * torch.arange(6.0, dtype=torch.float64))
        assert [later - before for before, later in itertools.pairwise(messages)] == [1] * 5
