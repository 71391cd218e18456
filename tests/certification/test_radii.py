"""Certificates: closed forms, the exact constant, refusals, and radii that no attack breaks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from learn2perturb.certification import Certification, certify
from learn2perturb.certification import first_noise as rules
from learn2perturb.certification.bounds import gaussian_dp_radius
from learn2perturb.certification.first_noise import first_noise
from learn2perturb.certification.record import largest_radius, lower_bound, radius_of
from learn2perturb.data import load_data
from learn2perturb.errors import ConfigError, InputError, NoiseError
from learn2perturb.models import build_model
from learn2perturb.noise import fixed_noise, noise_disabled, noise_modules, perturb, vary_weights
from learn2perturb.noise.sensitivity import sensitivity

SHAPE = (1, 4, 4)


class Net(nn.Module):
    def __init__(self, around: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(48, 3)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(2 * x - 1))).flatten(1)
        logits = self.out(h)
        if self.around == "shortcut":
            logits = logits + x.flatten(1)[:, :3]
        if self.around == "without gradient":
            logits = logits + x.flatten(1)[:, :3].round().detach()
        return logits


def network(around: str = "", sites: str | list[str] = "norm", **settings) -> nn.Module:
    torch.manual_seed(0)
    net = Net(around)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    net = perturb(net.eval(), input_shape=SHAPE, sites=sites, init=settings.pop("init", 0.5), **settings).eval()
    for module in noise_modules(net):
        module.theta.data.uniform_(0.2, 0.8)
    return net


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *SHAPE, generator=generator), torch.zeros(n, dtype=torch.int64)


# --- the constant


@pytest.mark.parametrize("site", ["norm", "conv"])
def test_the_constant_is_that_of_the_brute_force_decomposition(site):
    net = network(sites=site)
    found = first_noise(net, images()[0])
    twin = network(sites=site).double()

    def before(x: Tensor) -> Tensor:
        h = twin.conv._conv_forward(2 * x - 1, twin.conv.weight, twin.conv.bias)
        if site == "norm":
            h = nn.functional.batch_norm(
                h, twin.norm.running_mean, twin.norm.running_var, twin.norm.weight, twin.norm.bias
            )
        return h / noise_modules(twin)[0].theta

    matrix = torch.autograd.functional.jacobian(lambda x: before(x.view(1, *SHAPE)).flatten(), torch.rand(16).double())
    assert found.constant == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-8)
    assert (found.site, found.exact) == (site, True)


def test_large_images_get_an_upper_bound(monkeypatch):
    net, x = network(), images()[0]
    exact = first_noise(net, x)
    monkeypatch.setattr(rules, "EXACT_PIXELS", 10)
    bound = first_noise(net, x)
    assert not bound.exact
    assert exact.constant <= bound.constant <= 4 * exact.constant


def test_noise_on_the_image_itself_is_rse():
    net = perturb(Net().eval(), input_shape=SHAPE, sites="conv", place="input", granularity="layer", init=0.25)
    # The images reach the noise as 2 x - 1, so the constant is 2 / 0.25.
    assert first_noise(net.eval(), images()[0]).constant == pytest.approx(8.0)


# --- what is refused

REFUSED = {
    "shortcut": (lambda: network("shortcut"), "goes around the first noise"),
    "a path without gradient": (lambda: network("without gradient"), "goes around the first noise"),
    "per batch": (lambda: network(sharing="per_batch"), "is shared"),
    "not gaussian": (lambda: network(distribution="laplace"), "gaussian noise only"),
    "not affine": (lambda: network(sites="out"), "not affine"),
    "no noise": (lambda: Net().eval(), "has none"),
    "a function": (lambda: lambda x: x.flatten(1), "must look inside"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_model_for_which_it_does_not_hold_is_refused_with_the_reason(case):
    make, reason = REFUSED[case]
    with pytest.raises(NoiseError, match=reason):
        certify(make(), images(), n0=2, n=4)


def test_replayed_and_switched_off_noise_is_refused():
    net = network()
    with fixed_noise(net), pytest.raises(NoiseError, match="replayed"):
        certify(net, images(), n0=2, n=4)
    with fixed_noise(net), pytest.raises(NoiseError, match="replayed"):
        certify(net, images(), n0=2, n=4, sigma=0.5)
    with noise_disabled(net), pytest.raises(NoiseError, match="has none"):
        certify(net, images(), n0=2, n=4)
    with noise_disabled(net):
        assert certify(net, images(), n0=2, n=4, sigma=0.5).method == "smoothing"


@pytest.mark.parametrize("method", ["first_noise", "smoothing"])
def test_noise_in_the_weights_is_refused(method):
    from learn2perturb.defenses import build_defense

    net = build_defense("pni").prepare(build_model("digits_cnn", input_shape=(1, 8, 8)), (1, 8, 8)).eval()
    sigma = {"sigma": 0.25} if method == "smoothing" else {}
    with pytest.raises(NoiseError, match="in the weights"):
        certify(net, load_data("digits", "test", limit=2), n0=2, n=4, method=method, **sigma)


def test_weights_that_vary_are_refused_while_on_and_named_as_missing_while_off():
    """A layer has two noise modules, of weight and bias, and one name."""
    net = vary_weights(Net().eval())
    with pytest.raises(NoiseError, match="in the weights"):
        certify(net, images(), n0=2, n=4)
    with noise_disabled(net):
        for method in ("first_noise", "pixeldp"):
            with pytest.raises(NoiseError, match="has none|has 0"):
                certify(net, images(), n0=2, n=4, method=method)
        assert certify(net, images(), n0=2, n=4, sigma=0.5).method == "smoothing"


def test_the_bound_is_of_the_noise_that_is_on():
    """Of two noise layers the first by name is off: the certificate is that of the other, at its own site."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_late = nn.Conv2d(1, 2, 3, padding=1)
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a_late(self.conv(x)).flatten(2).mean(dim=2)

    torch.manual_seed(0)
    net = perturb(Two().eval(), input_shape=SHAPE, sites=["a_late", "conv"], granularity="layer", init=0.5).eval()
    noise_modules(net)[0].enabled = False
    found = certify(net, images(), n0=2, n=4, method="pixeldp")
    assert found.site == "conv"
    assert found.constant == pytest.approx(float(sensitivity(net, net.conv)) / 0.5)


def _seeding(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return (x + 0.5 * torch.randn(x.shape[1:])).flatten(1)[:, :2]


def _seeding_afterwards(x: Tensor) -> Tensor:
    logits = (x + 0.5 * torch.randn_like(x)).flatten(1)[:, :2]
    torch.manual_seed(0)
    return logits


def _a_draw_for_each_row(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + 0.5 * noise).flatten(1)[:, :2]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(_seeding, "seeds the random"), (_seeding_afterwards, "seeds the random"), (_a_draw_for_each_row, "the row of")],
)
def test_votes_that_are_replayed_are_refused(model, reason):
    """A model that seeds the generators makes every vote the same, that of the smoothing noise included."""
    with pytest.raises(InputError, match=reason):
        certify(model, images(), sigma=0.25, n0=20, n=100)


def test_a_fixed_function_is_certified_however_it_was_made():
    def projection(x: Tensor) -> Tensor:
        return x.flatten(1) @ torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    assert certify(projection, images(), sigma=0.25, n0=20, n=100).radii


def test_a_scale_of_zero_and_batch_statistics_are_refused():
    net = network()
    noise_modules(net)[0].theta.data[0, 0, 0] = 0
    with pytest.raises(NoiseError, match="1 scales of the first noise"):
        certify(net, images(), n0=2, n=4)
    free = Net()
    free.norm = nn.BatchNorm2d(3, track_running_stats=False)
    perturb(free.eval(), input_shape=SHAPE, sites="norm", init=0.5)
    with pytest.raises((NoiseError, InputError), match="not affine|around|batch"):
        certify(free.eval(), images(), n0=2, n=4)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"method": "cohen"}, "allowed: auto"),
        ({"method": "smoothing"}, "needs one above 0"),
        ({"sigma": -1.0}, "needs one above 0"),
        ({"method": "first_noise", "sigma": 0.5}, "leave sigma out"),
        ({"alpha": 2.0}, "in .0, 1."),
        ({"n": 0}, "whole number"),
        ({"n0": 1.5}, "whole number"),
        ({"limit": 0}, "whole number"),
    ],
)
def test_bad_settings_are_refused(settings, fix):
    with pytest.raises(ConfigError, match=fix):
        certify(network(), images(), **settings)


# --- closed forms


def test_the_radius_of_a_linear_classifier_is_its_margin():
    torch.manual_seed(0)
    weight, bias = torch.randn(16), 0.3
    x = torch.rand(20, *SHAPE)
    z = x.flatten(1) @ weight + bias
    model = lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1) @ weight + bias], dim=1)  # noqa: E731
    found = certify(model, (x, (z > 0).long()), sigma=1.0, n0=4000, n=40_000, alpha=0.001, batch_size=20_000)
    true = (z.abs() / weight.norm()).numpy()
    radii = np.array(found.radii)
    assert (radii <= true + 1e-6).mean() >= 0.9  # each is wrong once in 1,000 times
    # Near 0 the class itself is in doubt, near the largest the bound is far below what it bounds.
    held = (true > 0.05) & (true < 0.6 * found.largest)
    assert np.abs(radii - true)[held].max() < 0.1
    assert held.sum() > 5
    assert found.accuracy_at(0) > 0.9


def test_clopper_pearson_and_the_largest_radius():
    assert lower_bound([0, 100], 100, 0.001) == pytest.approx([0.0, 0.001 ** (1 / 100)])
    assert lower_bound([80], 100, 0.05)[0] == pytest.approx(
        stats.binomtest(80, 100).proportion_ci(0.90, method="exact").low
    )
    assert radius_of([0.4, 0.5, stats.norm.cdf(1.5)], 2.0) == pytest.approx([0, 0, 0.75])
    assert largest_radius(100_000, 0.001, 4.0) == pytest.approx(0.25 * stats.norm.ppf(0.001 ** (1 / 100_000)))


def test_no_attack_breaks_a_certified_radius():
    """The worst change of size R is known where all after the noise is linear: the exact vote then must not flip."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 5)
            self.last = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.last(self.first(x.flatten(1)))
            return torch.cat([torch.zeros_like(z), z], dim=1)

    torch.manual_seed(3)
    net = perturb(Noisy().eval(), input_shape=SHAPE, sites="first", init=0.4).eval()
    x = torch.rand(60, *SHAPE)
    found = certify(net, (x, torch.zeros(60, dtype=torch.int64)), n0=50, n=2000, alpha=0.01, batch_size=20_000)
    with torch.no_grad(), noise_disabled(net):
        z = net(x)[:, 1]
    slope = (net.last.weight @ net.first.weight).detach().norm()
    predicted, radii = found.predictions.unpack(), np.array(found.radii)
    attacked = z.numpy() - np.sign(z.numpy()) * radii * float(slope)  # the optimal l2 attack of this size
    certified = predicted >= 0
    flipped = (attacked > 0).astype(int) != predicted
    assert certified.sum() > 20
    assert flipped[certified].mean() <= 0.05


TRIALS = 1000


def _most(alpha: float) -> int:
    """How many of the trials may be violated at level ``alpha``: exceeded by chance once in 10,000 times."""
    return int(stats.binom.isf(1e-4, TRIALS, alpha))


@pytest.mark.parametrize("n", [60, 400])
def test_a_fair_coin_is_certified_no_more_often_than_alpha(n):
    """Its radius is 0. The class that leads the certifying votes themselves would be certified twice as often."""
    alpha = 0.2

    def coin(x: Tensor) -> Tensor:
        right = torch.rand(len(x)) < 0.5
        return torch.stack([right, ~right], dim=1).float()

    x, y = torch.zeros(TRIALS, 1, 1, 1), torch.zeros(TRIALS, dtype=torch.int64)
    # As many draws choose as certify: were they the same draws, the choice would know the votes.
    found = certify(coin, (x, y), sigma=0.1, n0=n, n=n, alpha=alpha, batch_size=50_000)
    certified = round(TRIALS * (1 - found.abstained))
    assert TRIALS * alpha / 2 < certified <= _most(alpha)


class _Distance(nn.Module):
    """Two classes, decided by the sign of one number: the radius of an image is how far it is from the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[3.0, 4.0]]))
            self.first.bias.fill_(-3.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.flatten(1))
        return torch.cat([-z, z], dim=1)


@pytest.mark.parametrize("method", ["first_noise", "smoothing"])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_certificates_are_violated_no_more_often_than_alpha(method, alpha):
    """A certificate is a promise: over 1,000 trials with a known radius, and near to the level, not far below it."""
    model, sigma = _Distance().eval(), 0.3
    true = torch.linspace(0.02, 0.4, TRIALS)
    side = torch.where(torch.arange(TRIALS) % 2 == 0, 1.0, -1.0)
    x = (torch.tensor([0.5, 0.5]) + (true * side)[:, None] * torch.tensor([0.6, 0.8])).view(TRIALS, 1, 1, 2)
    y = (side > 0).long()
    if method == "first_noise":
        perturb(model, input_shape=(1, 1, 2), sites="first", init=5 * sigma)  # |w| = 5, so it is sigma on the image
    given = {"sigma": sigma} if method == "smoothing" else {}
    found = certify(model.eval(), (x, y), method=method, n0=30, n=300, alpha=alpha, batch_size=50_000, **given)
    assert found.constant == pytest.approx(1 / sigma)
    certified = found.predictions.unpack() >= 0
    wrong_class = found.predictions.unpack() != y.numpy()
    violated = certified & (wrong_class | (np.array(found.radii) > true.numpy()))
    assert TRIALS * alpha / 2 < violated.sum() <= _most(alpha)


def test_the_class_is_chosen_and_certified_by_different_draws():
    passes: list[int] = []

    def turning(x: Tensor) -> Tensor:
        """Class 0 in the pass that chooses, the first of 20 rows; class 1 in those that certify."""
        passes.extend([len(x)] * (len(x) == 20))
        answer = torch.full((len(x),), len(passes) > 1)
        return torch.stack([~answer, answer], dim=1).float()

    found = certify(turning, images(4), sigma=0.1, n0=5, n=100, alpha=0.01, batch_size=20)
    assert len(passes) == 1 + 20
    assert found.predictions.unpack().tolist() == [-1] * 4
    assert found.votes.unpack().tolist() == [0] * 4


# --- the record


def test_vacuity_is_said_and_the_record_kept(tmp_path):
    found = certify(network(), images(), n0=20, n=200, eps=0.9)
    assert found.statement.startswith("VACUOUS against l_inf 0.9")
    assert found.needed == pytest.approx(0.9 * 4)
    assert Certification.load(found.save(tmp_path / "c.json")) == found
    curve = found.curve()
    assert [share for _, share in curve] == sorted((share for _, share in curve), reverse=True)
    for words in ("VACUOUS", "majority vote", "S = "):
        assert words in str(found)
    sure = certify(
        lambda x: torch.stack([1 + 0 * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1), images(), sigma=9.0, n0=9, n=99
    )
    assert "100.0 % are certified" in sure.statement
    assert set(sure.radii) == {sure.largest} == {9.0 * stats.norm.ppf(0.001 ** (1 / 99))}
    assert sure.accuracy_at(sure.largest) == 1
    assert dataclasses.replace(found, norm="l1").needed == pytest.approx(0.9 * 16)


def test_pixeldp_gives_its_own_radius():
    from learn2perturb.defenses import build_defense

    torch.manual_seed(0)
    net = build_defense("pixeldp").prepare(build_model("digits_cnn", input_shape=(1, 8, 8)), (1, 8, 8)).eval()
    data = load_data("digits", "test", limit=3)
    found = certify(net, data, method="pixeldp", n0=50, n=500, alpha=0.05)
    tight = certify(net, data, method="first_noise", n0=50, n=500, alpha=0.05)
    assert (found.norm, found.exact) == ("l2", False)
    assert found.constant >= tight.constant  # a bound of what the other has exactly
    assert found.largest < tight.largest
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.copy_(torch.arange(10.0))
    sure = certify(net, data, method="pixeldp", n0=50, n=500, alpha=0.05)
    level = (0.05 / 10) ** (1 / 500)  # Bonferroni over ten classes, and not once more: other draws chose
    agreed = gaussian_dp_radius(level, 1 - level, sigma=1.0, sensitivity=sure.constant)
    assert [*sure.radii, sure.largest] == pytest.approx([float(agreed)] * 4)
    with pytest.raises(NoiseError, match="one noise layer"):
        certify(network(), images(), method="pixeldp", n0=2, n=4)
