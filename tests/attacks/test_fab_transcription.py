"""FAB against algorithm 1 of its paper, written again for one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from learn2perturb.attacks import FAB
from learn2perturb.attacks.fab import to_plane
from learn2perturb.errors import ConfigError

SHAPE = (2, 3, 3)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def network(classes: int = 4) -> nn.Sequential:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(18, 16), nn.Tanh(), nn.Linear(16, classes)).double()
    layers[1].weight.data.mul_(4)
    return layers.requires_grad_(False)


def batch(model: nn.Module, count: int = 4):
    x = torch.rand(count, *SHAPE, dtype=torch.float64)
    return x, model(x).argmax(dim=1)


def size_of(delta, norm):
    return (delta.abs().max() if norm == "linf" else delta.norm()).item()


def run_by_hand(model, x, label, target, start, steps, norm, best, nearest):
    """One run towards ``target`` (None: the likeliest wrong class at every step): the nearest point, its distance."""

    def logits(point):
        return model(point[None])[0]

    def gap(point):
        z = logits(point)
        if target is not None:
            return z[target] - z[label]
        return torch.cat([z[:label], z[label + 1 :]]).max() - z[label]

    point = start
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        value = gap(leaf)
        (w,) = torch.autograd.grad(value, leaf)
        b = -value.detach()  # the plane: w . (z - point) = b

        def onto(origin, w=w, b=b, point=point):
            offset = (b - (w * (origin - point)).sum()).view(1)
            return to_plane(origin.reshape(1, -1), w.reshape(1, -1), offset, norm).view_as(x)

        there, direct = onto(point), onto(x)
        near, far = size_of(there, norm), size_of(direct, norm)
        alpha = min(near / max(near + far, 1e-12), 0.1)
        point = ((1 - alpha) * (point + 1.05 * there) + alpha * (x + 1.05 * direct)).clamp(0, 1)
        if logits(point).argmax() != label:
            if size_of(point - x, norm) < nearest:
                best, nearest = point, size_of(point - x, norm)
            point = x + 0.9 * (point - x)
    return best, nearest


def bisected_by_hand(model, x, label, best):
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        if model((x + middle * (best - x))[None])[0].argmax() != label:
            high = middle
        else:
            low = middle
    return x + high * (best - x)


@norms
@pytest.mark.parametrize("targets", [0, 1, 3])
def test_equals_the_paper(norm, targets):
    model = network()
    x, y = batch(model)
    found = FAB(norm=norm, steps=6, targets=targets)(model, x, y)
    for image, label, point in zip(x, y.tolist(), found, strict=True):
        order = [k for k in model(image[None])[0].argsort(descending=True).tolist() if k != label]
        best, nearest = image, math.inf
        for target in order[:targets] if targets else [None]:
            best, nearest = run_by_hand(model, image, label, target, image, 6, norm, best, nearest)
        wanted = bisected_by_hand(model, image, label, best)
        torch.testing.assert_close(point, wanted, atol=1e-9, rtol=0)


@norms
def test_a_restart_begins_within_half_the_distance_found(norm):
    model = network()
    x, y = batch(model, 8)
    seen = []

    def watched(images):
        seen.append(images.detach().clone())
        return model(images)

    FAB(norm=norm, steps=3, targets=0, restarts=2, seed=0)(watched, x, y)
    one = FAB(norm=norm, steps=3, targets=0)(model, x, y)
    # A pass of the images, 3 steps of two passes, and there the second run begins.
    starts = seen[1 + 6]
    away, reach = ((points - x).flatten(1) for points in (starts, one))
    order = math.inf if norm == "linf" else 2
    away, reach = (torch.linalg.vector_norm(one, order, dim=1) for one in (away, reach))
    widest = {"linf": 0.3, "l2": 1.0}[norm]
    # Bisection has drawn the first run's point nearer by less than a tenth.
    assert (away <= 0.5 * (1.15 * reach).clamp(max=widest) + 1e-9).all()
    assert (away > 0).all()
    if norm == "linf":
        assert (away > 0.3 * reach.clamp(max=widest)).all()  # of 18 uniform numbers, the largest


@norms
def test_a_restart_of_an_image_that_stands_begins_within_the_paper_s_widest_or_the_radius(norm):
    x, y = 0.5 + 0 * torch.rand(200, *SHAPE, dtype=torch.float64), torch.zeros(200, dtype=torch.int64)
    for eps, widest in ((math.inf, {"linf": 0.3, "l2": 1.0}[norm]), (0.1, 0.1)):
        seen = []

        def stubborn(images, seen=seen):
            seen.append(images.detach().clone())
            z = 1e-3 * images.flatten(1).sum(dim=1)
            return torch.stack([z + 50, z * 2], dim=1)

        FAB(eps, norm=norm, steps=1, targets=0, restarts=2, seed=0)(stubborn, x, y)
        away = (seen[3] - x).flatten(1)
        largest = away.abs().max() if norm == "linf" else away.norm(dim=1).max()
        assert 0.49 * widest < largest <= 0.5 * widest + 1e-9


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"targets": 0}, 1),
        ({"targets": 2}, 2),
        ({"targets": 9}, 3),  # all there are
        ({"targets": 2, "restarts": 3}, 6),
        ({"targets": 0, "restarts": 2}, 2),
        ({"targets": 2, "targeted": True}, 1),
    ],
)
def test_a_run_for_each_target_and_restart(settings, runs):
    model = network()
    x, y = batch(model)
    y = (y + 1) % 4 if settings.get("targeted") else y
    result = FAB(steps=5, **settings).run(model, x, y)
    targets = settings["targets"] and "targeted" not in settings
    assert result.backward_passes == 5 * runs
    assert result.forward_passes == 1 + bool(targets) + 2 * 5 * runs + 8


def test_early_stop_drops_only_what_is_broken_inside_the_radius_in_a_single_pass():
    model = network()
    x, y = batch(model, 12)
    free = FAB(steps=8, targets=1).run(model, x, y)
    eps = free.norms.median().item()
    for eot in (1, 2):
        attack = FAB(eps, steps=8, targets=3, eot=eot)
        slow, fast = attack.run(model, x, y), FAB(eps, steps=8, targets=3, eot=eot, early_stop=True).run(model, x, y)
        assert torch.equal(slow.success, fast.success)
        assert slow.backward_passes == 24 * eot
        assert (fast.backward_passes < slow.backward_passes) == (eot == 1)
    everything = FAB(1.0, steps=8, targets=3, early_stop=True).run(model, x, y)
    assert everything.success.all()
    assert everything.backward_passes < 8  # an image leaves with the first point inside the radius


def test_an_infinite_radius_and_early_stop_exclude_each_other():
    assert FAB(0.1, early_stop=True).early_stop
    assert FAB(early_stop=False).eps == math.inf
    with pytest.raises(ConfigError, match="early_stop=True needs a finite eps, .*; got eps=inf"):
        FAB(early_stop=True)
    for name, lowest in (("steps", 1), ("restarts", 1), ("targets", 0)):
        assert getattr(FAB(**{name: lowest}), name) == lowest
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least {lowest}"):
            FAB(**{name: lowest - 1})


def test_a_margin_of_0_is_not_wrong_and_an_equal_distance_is_not_nearer():
    """Where both logits are equal everywhere nothing is ever wrong, so nothing is returned but the images."""
    x, y = torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.int64)

    def even(images):
        z = images.flatten(1).sum(dim=1)
        return torch.stack([z, z], dim=1) * torch.tensor([1.0, 1.0])

    result = FAB(steps=3, targets=0).run(even, x, y)
    assert torch.equal(result.x_adv, x)
    assert result.linf.max() == 0


def test_each_target_is_approached_by_its_own_gradient():
    model = network()
    x, y = batch(model)
    order = model(x).scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)
    seen = []

    def watched(images):
        seen.append(images.detach().clone())
        return model(images)

    FAB(steps=1, targets=3)(watched, x, y)
    for run in range(3):
        leaf, target = x.clone().requires_grad_(), order[:, run : run + 1]
        gap = (model(leaf).gather(1, target) - model(leaf).gather(1, y[:, None])).squeeze(1)
        (w,) = torch.autograd.grad(gap.sum(), leaf)
        wanted = x + 1.05 * to_plane(x.flatten(1), w.flatten(1), -gap.detach(), "linf").view_as(x)
        # Two passes before the first run: the images' margins, and who is likely.
        torch.testing.assert_close(seen[3 + 2 * run], wanted.clamp(0, 1), atol=1e-9, rtol=0)


def test_an_image_at_the_radius_counts_as_broken():
    x, y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)

    def linear(images):
        z = images.flatten(1).sum(dim=1) - 18 * 0.5 - 18 * 0.1
        return torch.stack([torch.zeros_like(z), z], dim=1)

    # One step lands at 1.05 * 0.1, which is the radius.
    landed = FAB(steps=1, targets=0).run(linear, x, y)
    assert landed.success.all()
    calls = []
    attack = FAB(0.2, steps=1, targets=0, restarts=3, early_stop=True)
    attack(lambda images: (calls.append(len(images)), linear(images))[1], x, y)
    assert sum(calls[8:]) == 2 + 2 * 2 + 2  # the margin at x, one step, the verification: no second run


# --- the step onto the plane


@norms
def test_a_step_to_the_plane_where_there_is_nothing_to_choose(norm):
    x = torch.tensor([[0.5, 0.5], [0.2, 0.9], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    normal = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    offset = torch.tensor([0.25, 1.0, 0.0, 1.0], dtype=torch.float64)
    delta = to_plane(x, normal, offset, norm)
    # One pixel counts; none does; the point is on the plane; the box leaves no way.
    wanted = torch.tensor([[0.25, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(delta, wanted)
    assert to_plane(x.float(), normal.float(), offset.float(), norm).isfinite().all()


@norms
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_pixel_at_its_bound_leaves_its_share_to_the_others(norm, side):
    x = torch.tensor([[0.5, 0.5 + side * 0.4, 0.5]], dtype=torch.float64)
    normal = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    delta = to_plane(x, normal, torch.tensor([side * 0.7], dtype=torch.float64), norm)
    torch.testing.assert_close(delta, side * torch.tensor([[0.3, 0.1, 0.3]], dtype=torch.float64))
