"""``certify``: settings at their edges, what its progress tells, and the rule that its method names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.certification import certify
from learn2perturb.certification.bounds import laplace_radius
from learn2perturb.errors import ConfigError, InputError, NoiseError
from learn2perturb.noise import noise_modules, perturb
from learn2perturb.noise.sensitivity import sensitivity

X, Y = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64)


def sure(x: Tensor) -> Tensor:
    """Class 0 of three, whatever the image."""
    return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3) + 0 * x.flatten(1)[:, :1]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5, -0.1, 1, True, "0.1", None, math.nan])
def test_alpha_is_a_chance(alpha):
    with pytest.raises(ConfigError, match=r"alpha is .*, must be a number in \(0, 1\); 0.001 is usual"):
        certify(sure, (X, Y), sigma=0.1, alpha=alpha)


@pytest.mark.parametrize("sigma", [0.0, -0.1, math.inf, math.nan, True, "0.1"])
def test_smoothing_has_noise_of_a_size(sigma):
    with pytest.raises(ConfigError, match="sigma is .*; smoothing needs one above 0"):
        certify(sure, (X, Y), sigma=sigma)


def test_what_is_allowed():
    found = certify(sure, (X, Y), sigma=1, n0=1, n=1, eps=0, alpha=0.9, batch_size=1, limit=2)
    assert (found.sigma, found.eps, found.alpha, found.n0, found.n) == (1, 0.0, 0.9, 1, 1)
    assert len(found.radii) == 2
    assert found.method == "smoothing"
    assert certify(sure, (X[:1], Y[:1]), sigma=0.1, n0=1, n=1).abstained == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "first_noise", "sigma": 0.1}, "sigma is 0.1 but method 'first_noise' has the noise of the model"),
        ({"method": "pixeldp", "sigma": 0.1}, "sigma is 0.1 but method 'pixeldp' has the noise of the model"),
        ({"method": "smoothing"}, "sigma is None; smoothing needs one above 0"),
        ({"method": "best"}, "method is 'best'; allowed: auto, first_noise, smoothing, pixeldp"),
        ({"sigma": 0.1, "eps": -0.1}, "eps"),
        ({"sigma": 0.1, "batch_size": 0}, "batch_size"),
        ({"sigma": 0.1, "n0": 0}, "n0"),
    ],
)
def test_what_is_not_allowed(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        certify(sure, (X, Y), **settings)


def test_what_cannot_be_certified_is_said():
    with pytest.raises(NoiseError, match=r"the model is a function, and method 'first_noise' must look inside"):
        certify(sure, (X, Y))
    with pytest.raises(ConfigError, match="model is a int, must be callable"):
        certify(3, (X, Y), sigma=0.1)
    with pytest.raises(InputError, match=r"images have shape \(0, 1, 4, 4\)"):
        certify(sure, (X[:0], Y[:0]), sigma=0.1)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_progress_counts_every_vote_once(batch_size):
    told: list[tuple[float, float, str]] = []
    certify(sure, (X, Y), sigma=0.1, n0=3, n=8, batch_size=batch_size, progress=lambda *report: told.append(report))
    choosing, total = 5 * 3, 5 * 11
    ends = [*range(7, choosing, 7), choosing], [*range(choosing + 7, total, 7), total]
    expected = [*ends[0], *ends[1]] if batch_size == 7 else [choosing, total]
    assert told == [(done, total, "votes") for done in expected]


def test_every_image_gets_its_votes_whatever_the_batch():
    """The class is the image's number; with this noise no vote goes astray."""

    def number(x: Tensor) -> Tensor:
        return -(x.mean(dim=(1, 2, 3), keepdim=True).view(-1, 1) - torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])).abs()

    x = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    for batch_size in (1, 3, 10, 1000):
        found = certify(number, (x, torch.arange(5)), sigma=0.01, n0=4, n=60, batch_size=batch_size)
        assert found.votes.unpack().tolist() == [60] * 5
        assert found.predictions.unpack().tolist() == [0, 1, 2, 3, 4]
        assert found.constant == pytest.approx(100)
        assert (found.num_classes, found.pixels, found.norm, found.exact, found.site) == (5, 16, "l2", True, None)
        assert 0 < found.metadata["seconds"] < 60
        assert found.metadata["batch_size"] == batch_size


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).flatten(1))


@pytest.mark.parametrize("distribution", ["laplace", "gaussian"])
def test_pixeldp_of_laplace_noise_is_of_l1(distribution):
    torch.manual_seed(0)
    net = perturb(Net().eval(), input_shape=(1, 4, 4), sites="conv", granularity="layer", distribution=distribution,
                  init=0.5).eval()  # fmt: skip
    net.out.weight.data.zero_()
    net.out.bias.data.copy_(torch.tensor([0.0, 1.0, 2.0]))
    found = certify(net, (X, Y + 2), method="pixeldp", n0=5, n=400, alpha=0.05)
    norm = "l1" if distribution == "laplace" else "l2"
    assert (found.method, found.norm, found.site, found.exact, found.sigma) == ("pixeldp", norm, "conv", False, None)
    assert found.constant == pytest.approx(float(sensitivity(net, net.conv, norm)) / 0.5)
    assert found.predictions.unpack().tolist() == [2] * 5
    assert set(found.radii) == {found.largest}
    level = (0.05 / 3) ** (1 / 400)
    if distribution == "laplace":
        agreed = laplace_radius(level, 1 - level, sigma=1.0, sensitivity=found.constant)
        assert found.largest == pytest.approx(float(agreed))


@pytest.mark.parametrize("change", ["two", "many scales", "input"])
def test_pixeldp_is_of_one_scale_on_the_output_of_one_layer(change):
    settings = {"granularity": "layer"} | {"two": {}, "many scales": {"granularity": "channel"},
                                           "input": {"place": "input"}}[change]  # fmt: skip
    net = perturb(Net().eval(), input_shape=(1, 4, 4), sites=["conv", "out"] if change == "two" else "conv", **settings)
    assert len(noise_modules(net)) == (2 if change == "two" else 1)
    with pytest.raises(NoiseError, match="PixelDP's certificate is for one noise layer with one scale, on the output"):
        certify(net.eval(), (X, Y), method="pixeldp", n0=2, n=4)
