"""RayS: labels are all it reads, and on a linear model it finds the nearest point of the box."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import RayS
from learn2perturb.attacks.query import Query
from learn2perturb.engine.random import isolated_rng

PIXELS = 16
WEIGHT = torch.randn(PIXELS, generator=torch.Generator().manual_seed(0))
X = 0.4 + 0.2 * torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def score(x: Tensor) -> Tensor:
    return (x.flatten(1) - 0.5) @ WEIGHT.to(x.dtype)


def label(x: Tensor) -> Tensor:
    """A linear model that says its label alone."""
    return nn.functional.one_hot((score(x) > 0).long(), 2).float()


Y = (score(X) > 0).long()
# The l_inf distance of a linear boundary.
DISTANCE = score(X).abs() / WEIGHT.abs().sum()


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.06])
def test_it_breaks_what_can_be_broken_of_a_linear_model(eps):
    result = RayS(eps, queries=600, seed=0).run(label, X, Y)
    broken = label(result.x_adv).argmax(dim=1) != Y
    assert not broken[eps < DISTANCE].any()
    assert broken[eps > 1.1 * DISTANCE].all()
    assert result.forward_passes <= 616  # a bisection is not cut short


def test_what_is_wrong_already_stays():
    result = RayS(0.01, queries=20, seed=0).run(label, X, 1 - Y)
    assert torch.equal(result.x_adv, X)
    assert result.forward_passes <= 6  # two decisions, and whether the model is random


def test_of_a_random_model_the_answer_of_most_draws_counts():
    def noisy(x: Tensor) -> Tensor:
        return label(x + 0.01 * torch.randn_like(x))

    with isolated_rng():
        torch.manual_seed(0)
        found = RayS(0.1, queries=200, eot=9, seed=0).run(noisy, X, Y).x_adv
    assert (label(found).argmax(dim=1) != Y).float().mean() > 0.9


def test_targeted_it_looks_for_the_target():
    found = RayS(0.2, queries=300, targeted=True, seed=0).run(label, X, 1 - Y).x_adv
    assert (label(found).argmax(dim=1) == 1 - Y).float().mean() > 0.9


# --- written again, image by image


def wavy(x: Tensor) -> Tensor:
    """Its label changes back and forth along a ray, so that a radius that was broken may not be again."""
    return nn.functional.one_hot((torch.sin(23 * score(x)) > 0).long(), 2).double()


def pieces(size):
    """The whole, then pieces of half the length, to single pixels, and again."""
    lengths = [size]
    while lengths[-1] > 1:
        lengths.append(math.ceil(lengths[-1] / 2))
    while True:
        for length in lengths:
            for start in range(0, size, length):
                yield range(start, min(start + length, size))


def by_hand(model, x, y, eps, queries, drop):
    """The point of one image, whether it is broken, and how often it was asked about."""
    flat, size = x.flatten().tolist(), x.numel()
    ray, low, high, asked = [1.0] * size, 0.0, 1.0, 0

    def point(directions, radius):
        moved = [min(max(v + radius * d, 0.0), 1.0) for v, d in zip(flat, directions, strict=True)]
        return torch.tensor(moved, dtype=x.dtype).view_as(x)

    order = pieces(size)
    for number in range(queries):
        asked += 1
        if number % 2 == 0:
            block = next(order)
            trial = [-d if i in block else d for i, d in enumerate(ray)]
            if model(point(trial, high)[None]).argmax(1).item() != y:
                ray, low = trial, 0.0
            continue
        radius = eps if low < eps else (low + high) / 2
        if model(point(ray, radius)[None]).argmax(1).item() != y:
            high = radius
        else:
            low, high = radius, max(high, 1.05 * eps)
        if drop and high <= eps:
            return point(ray, high), True, asked
    return point(ray, min(high, eps)), False, asked


@pytest.mark.parametrize("model", [label, wavy])
@pytest.mark.parametrize(("eps", "queries", "drop"), [
    (0.03, 90, True), (0.06, 41, True), (0.03, 60, False), (0.1, 7, False), (0.02, 2, True), (0.3, 1, False),
])  # fmt: skip
def test_the_search_image_by_image(model, eps, queries, drop):
    with torch.no_grad():
        x = X[:8].double()
        y = model(x).argmax(1)
        attack = RayS(eps, queries=queries)
        query = Query(model, attack, y, strict=True)
        found, broken = attack._search(query, x, y, drop)
        hand = [by_hand(model, one, label.item(), eps, queries, drop) for one, label in zip(x, y, strict=True)]
    torch.testing.assert_close(found, torch.stack([point for point, *_ in hand]).double(), atol=1e-6, rtol=0)
    assert broken.tolist() == [one for _, one, _ in hand]
    assert query.forwards == sum(asked for *_, asked in hand)


@pytest.mark.parametrize(("shares", "changed"), [([1, 1, 0], True), ([1, 0, 0], False), ([1, 0], False), ([1], True)])
def test_more_than_half_of_the_draws_decide(shares, changed):
    answers = iter(shares)

    def drawn(x):
        return torch.tensor([[0.0, 1.0]] if next(answers) else [[1.0, 0.0]]).expand(len(x), 2)

    attack, y = RayS(0.1, eot=len(shares)), torch.zeros(1).long()
    assert attack._changed(Query(drawn, attack, y, strict=True), X[:1], y, X[:1], torch.ones(1)).tolist() == [changed]


def test_an_image_of_one_pixel_has_rays_too():
    x, y = torch.tensor([0.4, 0.7]).view(2, 1, 1, 1), torch.tensor([0, 1])

    def model(images: Tensor) -> Tensor:
        return nn.functional.one_hot((images.flatten() > 0.5).long(), 2).float()

    found = RayS(0.25, queries=40, seed=0).run(model, x, y)
    assert found.success.all()
