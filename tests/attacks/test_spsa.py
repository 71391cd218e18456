"""SPSA and NES: what they estimate, what they ask, and that a model without a gradient falls to them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD, SPSA, build_attack
from learn2perturb.errors import ConfigError
from tests.problems import Linear, NoisyLinear, two_logits

SHAPE = (3, 4, 4)
NAMES = ("spsa", "nes")
every_sampling = pytest.mark.parametrize("name", NAMES)


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


@every_sampling
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("inside", ["numpy", "no_grad"])
def test_comes_near_the_optimum_of_a_linear_model_that_has_no_gradient(name, norm, inside):
    linear, x = Linear(SHAPE, bias=-50.0), 0.4 + 0.2 * torch.rand(5, *SHAPE)
    weight = linear.weight.detach().numpy()

    def model(images):
        if inside == "numpy":
            return two_logits(torch.from_numpy((images.numpy() * weight).sum(axis=(1, 2, 3)) - 50))
        with torch.no_grad():
            return linear(images)

    eps = {"linf": 0.1, "l2": 0.3}[norm]
    attack = build_attack(name, eps=eps, norm=norm, steps=60, directions=16, seed=0)
    gain = model(attack(model, x, zeros(x)))[:, 1] - model(x)[:, 1]
    best = model(linear.optimum(x, eps, norm))[:, 1] - model(x)[:, 1]
    assert (gain >= 0.9 * best).all()


@every_sampling
@pytest.mark.parametrize("average", ["loss", "probability", "logits"])
def test_the_estimate_is_the_gradient_on_average(name, average):
    """Of a first step in l2, along the running mean, whose scale plays no part."""
    model, x = Linear(SHAPE, bias=-50.0), torch.full((2, *SHAPE), 0.5)
    attack = build_attack(
        name, eps=1.0, step_size=0.5, norm="l2", steps=1, directions=3000, size=0.01, eot_average=average, seed=0
    )
    step = (attack(model, x, zeros(x)) - x).flatten(1)
    cosine = nn.functional.cosine_similarity(step, model.weight.detach().flatten()[None])
    assert (cosine > 0.97).all()


@every_sampling
@pytest.mark.parametrize("eot", [1, 3])
def test_both_sides_of_a_difference_have_the_same_draws_and_no_two_differences(name, eot):
    x, model = torch.rand(4, *SHAPE), NoisyLinear(SHAPE)
    result = build_attack(name, eps=0.1, steps=3, directions=5, eot=eot).run(model, x, zeros(x))
    asked = [draw for draw in model.draws if len(draw) == 4][-1 - 2 * 3 * 5 * eot : -1]
    assert all(torch.equal(up, down) for up, down in zip(asked[::2], asked[1::2], strict=True))
    assert len({draw.numpy().tobytes() for draw in asked}) == 3 * 5 * eot
    assert result.forward_passes * 4 == sum(map(len, model.draws[:-1]))
    assert result.backward_passes == 0


@every_sampling
@pytest.mark.parametrize(("rows", "deterministic", "asked"), [
    (12, True, [12, 12, 8]), (100, True, [32]), (2, True, [4] * 8), (12, False, [4] * 8),
])  # fmt: skip
def test_a_model_without_noise_is_asked_about_several_directions_in_one_pass(
    name, rows, deterministic, asked, monkeypatch
):
    """Of so many rows at most, but for one direction; the answers of a random model belong to one."""
    monkeypatch.setattr("learn2perturb.attacks.spsa._ROWS", rows)
    x, model, sizes = torch.rand(4, *SHAPE), Linear(SHAPE, bias=-50.0), []

    def counted(images):
        sizes.append(len(images))
        noise = 0 if deterministic else torch.randn(len(images))
        return two_logits(model(images)[:, 1] + noise)

    build_attack(name, eps=0.1, steps=1, directions=8, eot=1, seed=0)(counted, x, zeros(x))
    both_sides = [size for size in asked for _ in range(2)]
    start = len(sizes) - len(both_sides) - 1 - deterministic  # at last the result is judged, and the step before that
    assert sizes[start : start + len(both_sides)] == both_sides


@pytest.mark.parametrize(("name", "sizes"), [("spsa", 1), ("nes", 2 * 3 * 48)])
def test_spsa_goes_as_far_in_every_pixel_and_nes_by_the_normal_distribution(name, sizes):
    """Around the image, whose pixels are far from the bounds: both sides, opposite to each other."""
    x, asked = torch.full((2, *SHAPE), 0.5), []

    def model(images):
        asked.append(images)
        return two_logits(torch.randn(len(images)))

    build_attack(name, eps=0.1, size=0.01, steps=1, directions=3, eot=1, seed=0)(model, x, zeros(x))
    steps = torch.stack(asked[-7:-1]) - x  # up and down of each direction; then the result is judged
    torch.testing.assert_close(steps[::2], -steps[1::2], atol=1e-6, rtol=0)
    assert len((steps[::2].abs() * 1e5).round().unique()) == pytest.approx(sizes, rel=0.2)
    assert float(steps.square().mean().sqrt()) == pytest.approx(0.01, rel=0.15)


@every_sampling
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_only_images_are_asked_about(name, pixel):
    asked = []

    def model(images):
        asked.append(images)
        return two_logits(images.flatten(1).sum(dim=1) - 100)  # right, whatever is tried

    x = torch.full((2, *SHAPE), pixel)
    build_attack(name, eps=0.1, size=0.05, steps=2, directions=4, seed=0)(model, x, zeros(x))
    assert len(asked) > 2 * 4
    assert min(float(images.min()) for images in asked) >= 0
    assert max(float(images.max()) for images in asked) <= 1


@every_sampling
def test_a_common_draw_cancels(name):
    """A noise far above the differences, the same for all classes' margin, does not disturb an estimate."""

    class Loud(Linear):
        def forward(self, x):
            return two_logits(super().forward(x)[:, 1] + 1000 * torch.randn(len(x)))

    model, x = Loud(SHAPE), torch.full((3, *SHAPE), 0.5)
    attack = build_attack(name, eps=0.3, step_size=0.3, norm="l2", steps=1, directions=500, seed=0)
    step = (attack(model.double(), x.double(), zeros(x)) - x).flatten(1)
    cosine = nn.functional.cosine_similarity(step, model.weight.detach().flatten()[None])
    assert (cosine > 0.9).all()


def test_images_of_a_deterministic_model_leave_once_broken_and_passes_are_counted():
    asked = []

    def model(x):
        asked.append(len(x))
        return two_logits(x.flatten(1).sum(dim=1) - 24 - 48 * torch.tensor(0.05))

    base = torch.full((6, *SHAPE), 0.5)
    x = base + 0.06 * (torch.arange(6) < 2).view(-1, 1, 1, 1)  # two are broken already
    result = SPSA(0.1, step_size=0.02, steps=20, directions=4, seed=0).run(model, x, zeros(x))
    assert result.success.all()
    assert torch.equal(result.x_adv[:2], x[:2])
    assert result.forward_passes * 6 == sum(asked[:-1])
    assert result.forward_passes < 20 * (2 * 4 + 1) / 2


@every_sampling
def test_quantised_images_fall_to_values_where_gradients_say_nothing(name, trained):
    network, x, y = trained

    def model(images):
        with torch.no_grad():
            return network(torch.from_numpy(np.round(images.numpy() * 15) / 15).float())

    eps = 0.15
    own = PGD(eps, steps=20, loss="margin", seed=0).run(network, x, y)
    found = build_attack(name, eps=eps, steps=30, directions=16, seed=0).run(model, x, y)
    assert found.success_rate > 0.8 * own.success_rate
    # Differences that see no step of the quantisation show no way.
    blind = build_attack(name, eps=eps, steps=30, directions=16, size=1e-5, seed=0).run(model, x, y)
    assert blind.success_rate < 0.5 * found.success_rate


def test_an_infinite_gap_or_a_vote_does_no_harm(trained):
    network, x, y = trained

    def vote(images):
        with torch.no_grad():
            return nn.functional.one_hot(network(images).argmax(dim=1), 10).float()

    result = SPSA(0.3, steps=5, directions=8, size=0.3, seed=0).run(vote, x, y)
    assert torch.isfinite(result.x_adv).all()
    assert result.success_rate > (vote(x).argmax(dim=1) != y).double().mean()


BAD = {
    "steps": ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "directions": ({"directions": 1.5}, "directions must be a whole number of at least 1, got 1.5"),
    "step_size": ({"step_size": 1.0}, "more than twice eps"),
    "size": ({"size": 0}, "size must be finite and more than 0"),
    "size 2": ({"size": 2}, "size=2 is more than a pixel's whole range"),
    "momentum": ({"momentum": 1}, r"momentum must be a number in \[0, 1\), got 1"),
    "sampling": ({"sampling": "uniform"}, "sampling is 'uniform'; allowed: signs, gaussian"),
    "eps": ({"eps": 8}, r"eps=8 .* \[0, 1\] pixel scale"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        SPSA(**settings)
    assert "\n" not in str(caught.value)


def test_resized_keeps_the_share_of_a_step_and_eps_zero_is_allowed():
    attack = SPSA(0.1)
    assert attack.step_size == pytest.approx(0.01)
    assert attack.resized(0.005).step_size == pytest.approx(0.0005)
    assert attack.resized(0.2).step_size == attack.step_size
    x = torch.rand(2, *SHAPE)
    assert torch.equal(dataclasses.replace(attack, eps=0)(Linear(SHAPE), x, zeros(x)), x)


@pytest.mark.parametrize(("settings", "reach"), [
    ({}, 0.1), ({"norm": "l2"}, 0.1 / 4), ({"size": 0.03}, 0.03), ({"norm": "l2", "size": 0.03}, 0.03),
])  # fmt: skip
def test_points_are_asked_about_a_quarter_of_the_ball_away(settings, reach):
    """In l2 that is a length, of which each of 16 numbers has its share."""
    attack = build_attack("spsa", eps=0.4, step_size=0.1, **settings)
    assert attack._reach(torch.zeros(3, 1, 4, 4)) == pytest.approx(reach)
