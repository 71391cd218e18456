"""Square: needs no gradient, keeps to ball and box, believes no lucky score."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.attacks import PGD, Square
from learn2perturb.attacks.proposals import MOVES, bumps, stripes
from learn2perturb.errors import ConfigError
from tests.problems import Linear, NoisyLinear

SHAPE = (3, 10, 10)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


def test_linear_problem_is_all_but_solved():
    model = Linear((3, 4, 4), bias=-100.0)  # never wrong: the search goes on to the end
    x = 0.4 + 0.2 * torch.rand(5, 3, 4, 4)
    z = [model(Square(0.1, queries=600, seed=0)(model, x, zeros(x)))[:, 1], model(x)[:, 1]]
    best = model(model.optimum(x, 0.1, "linf"))[:, 1]
    assert ((z[0] - z[1]) / (best - z[1])).min() > 0.95


@norms
def test_a_model_without_gradients_is_broken(norm, trained):
    network, x, y = trained

    def stepped(x):
        return network((x * 8).round() / 8).mul(4).round()

    eps = {"linf": 0.2, "l2": 1.2}[norm]
    clean = (stepped(x).argmax(dim=1) == y).float().mean().item()
    result = Square(eps, norm=norm, queries=150, seed=0).run(stepped, x, y)
    assert 1 - result.success_rate < clean - 0.3
    assert result.backward_passes == 0
    # Its gradient is 0 everywhere: PGD from x does not move at all.
    assert torch.equal(PGD(eps, norm=norm, random_start=False)(stepped, x, y), x)


@norms
def test_proposals_stay_in_ball_and_box(norm):
    x, eps = torch.rand(8, *SHAPE), {"linf": 0.1, "l2": 0.7}[norm]
    point = stripes(x, eps) if norm == "linf" else bumps(x, eps)
    for side in (9, 7, 5, 3):
        moved = MOVES[norm].drawn(x, side).shown(point, x, eps)
        changed = (moved != point).any(dim=1).flatten(1).sum(dim=1)
        assert changed.max() <= 2 * side**2 or norm == "l2"
        assert len({tuple(place.tolist()) for place in (moved != point).any(dim=1).flatten(1)}) > 1  # each has its own
        point = moved
        assert point.min() >= 0
        assert point.max() <= 1
        delta = (point - x).flatten(1)
        size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
        assert size.max() <= eps + 1e-6
    inside = 0.4 + 0.2 * x
    if norm == "l2":  # where the box does not bind, the whole radius is used
        delta = (MOVES[norm].drawn(inside, 3).shown(bumps(inside, 0.3), inside, 0.3) - inside).flatten(1)
        torch.testing.assert_close(delta.norm(dim=1), torch.full((8,), 0.3))


def test_squares_shrink_by_the_published_schedule():
    x = torch.rand(1, 3, 32, 32)
    attack = Square(queries=10_000)
    sides = {number: attack._side(number, x) for number in (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)}
    assert list(sides.values()) == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert Square(queries=1000)._side(101, x) == attack._side(1010, x) == 5
    assert Square(queries=1000, rescale=False)._side(101, x) == attack._side(101, x) == 14
    assert Square(0.5, norm="l2", queries=10_000)._side(9000, x) == 3


def test_a_broken_image_asks_no_more(trained):
    network, x, y = trained
    result = Square(0.25, queries=100, seed=0).run(network, x, y)
    assert result.success_rate > 0.3
    assert result.forward_passes < 90


def test_a_stochastic_model_is_asked_to_the_end_and_incumbents_are_scored_again():
    x, model = torch.rand(4, 3, 4, 4), NoisyLinear((3, 4, 4))
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    result = Square(0.1, queries=40, eot=3).run(model, x, zeros(x))
    assert set(sizes) == {4}
    assert result.forward_passes == 3 * (40 + 4)


def test_a_lucky_score_is_forgotten():
    """One draw in the first scores is a jackpot: without new scores of incumbents nothing would ever replace it."""
    linear, calls = Linear((3, 4, 4), bias=-50.0), []

    def model(x):
        calls.append(len(x))
        lucky = 49.0 if len(calls) <= 2 else 0.0
        return linear(x) + lucky * torch.tensor([0.0, 1.0])

    x = torch.full((4, 3, 4, 4), 0.5)
    x_adv = Square(0.1, queries=300, eot=2, seed=0)(model, x, zeros(x))
    gain = (linear(x_adv) - linear(x))[:, 1]
    assert (gain / (linear(linear.optimum(x, 0.1, "linf")) - linear(x))[:, 1]).min() > 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "queries must be a whole number of at least 1, got 0"),
        ({"p_init": 0}, r"p_init must be a share of the pixels in \(0, 1\], got 0; 0.8 is usual"),
        ({"loss": "dlr"}, "loss is 'dlr'; allowed: margin, ce"),
        ({"rescale": 1}, "rescale must be True or False, got 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Square(**settings)


@norms
def test_a_point_that_is_no_better_is_not_taken(norm):
    x = torch.rand(3, *SHAPE)
    flat = lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2)  # noqa: E731
    first, last = (Square(0.1, norm=norm, queries=queries, seed=0)(flat, x, zeros(x)) for queries in (1, 30))
    assert torch.equal(first, last)
