"""Numbers of others are passed over: what follows is what torch would have drawn, to the last bit."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.engine import stream

ROW = 4096


@pytest.fixture
def known_anew():
    stream._is_as_known.cache_clear()
    yield
    stream._is_as_known.cache_clear()


# A Mersenne Twister makes 624 words at a time: begun, in the middle, at the last, at the first of the next.
@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 625])
@pytest.mark.parametrize(("before", "after"), [(0, 9), (9, 0), (5, 4)])
def test_the_middle_of_a_tensor_has_the_numbers_that_it_has_in_the_whole(before, after, drawn):
    torch.manual_seed(drawn)
    torch.empty(drawn, dtype=torch.int32).random_()
    begin = torch.get_rng_state()
    whole, end = torch.empty(12, ROW).normal_(0.5, 2.0), torch.get_rng_state()
    torch.set_rng_state(begin)
    part = torch.empty(3, ROW)
    assert stream.fill_between(part, before * ROW, after * ROW, 0.5, 2.0)
    assert torch.equal(part, whole[before : before + 3])
    assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize(
    ("target", "before"),
    [
        (torch.zeros(3, ROW, dtype=torch.float64), 9 * ROW),
        (torch.zeros(3, ROW).t(), 9 * ROW),
        (torch.zeros(3, ROW), 9 * ROW + 1),
        (torch.zeros(3, 15), 9 * ROW),
        (torch.zeros(0, ROW), 9 * ROW),
        (torch.zeros(3, ROW), 16),
    ],
    ids=["float64", "no block of memory", "half a block before", "half a block", "nothing", "not worth it"],
)
def test_what_is_not_known_is_left_alone(target, before):
    state = torch.get_rng_state()
    assert not stream.fill_between(target, before, 0)
    assert not target.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_that_keeps_another_state_is_not_gone_ahead_of(known_anew, monkeypatch):
    assert stream._is_as_known()
    stream._is_as_known.cache_clear()
    monkeypatch.setattr(stream, "_KEY", slice(16, 16 + 8 * 624))
    state = torch.get_rng_state()
    assert not stream.fill_between(torch.empty(3, ROW), 9 * ROW, 0)
    assert torch.equal(torch.get_rng_state(), state)
