"""Whether passes differ: how many are asked, and of which images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learn2perturb.attacks.probing import passes_differ


class Counting:
    """Logits that differ in one pass alone, if at all; each pass may draw a number that changes nothing."""

    def __init__(self, *, draws: bool, other: int | None = None) -> None:
        self.draws, self.other, self.sizes = draws, other, []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.draws:
            torch.rand(1)
        return x.flatten(1) + (len(self.sizes) == self.other)


@pytest.mark.parametrize(("draws", "passes"), [(False, 8), (True, 64)])
def test_a_model_that_draws_is_asked_more_often_since_its_noise_may_be_rare(draws, passes):
    x = torch.rand(20, 1, 2, 2)
    same = Counting(draws=draws)
    assert not passes_differ(same, x)
    assert len(same.sizes) == passes and len(set(same.sizes)) == 1
    assert passes_differ(Counting(draws=draws, other=passes), x)
    assert not passes_differ(Counting(draws=draws, other=passes + 1), x)


def test_asking_takes_nothing_from_the_draws_that_come_later():
    x = torch.rand(2, 1, 2, 2)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    passes_differ(Counting(draws=True), x)
    assert torch.equal(torch.rand(2), expected)
