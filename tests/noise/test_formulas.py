"""Each law as a formula: what a value becomes by a draw that is given, with the noise off, and how large it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from learn2perturb.defenses import build_defense
from learn2perturb.errors import ConfigError, SiteError
from learn2perturb.noise import (
    feature_deviations,
    fixed_noise,
    insert,
    noise_modules,
    perturb,
    perturb_images,
    random_members,
)
from learn2perturb.noise.laws import noise_law

SHAPE = (2, 3, 4)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(law, shape, **settings):
    """The law with a scale that is no default."""
    torch.manual_seed(0)
    noise = noise_law(law)(shape, site="here", **settings).double()
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.copy_(random(*parameter.shape, seed=7).abs() + 0.3)
    return noise


def softplus(x):
    return (1 + x.exp()).log()


def normalised(w, count):
    """The first filters of a weight, each by its deviation, over the width of the kernel."""
    filters = [one / (one.std() + 1e-5) / w.shape[-1] for one in w[:count]]
    return torch.stack(filters)


# law -> (shape, settings, value + noise, value with the noise off, (name, size))
FORMULAS = {
    "feature": ("feature", SHAPE, {}, lambda n, v, e: v + n.theta * e, lambda n, v: v, ("theta", lambda n: n.theta)),
    "relative": (
        "feature", SHAPE, {"relative": True}, lambda n, v, e: v + n.theta * v.std() * e, lambda n, v: v,
        ("alpha", lambda n: n.theta),
    ),
    "weight": (
        "weight", SHAPE, {"place": "output"}, lambda n, v, e: v + n.alpha * v.std() * e, lambda n, v: v,
        ("alpha", lambda n: n.alpha),
    ),
    "variational": (
        "variational", SHAPE, {"place": "output"}, lambda n, v, e: v + n.log_std.exp() * e, lambda n, v: v,
        ("sigma", lambda n: n.log_std.exp()),
    ),
    "multiplicative": (
        "multiplicative", SHAPE, {}, lambda n, v, e: v + v * n.sigma * e, lambda n, v: v, ("sigma", lambda n: n.sigma)
    ),
    "correlated": (
        "correlated", (4,), {}, lambda n, v, e: torch.stack([x + n.factor @ y for x, y in zip(v, e, strict=True)]),
        lambda n, v: v, ("sigma", lambda n: (n.factor @ n.factor.T).diagonal().sqrt()),
    ),
    "isotropic": (
        "correlated", (4,), {"variance": "isotropic"}, lambda n, v, e: v + softplus(n.factor) * e, lambda n, v: v,
        ("sigma", lambda n: softplus(n.factor)),
    ),
    "gain": (
        "gain", SHAPE, {}, lambda n, v, e: v * n.mu + v * n.sigma * e, lambda n, v: v * n.mu,
        ("sigma", lambda n: n.sigma),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMULAS)
def test_what_a_draw_makes_of_features(case):
    law, shape, settings, noisy, quiet, (name, size) = FORMULAS[case]
    noise, value, eps = made(law, shape, **settings), random(5, *shape, seed=1), random(5, *shape, seed=2)
    torch.testing.assert_close(noise.noisy(value, eps), noisy(noise, value, eps))
    torch.testing.assert_close(noise.quiet(value), quiet(noise, value))
    assert noise.scale()[0] == name
    torch.testing.assert_close(noise.scale()[1], size(noise).detach(), check_dtype=False)


@pytest.mark.parametrize(("filters", "learned"), [(8, 2), (4, 1), (2, 1)])
def test_random_filters_follow_the_learned_ones(filters, learned):
    shape = (filters, 2, 3, 5)
    noise, weight, eps = made("projection", shape), random(*shape, seed=1), random(*shape, seed=2)
    expected = torch.cat([normalised(weight, learned), eps[learned:] / 5])
    torch.testing.assert_close(noise.noisy(weight, eps), expected)
    torch.testing.assert_close(noise.quiet(weight)[:learned], expected[:learned])
    assert torch.equal(noise.quiet(weight)[learned:], noise.projection)
    assert noise.projection.shape == (filters - learned, 2, 3, 5)
    assert noise.scale() == ("sigma", torch.tensor(1 / 5))
    tiny = torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(noise.noisy(tiny, eps)[:learned], tiny[:learned])  # a filter of zeros has no deviation


def test_the_fixed_filters_are_of_the_size_of_the_drawn_ones():
    torch.manual_seed(0)
    noise = noise_law("projection")((40, 8, 3, 5), site="here")
    assert noise.projection.std().item() == pytest.approx(1 / 5, rel=0.03)


def test_the_gain_is_raised_by_what_the_smallest_lacks():
    noise = made("gain", (4,), least=0.5)
    for sigma, expected in (
        ([0.2, 0.4, 0.5, 0.9], [0.5, 0.7, 0.5, 0.9]), ([0.6, 0.7, 0.8, 0.5], [0.6, 0.7, 0.8, 0.5]),
    ):  # fmt: skip
        with torch.no_grad():
            noise.sigma.copy_(torch.tensor(sigma))
        noise.project()
        assert noise.sigma.tolist() == pytest.approx(expected)


def test_the_factor_stays_lower_triangular_and_a_diagonal_as_it_is():
    noise = made("correlated", (3,))
    before = noise.factor.detach().clone()
    noise.project()
    assert torch.equal(noise.factor, before.tril()) and not torch.equal(noise.factor, before)
    diagonal = made("correlated", (3,), variance="isotropic")
    before = diagonal.factor.detach().clone()
    diagonal.project()
    assert torch.equal(diagonal.factor, before)


@pytest.mark.parametrize("least", [True, -0.1, 1.1, "1", None])
def test_a_bound_of_sigma_is_a_number_from_0_to_1(least):
    with pytest.raises(ConfigError, match="least is"):
        made("gain", (2,), least=least)
    assert made("gain", (2,), least=0).least == 0.0 and made("gain", (2,), least=1).least == 1.0


# --- one of several


def test_the_norms_are_picked_by_number_and_count():
    torch.manual_seed(0)
    network = insert(
        nn.Sequential(nn.BatchNorm2d(4)),
        [{"kind": "norms", "site": "0", "feature_shape": (4, 3, 3), "channels": [1, 2]}],
    ).eval()
    noise, x = network[0].perturbation, torch.rand(5, 4, 3, 3)
    answers = [nn.BatchNorm2d(4).eval()(x), nn.GroupNorm(4, 4)(x), nn.GroupNorm(2, 4)(x)]
    for number, answer in enumerate(answers):
        noise._pick = lambda value, number=number: torch.tensor([number])
        torch.testing.assert_close(network(x), answer)
    noise.enabled = False
    torch.testing.assert_close(network(x), answers[0])
    assert noise.scale() == ("norms", torch.tensor(3.0))


class Answers(nn.Module):
    """Says which member it is, at any image."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.number + torch.zeros(len(x), 3)


def members(count, chances, **settings):
    spec = {"kind": "members", "site": "", "feature_shape": (1,), "count": count, **settings}
    network = insert(Answers(), [spec])
    with torch.no_grad():
        for number, other in enumerate(network.perturbation.others, start=1):
            other.number.fill_(number)
    network.perturbation.set_chances(chances)
    return network


@pytest.mark.parametrize("replayed", [False, True])
def test_members_answer_as_often_as_they_are_drawn(replayed):
    """The chances need not add up to one."""
    network, x = members(3, [2.0, 1.0, 1.0]), torch.zeros(4000, 1)
    assert network.perturbation.probabilities == (0.5, 0.25, 0.25)
    torch.manual_seed(0)
    if replayed:
        with fixed_noise(network, 3):
            drawn = network(x)[:, 0]
    else:
        drawn = network(x)[:, 0]
    shares = torch.bincount(drawn.detach().long(), minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.25, 0.25], abs=4.5 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("replayed", [False, True])
def test_a_draw_that_is_shared_is_one_member_for_all(replayed):
    network, x, seen = members(2, [0.5, 0.5], sharing="per_batch"), torch.zeros(20, 1), set()
    for seed in range(12):
        if replayed:
            with fixed_noise(network, seed):
                answers = network(x)
                assert torch.equal(answers, network(x))
        else:
            answers = network(x)
        assert len(answers.unique()) == 1
        seen.add(answers[0, 0].item())
    assert seen == {0.0, 1.0}


def test_answers_are_picked_image_by_image():
    answers = torch.arange(2 * 3 * 4.0).view(2, 3, 4)  # (members, images, classes)
    found = members(2, [0.5, 0.5]).perturbation.noisy(answers, torch.tensor([1, 0, 1]))
    assert torch.equal(found, torch.stack([answers[1, 0], answers[0, 1], answers[1, 2]]))


def test_a_replayed_member_is_that_of_the_row_whatever_the_batch():
    network, x = members(3, [1.0, 1.0, 2.0]), torch.zeros(40, 1)
    with fixed_noise(network, 3):
        whole, half = network(x)[:, 0], network(x[:20])[:, 0]
    assert torch.equal(whole[:20], half) and set(whole.tolist()) == {0.0, 1.0, 2.0}


def test_the_first_member_alone_and_the_switch_after_it():
    network, x = members(2, [0.0, 1.0]), torch.zeros(3, 1)
    for enabled in (True, False):
        network.perturbation.enabled = enabled
        assert network(x).unique().tolist() == [float(enabled)]
        first, second = network.perturbation.members_in(network)
        assert first(x).unique().tolist() == [0.0] and second(x).unique().tolist() == [1.0]
        assert network.perturbation.enabled is enabled


def test_noise_on_a_network_as_a_whole_that_draws_no_members_is_no_ensemble():
    assert random_members(members(2, [0.5, 0.5])) is not None
    assert random_members(perturb_images(nn.Flatten(), 0.5)) is None and random_members(nn.Flatten()) is None


@pytest.mark.parametrize("count", [1, 101, True, 2.0])
def test_an_ensemble_has_2_to_100_members(count):
    with pytest.raises(ConfigError, match="count"):
        noise_law("members")((1,), site="", count=count)
    assert len(noise_law("members")((1,), site="", count=100).chances) == 100


# --- on the images


def test_noise_on_the_images_is_fixed_and_reaches_every_layer_that_reads_them():
    network, x = perturb_images(nn.Flatten(), 0.5, input_shape=(1, 40, 40)), torch.full((8, 1, 40, 40), 0.25)
    torch.manual_seed(0)
    noise = network(x) - 0.25
    assert noise.std().item() == pytest.approx(0.5, rel=0.05) and abs(noise.mean().item()) < 0.03
    (module,) = noise_modules(network)
    assert not list(module.noise_parameters()) and not module.theta.requires_grad
    with torch.no_grad():
        module.theta.fill_(0.001)
    module.project()
    assert module.theta.item() == pytest.approx(0.001)
    assert perturb_images(nn.Flatten(), 0.0) and noise_modules(perturb_images(nn.Flatten(), 1.0))[0].shape == (
        3,
        32,
        32,
    )


# --- how large features are


def test_the_deviation_of_features_is_measured_with_the_noise_off_and_nothing_moves():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.ReLU())
    network = perturb(network, input_shape=(1, 2, 3), sites=["1", "2"], init=5.0).train()
    x, state, before = torch.randn(7, 1, 2, 3), copy.deepcopy(network.state_dict()), torch.get_rng_state()
    found = feature_deviations(network, x)
    normed = (x.flatten(1) - x.flatten(1).mean(0)) / (x.flatten(1).var(0, correction=0) + 1e-5).sqrt()
    assert [noise.site for noise in found] == ["1", "2"]
    assert list(found.values()) == pytest.approx(
        [one.std(correction=0).item() for one in (normed, normed.relu())], rel=1e-5
    )
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(network(x), network(x))


def test_features_without_a_finite_size_are_refused():
    network = perturb(nn.Sequential(nn.Flatten(), nn.Identity()), input_shape=(1, 2, 2), sites="1")
    with pytest.raises(SiteError, match="'1' have no finite size"):
        feature_deviations(network, torch.full((2, 1, 2, 2), math.inf))


@pytest.mark.parametrize(("share", "minimum"), [(0.5, 0.01), (0.5, 3.0), (0.0, 0.25)])
def test_theta_begins_at_a_share_of_the_deviation_and_no_lower_than_its_minimum(share, minimum):
    defense = build_defense(
        "learn2perturb", {"init": "relative", "init_share": share, "minimum": minimum, "sites": "1"}
    )
    network = defense.prepare(nn.Sequential(nn.Flatten(), nn.Identity()), (1, 2, 2))
    x = 4 * torch.randn(50, 1, 2, 2)
    (noise,) = noise_modules(network)
    assert noise.theta.unique().tolist() == pytest.approx([max(0.25, minimum)])
    defense.measure(network, x)
    expected = max(share * x.std(correction=0).item(), minimum)
    torch.testing.assert_close(noise.theta.detach(), torch.full_like(noise.theta, expected))


# --- what a law takes


@pytest.mark.parametrize(
    ("law", "settings", "said"),
    [
        *[("projection", {"share": share}, "share is") for share in (0, 1, 1.5, 0.0, 1.0, -0.1, True, "0.5", None)],
        *[("norms", {"channels": [size]}, "channels has") for size in (0, 3, 8, True, 1.0, -2)],
        ("norms", {"channels": []}, "channels is empty"),
        ("correlated", {"variance": "full"}, "variance"),
    ],
)
def test_what_a_law_does_not_take(law, settings, said):
    with pytest.raises(ConfigError, match=said):
        noise_law(law)((4, 2, 3, 3), site="here", **settings)


def test_what_a_law_takes_at_its_bounds():
    assert noise_law("projection")((4, 2, 3, 3), site="here", share=0.01).random == 1
    assert noise_law("projection")((4, 2, 3, 3), site="here", share=0.99).random == 3
    assert [norm.num_groups for norm in noise_law("norms")((4, 3, 3), site="here", channels=(4, 1, 2)).norms] == [
        1,
        4,
        2,
    ]
