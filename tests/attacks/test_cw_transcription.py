"""Carlini-Wagner against its paper, written again for one image at a time; what a stochastic model is asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from learn2perturb.attacks import CW
from learn2perturb.attacks.cw import _Search
from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError
from tests.problems import two_logits

SHAPE = (1, 3, 3)


def network(classes: int = 3) -> nn.Sequential:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, classes)).double()
    layers[1].weight.data.mul_(4)
    return layers.requires_grad_(False)


def cw_by_hand(model, x, label, *, kappa, steps, search_steps, lr, c, largest, abort, targeted):
    def margin(point):
        z = model(point[None])[0]
        gap = torch.cat([z[:label], z[label + 1 :]]).max() - z[label]
        return -gap if targeted else gap

    if margin(x) > kappa:
        return x
    best, nearest, lower, upper = x, math.inf, 0.0, math.inf
    for _ in range(search_steps):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam = torch.optim.Adam([w], lr=lr)
        worked, lowest, waits = False, math.inf, 0
        for step in range(steps):
            point = (torch.tanh(w) + 1) / 2
            gap = margin(point)
            distance = (point - x).square().sum()
            objective = distance + c * (kappa - gap).clamp(min=0)
            if gap > kappa:
                worked = True
                if distance.sqrt() < nearest:
                    best, nearest = point.detach(), distance.sqrt().item()
            adam.zero_grad()
            objective.backward()
            adam.step()
            if abort and step % max(1, steps // 10) == 0:
                waits = waits + 1 if objective > 0.9999 * lowest else 0
                lowest = min(lowest, objective.item())
                if waits >= 3:
                    break
        if worked:
            upper = min(upper, c)
        else:
            lower = max(lower, c)
        c = min((lower + upper) / 2 if upper < math.inf else 10 * c, largest)
    return best


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 25, "search_steps": 5, "initial_c": 0.01},
        {"steps": 40, "search_steps": 2, "initial_c": 5.0},
        {"steps": 25, "search_steps": 4, "initial_c": 0.1, "confidence": 0.3},
        {"steps": 8, "search_steps": 5, "initial_c": 0.01, "largest_c": 0.5},
    ],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_equals_the_paper(setting, abort, targeted):
    model, x = network(), 0.02 + 0.96 * torch.rand(2, *SHAPE, dtype=torch.float64)
    y = model(x).argmax(dim=1)
    y = (y + 1) % 3 if targeted else y
    found = CW(lr=0.1, abort_early=abort, targeted=targeted, **setting)(model, x, y)
    for image, label, point in zip(x, y.tolist(), found, strict=True):
        wanted = cw_by_hand(
            model, image, label, kappa=setting.get("confidence", 0.0), steps=setting["steps"],
            search_steps=setting["search_steps"], lr=0.1, c=setting["initial_c"],
            largest=setting.get("largest_c", 1e10), abort=abort, targeted=targeted,
        )  # fmt: skip
        torch.testing.assert_close(point, wanted, atol=1e-7, rtol=0)


def test_pixels_at_the_bounds_are_images_too():
    x = torch.tensor([0.0, 1.0, 0.5]).repeat(3).view(1, *SHAPE)
    result = CW(lr=0.5, steps=30, search_steps=3, initial_c=10.0).run(
        lambda images: two_logits(images.flatten(1).mean(dim=1) - 0.55), x, torch.zeros(1, dtype=torch.int64)
    )
    assert result.success.all()
    assert result.x_adv.isfinite().all()


class Wavering(nn.Module):
    """``z = mean(x) - 0.6`` and a little noise: never wrong near x, and never of the same opinion."""

    def forward(self, x):
        return two_logits(x.flatten(1).mean(dim=1) - 5 + 1e-3 * torch.randn(len(x)))


@pytest.mark.parametrize(
    ("settings", "judgements"),
    [
        ({"steps": 45, "draws": 7}, 7 + 2 * 23 * 7),  # of every second step, and of the last
        ({"steps": 40, "draws": 7}, 7 + 2 * 20 * 7),
        ({"steps": 39, "draws": 7}, 7 + 2 * 39 * 7),  # less than two steps a judgement: of every step
        ({"steps": 45, "draws": 7, "keep": "single", "eot": 3}, 3),
    ],
)
def test_what_a_stochastic_model_is_asked(settings, judgements):
    x = torch.rand(2, *SHAPE)
    attack = CW(lr=0.01, search_steps=2, **settings)
    result = attack.run(Wavering(), x, torch.zeros(2, dtype=torch.int64))
    steps = 2 * attack.steps * attack.eot
    assert result.backward_passes == steps
    assert result.forward_passes == 2 + judgements + steps  # two passes show that it is random


def test_low_precision_is_confirmed_at_every_fifth_step_and_at_the_last():
    def model(images):
        return two_logits(images.flatten(1).mean(dim=1) - 5)

    x = torch.rand(2, *SHAPE)
    with execution.running(execution.ExecutionMode("half", dtype=torch.bfloat16)):
        result = CW(lr=0.01, steps=23, search_steps=2, abort_early=False).run(
            model, x, torch.zeros(2, dtype=torch.int64)
        )
    assert result.forward_passes == 8 + 1 + 2 * (23 + 5)


def searching(model, settings, x):
    y = torch.zeros(len(x), dtype=torch.int64)
    attack = CW(**settings)
    search = _Search(attack, Query(model, attack, y, strict=True), x, y)
    return search, search._start(torch.arange(len(x)))


def test_the_margin_along_a_noisy_path_is_smoothed():
    x = torch.rand(3, *SHAPE)
    search, state = searching(Wavering(), {"steps": 40, "confidence": 0.1}, x)
    margins = [torch.tensor(values) for values in ([1.0, -1.0, 0.0], [-1.0, 1.0, 2.0], [-9.0, 5.0, -1.0])]
    smooth = margins[0]
    for step, values in enumerate(margins):
        state.candidate_norm = torch.full((3,), math.inf)
        search._propose(state, x + step, torch.full((3,), 1.0 + step), values, step)
        smooth = values if step == 0 else 0.9 * smooth + 0.1 * values
        torch.testing.assert_close(state.smooth, smooth)
        assert torch.equal(state.candidate_norm < math.inf, smooth > 0.1)


def test_single_draws_are_taken_as_they_are():
    x = torch.rand(3, *SHAPE)
    search, state = searching(Wavering(), {"steps": 40, "keep": "single"}, x)
    assert search.window == 1
    search._propose(state, x, torch.ones(3), torch.tensor([-9.0, -9.0, 9.0]), 0)
    search._propose(state, x, torch.ones(3), torch.tensor([1.0, -1.0, 1.0]), 1)
    assert (state.candidate_norm < math.inf).tolist() == [True, False, True]


def test_a_margin_of_exactly_the_confidence_is_not_enough():
    x, y = torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64)
    result = CW(confidence=0.5, steps=3, search_steps=1).run(
        lambda images: two_logits(0.5 + 0 * images.flatten(1).sum(dim=1)), x, y
    )
    assert result.backward_passes == 3
    assert torch.equal(result.x_adv, x)


@pytest.mark.parametrize("smoothed", [False, True])
def test_only_a_nearer_point_replaces_a_candidate(smoothed):
    x = torch.rand(3, *SHAPE)
    model = Wavering() if smoothed else (lambda images: two_logits(images.flatten(1).mean(dim=1) - 5))
    search, state = searching(model, {"steps": 40}, x)
    state.candidate_norm = torch.ones(3)
    search._propose(state, x + 1, torch.tensor([0.9, 1.0, 1.1]), torch.ones(3), 0)
    assert state.candidate_norm.tolist() == pytest.approx([0.9, 1.0, 1.0])
    assert torch.equal((state.candidate == x + 1).flatten(1).all(dim=1), torch.tensor([True, False, False]))
    search._propose(state, x, torch.zeros(3), torch.zeros(3) if not smoothed else torch.full((3,), -9.0), 1)
    assert state.candidate_norm.tolist() == pytest.approx([0.9, 1.0, 1.0])  # a margin of 0 is none


@pytest.mark.parametrize(("value", "good"), [(0, True), (0.5, True), (-1e-9, False), (True, False), ("1", False),
                                             (math.nan, False), (None, False)])  # fmt: skip
def test_confidence_is_a_number_of_at_least_0(value, good):
    if good:
        assert CW(confidence=value).confidence == value
        return
    with pytest.raises(ConfigError, match="confidence must be a number of at least 0, in logits, got "):
        CW(confidence=value)


def test_settings_at_their_bounds():
    assert CW(largest_c=1e-3).largest_c == CW().initial_c
    with pytest.raises(ConfigError, match="largest_c=0.0009 is below initial_c=0.001; raise it"):
        CW(largest_c=9e-4)
    for name in ("steps", "search_steps", "draws"):
        assert getattr(CW(**{name: 1}), name) == 1
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
            CW(**{name: 0})
    for name in ("lr", "initial_c", "largest_c"):
        with pytest.raises(ConfigError, match=f"{name} must be finite and more than 0"):
            CW(**{name: 0.0})
    assert CW(lr=2.0).lr == 2  # no pixel scale
    with pytest.raises(ConfigError, match="abort_early must be True or False, got 0"):
        CW(abort_early=0)
    with pytest.raises(ConfigError, match="keep is 'best'; allowed: mean, single"):
        CW(keep="best")
