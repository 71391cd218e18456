"""Certificates: closed forms, the exact constant, refusals, and radii that no attack breaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from learn2perturb.data import load_data
from learn2perturb.errors import ConfigError, InputError, NoiseError
from learn2perturb.evaluation import Certification, certify
from learn2perturb.evaluation import first_noise as rules
from learn2perturb.evaluation.certification import largest_radius, lower_bound, radius_of
from learn2perturb.evaluation.first_noise import first_noise
from learn2perturb.models import build_model
from learn2perturb.noise import fixed_noise, noise_disabled, noise_modules, perturb

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
    ("settings", "mend"),
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
def test_bad_settings_are_refused(settings, mend):
    with pytest.raises(ConfigError, match=mend):
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


def test_the_class_is_chosen_and_certified_by_different_draws():
    seen: list[int] = []

    def coin(x: Tensor) -> Tensor:
        seen.append(len(x))
        right = torch.rand(len(x)) < 0.5
        return torch.stack([right, ~right], dim=1).float()

    found = certify(coin, images(40), sigma=0.1, n0=9, n=200, alpha=0.01)
    # Of fair coins the vote of nine says nothing about the next 200; certifying with the choosing draws would.
    assert found.abstained >= 0.95
    assert sum(seen) >= 40 * 209


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
    with pytest.raises(NoiseError, match="one noise layer"):
        certify(network(), images(), method="pixeldp", n0=2, n=4)
