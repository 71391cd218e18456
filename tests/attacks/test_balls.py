"""Properties of the norm balls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from learn2perturb.attacks.balls import BALLS

TOLERANCE = 1e-9  # float64 throughout
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
balls = pytest.mark.parametrize("norm", BALLS)


def test_every_norm_is_tested():
    assert list(BALLS) == ["linf", "l2"]


def images(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@balls
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), eps=st.floats(0, 10), scale=st.sampled_from([1e-6, 1.0, 100.0]))
def test_projection_is_inside_idempotent_and_nearest(norm, shape, seed, eps, scale):
    ball, x, away = BALLS[norm], images(shape, seed), images(shape, seed + 1, scale)
    point = x + away
    before = point.clone(), x.clone()
    projected = ball.project(point, x, eps)
    tolerance = TOLERANCE * (1 + scale + eps)
    assert (ball.distance(projected, x) <= eps + tolerance).all()
    torch.testing.assert_close(ball.project(projected, x, eps), projected, atol=tolerance, rtol=0)
    inside = ball.distance(point, x) <= eps
    torch.testing.assert_close(projected[inside], point[inside], atol=tolerance, rtol=0)
    # Nearest point of a convex set: no other point of the set lies in the direction of what was cut off.
    for number in range(3):
        torch.manual_seed(seed + number)
        other = x + ball.random(x, eps)
        inner = ((point - projected) * (other - projected)).flatten(1).sum(dim=1)
        assert (inner <= tolerance * (1 + scale + eps) * 50).all()
    assert torch.equal(point, before[0])
    assert torch.equal(x, before[1])


@balls
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), eps=st.floats(0, 10))
def test_random_is_inside_and_differs_between_images(norm, shape, seed, eps):
    torch.manual_seed(seed)
    x = images(shape, seed)
    start = BALLS[norm].random(x, eps)
    assert start.shape == x.shape
    assert start.dtype == x.dtype
    assert (BALLS[norm].distance(x + start, x) <= eps + TOLERANCE * (1 + eps)).all()
    if len(x) > 1 and eps > 1e-3:
        assert not torch.equal(start[0], start[1])


@balls
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), size=st.floats(1e-3, 10), scale=st.sampled_from([1e-200, 1.0, 1e200]))
def test_step_has_its_size_and_is_the_steepest(norm, shape, seed, size, scale):
    ball, gradient = BALLS[norm], images(shape, seed, scale)
    step = ball.step(gradient, size)
    torch.testing.assert_close(ball.distance(step, torch.zeros_like(step)), torch.full((shape[0],), size).double())
    dual = 1 if norm == "linf" else 2  # <step, g> = size |g|_dual is the most there is
    direction = gradient / scale
    inner = (step * direction).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, size * direction.flatten(1).norm(p=dual, dim=1))


@balls
def test_step_of_a_zero_gradient_is_zero_and_of_a_vanishing_one_is_not(norm):
    assert torch.equal(BALLS[norm].step(torch.zeros(2, 1, 2, 2), 0.1), torch.zeros(2, 1, 2, 2))
    vanishing = torch.full((1, 1, 2, 2), 1e-25)  # its squares underflow in float32
    distance = BALLS[norm].distance(BALLS[norm].step(vanishing, 0.1), torch.zeros(1, 1, 2, 2))
    assert distance.item() == pytest.approx(0.1, rel=1e-5)


def test_random_is_uniform_in_the_ball():
    x = torch.zeros(4000, 1, 2, 3)
    radius = BALLS["l2"].distance(BALLS["l2"].random(x, 0.5), x)
    assert stats.kstest(((radius / 0.5) ** 6).numpy(), "uniform").pvalue > 1e-3
    pixels = BALLS["linf"].random(x, 0.5).flatten()
    assert stats.kstest((pixels + 0.5).numpy(), "uniform").pvalue > 1e-3
