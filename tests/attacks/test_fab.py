"""FAB and what every minimum-norm attack shares: the smallest norm, by closed form and by linear programming."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize
from torch import nn

from learn2perturb.attacks import FAB
from learn2perturb.attacks.fab import to_plane
from learn2perturb.errors import ConfigError
from tests.problems import Linear, two_logits

SHAPE = (3, 4, 4)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


class Outside(nn.Module):
    """``z = r^2 - |x - c|^2``: images farther from c than r are right, the nearest wrong one is at ``|x - c| - r``."""

    def __init__(self, centre, radius):
        super().__init__()
        self.register_buffer("centre", centre)
        self.radius = radius

    def forward(self, x):
        return two_logits(self.radius**2 - (x - self.centre).flatten(1).square().sum(dim=1))


@norms
def test_a_step_to_the_plane_is_the_smallest_in_the_box(norm):
    x, normal = torch.rand(12, 9, dtype=torch.float64), torch.randn(12, 9, dtype=torch.float64)
    normal[:, 2] = 0
    x[:3, 4] = 1.0
    delta = to_plane(x, normal, offset := torch.randn(12, dtype=torch.float64), norm)
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1
    met = 0
    for row in range(12):
        w, b, low, high = normal[row].numpy(), offset[row].item(), -x[row].numpy(), 1 - x[row].numpy()
        reach = np.where(w * np.sign(b) > 0, high, low) @ w
        if abs(reach) < abs(b):  # the plane misses the box: the nearest corner
            assert (w @ delta[row].numpy()) == pytest.approx(reach)
            continue
        met += 1
        assert (w @ delta[row].numpy()) == pytest.approx(b, abs=1e-9)
        if norm == "linf":  # minimise t with -t <= d <= t
            eye, ones = np.eye(9), np.ones((9, 1))
            rows = np.vstack([np.hstack([eye, -ones]), np.hstack([-eye, -ones])])
            bounds = [*zip(low, high, strict=True), (0, None)]
            best = linprog([0] * 9 + [1], rows, np.zeros(18), [[*w, 0]], [b], bounds=bounds).fun
            assert delta[row].abs().max().item() == pytest.approx(best, abs=1e-7)
        else:
            plane = {"type": "eq", "fun": lambda d, w=w, b=b: w @ d - b}
            start = np.clip(b * w / (w @ w), low, high)
            best = minimize(lambda d: d @ d, start, bounds=list(zip(low, high, strict=True)), constraints=plane).fun
            assert delta[row].norm().item() <= math.sqrt(best) + 1e-5
    assert met >= 6


@norms
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.9999, 1.5])
def test_a_step_to_the_plane_in_many_dimensions_is_what_a_root_finder_says(norm, wait, share):
    """Weights of very different sizes: many coordinates are at their bound before the plane is reached."""
    x, normal = torch.rand(6, 3072, dtype=torch.float64), torch.randn(6, 3072, dtype=torch.float64) ** 7
    room = torch.where(normal > 0, 1 - x, x)
    offset = share * (room * normal.abs()).sum(dim=1)
    delta = to_plane(x, normal, offset, norm, wait=wait)
    for row in range(6):
        weight, most = normal[row].abs().numpy(), room[row].numpy()
        pace = np.ones_like(weight) if norm == "linf" else weight

        def missing(t, weight=weight, most=most, pace=pace, row=row):
            return weight @ np.minimum(t * pace, most) - offset[row].item()

        far = (most / pace).max()
        wanted = np.minimum(
            far if missing(far) <= 0 else brentq(missing, 0, far, xtol=1e-14, maxiter=5000) * pace, most
        )
        np.testing.assert_allclose(delta[row].numpy(), np.sign(normal[row].numpy()) * wanted, atol=1e-7)


@norms
def test_linear_problem_norm_within_five_per_cent_of_the_smallest(norm):
    model, x = Linear(SHAPE), 0.4 + 0.2 * torch.rand(6, *SHAPE)
    model.bias.data -= model(x)[:, 1].detach().max() + 0.5
    gap = -model(x)[:, 1].detach()
    size = model.weight.detach().abs().sum() if norm == "linf" else model.weight.detach().norm()
    result = FAB(norm=norm, steps=10).run(model, x, zeros(x))
    assert result.success.all()
    ratio = result.norms / (gap / size)
    assert ratio.min() >= 0.999
    assert ratio.max() <= 1.05


def test_quadratic_problem_norm_within_five_per_cent_of_the_smallest():
    x = torch.rand(6, *SHAPE)
    model = Outside(torch.full((1, *SHAPE), 0.5), 0.4)
    smallest = (x - 0.5).flatten(1).norm(dim=1) - 0.4
    result = FAB(norm="l2", steps=30).run(model, x, zeros(x))
    assert result.success.all()
    assert (result.norms / smallest).min() >= 0.999
    assert (result.norms / smallest).max() <= 1.05


def test_a_radius_bounds_what_a_minimum_norm_attack_gives_back():
    x = torch.rand(6, *SHAPE)
    model = Outside(torch.full((1, *SHAPE), 0.5), 0.4)
    free = FAB(norm="l2", steps=20).run(model, x, zeros(x))
    eps = free.norms.median().item() + 1e-3
    bound = FAB(eps, norm="l2", steps=20).run(model, x, zeros(x))
    assert torch.equal(bound.success, free.norms <= eps)
    assert 0 < bound.success.sum() < 6
    assert bound.l2.max() <= eps + 1e-6
    assert torch.equal(bound.norms.isinf(), ~bound.success)


def test_an_image_that_is_wrong_already_is_not_moved(trained):
    network, x, y = trained
    wrong = y.clone()
    wrong[:10] = (network(x[:10]).argmax(dim=1) + 1) % 10
    result = FAB(steps=2, targets=1).run(network, x[:20], wrong[:20])
    assert torch.equal(result.x_adv[:10], x[:10])
    assert (result.norms[:10] == 0).all()


def test_more_targets_and_restarts_are_never_farther(trained):
    network, x, y = trained
    one = FAB(norm="l2", steps=15, targets=1, seed=0).run(network, x[:30], y[:30])
    more = FAB(norm="l2", steps=15, targets=9, restarts=2, seed=0).run(network, x[:30], y[:30])
    assert (more.norms <= one.norms * 1.005).all()
    assert (more.norms < one.norms * 0.995).any()


def test_early_stop_ends_at_the_radius(trained):
    network, x, y = trained
    full = FAB(0.2, steps=10, targets=4).run(network, x[:30], y[:30])
    fast = FAB(0.2, steps=10, targets=4, early_stop=True).run(network, x[:30], y[:30])
    assert torch.equal(full.success, fast.success)
    assert fast.backward_passes < full.backward_passes
    with pytest.raises(ConfigError, match="early_stop=True needs a finite eps"):
        FAB(early_stop=True)


def asked(attack, model, x):
    """Return the points (in order) that the attack asks for."""
    points = []
    attack(lambda images: (points.append(images.detach().clone()), model(images))[1], x, zeros(x))
    return points


@norms
def test_a_step_lands_behind_the_boundary_and_the_next_starts_on_the_way_back(norm):
    x = 0.45 + 0.1 * torch.rand(3, *SHAPE)
    model = Linear(SHAPE)
    with torch.no_grad():
        model.bias -= model(x)[:, 1].max() + 0.1
    points = asked(FAB(norm=norm, steps=2, targets=0), model, x)
    at_x = [index for index, point in enumerate(points) if torch.equal(point, x)]
    landed, back = points[at_x[-1] + 1], points[at_x[-1] + 2]
    # On the boundary z is 0: 5 % behind it, z is -5 % of what it was at x; then 90 % of the way from x.
    start = model(x)[:, 1]
    torch.testing.assert_close(model(landed)[:, 1], -0.05 * start, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(back, x + 0.9 * (landed - x))


@norms
def test_a_step_is_drawn_towards_the_image_by_a_tenth_at_most(norm):
    torch.manual_seed(0)
    x = 0.45 + 0.1 * torch.rand(3, *SHAPE)
    model = Linear(SHAPE)
    with torch.no_grad():
        model.bias -= model(x)[:, 1].max() + 0.5
    points = asked(FAB(norm=norm, steps=1, targets=0, restarts=2, seed=0), model, x)
    start, landed = (
        points[-11],
        points[-10],
    )  # before the 8 bisections and the verification: where the second run started and went
    weight = model.weight.detach().flatten().expand(3, -1)

    def onto_boundary(point):
        return to_plane(point.flatten(1), weight, -model(point)[:, 1].detach(), norm).view_as(x)

    there, direct = onto_boundary(start), onto_boundary(x)
    assert not torch.allclose(start, x)
    torch.testing.assert_close(landed, 0.9 * (start + 1.05 * there) + 0.1 * (x + 1.05 * direct), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(start + 1.05 * there, x + 1.05 * direct, atol=1e-3)  # else the share would not show


class Plateau(nn.Module):
    """Beyond the boundary nothing is wrong: the two logits are equal there."""

    def forward(self, x):
        return two_logits((x.flatten(1).mean(dim=1) - 0.6).clamp_max(0.0))


def test_a_tie_is_not_wrong():
    x = torch.full((2, *SHAPE), 0.5)
    assert torch.equal(FAB(math.inf, steps=3)(Plateau(), x, zeros(x)), x)
    tied = nn.Flatten(2)
    tied.forward = lambda x: two_logits((x.flatten(1) - 0.5).sum(dim=1))
    found = FAB(0.5, steps=3, restarts=3, seed=0)(tied, x, zeros(x))
    assert bool((tied(found)[:, 1] > 0).all())  # on its boundary an image has no way to go, but from elsewhere


def test_bisection_ends_on_the_wrong_side_of_a_tie():
    """Halfway the two logits are equal, which bisection meets at once."""
    query = SimpleNamespace(value=lambda points, y, loss: SimpleNamespace(margin=points.flatten(1).mean(dim=1) - 0.5))
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)
    found = FAB(math.inf)._bisected(query, x, zeros(x), torch.ones_like(x))
    assert 0.5 < found.max().item() < 0.505


def test_of_two_points_as_near_the_first_is_kept(monkeypatch):
    torch.manual_seed(0)
    model, x = Linear(SHAPE), torch.full((2, *SHAPE), 0.5)
    with torch.no_grad():
        model.bias -= model(x)[0, 1] + 0.2
    monkeypatch.setattr(FAB, "_size", lambda self, delta: torch.ones(len(delta)))
    monkeypatch.setattr(FAB, "_bisected", lambda self, query, x, y, best: best)
    first, more = (FAB(math.inf, steps=steps)(model, x, zeros(x)) for steps in (1, 4))
    assert bool((first != x).any()) and torch.equal(first, more)


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_restarts_begin_in_the_box(pixel):
    asked = []
    model = Linear(SHAPE)

    def listening(x):
        asked.append((float(x.detach().min()), float(x.detach().max())))
        return model(x)

    x = torch.full((3, *SHAPE), pixel)
    FAB(0.5, steps=1, restarts=3, targets=0, seed=0)(listening, x, zeros(x))
    assert min(low for low, _ in asked) >= 0 and max(high for _, high in asked) <= 1


@norms
@pytest.mark.parametrize("targets", [0, 1])
def test_an_image_of_which_two_logits_are_equal_is_moved(norm, targets):
    """The first of equal logits is the answer, and the nearest wrong image is next to this one."""
    x = torch.full((3, *SHAPE), 0.5)

    def model(images):
        return two_logits(images.flatten(1).sum(dim=1) - 0.5 * math.prod(SHAPE))

    assert torch.equal(model(x), torch.zeros(3, 2))
    result = FAB(norm=norm, steps=5, targets=targets).run(model, x, zeros(x))
    assert result.success.all()
    assert result.norms.min() > 0 and result.norms.max() <= 1.1e-4
