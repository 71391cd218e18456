"""Pinot's bound on a classifier whose risk under attack is known in closed form; what it refuses; its record."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from learn2perturb.certification import RiskGap, certify, risk_gap
from learn2perturb.certification.gap import bounds_of, divergence, entropy_bounds, risk_gap_bound, total_variation
from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError, NoiseError
from learn2perturb.noise import perturb, perturb_images, vary_weights
from learn2perturb.records import PackedIntegers

SIGMA, SHAPE = 0.5, (1, 2, 2)


def halfspace(sigma=SIGMA):
    """Right where ``w . (x + sigma eps) > b``: the accuracy of a draw is ``Phi((w . x - b) / (sigma |w|))``."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[3.0, 0, 0, 4.0], [0, 0, 0, 0]]))
        network[1].bias.copy_(torch.tensor([-3.5, 0.0]))
    return perturb_images(network, sigma, input_shape=SHAPE).eval()


def margins(x):
    return ((x.flatten(1) @ torch.tensor([3.0, 0, 0, 4.0]) - 3.5) / 5.0).numpy()


def data(n=30):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.zeros(n, dtype=torch.long)


def test_all_of_it_is_what_the_closed_form_says():
    x, y = data()
    found = risk_gap(halfspace(), (x, y), n=20_000, eps=0.1, alpha=0.01, progress=False)
    d = 0.1 * 2  # the l2 ball that holds the l_inf ball of four pixels
    assert found.exact and found.constant == pytest.approx(1 / SIGMA, rel=1e-6) and found.distance == pytest.approx(d)
    p = norm.cdf(margins(x) / SIGMA)
    assert found.accuracy == pytest.approx(p.mean(), abs=0.005)
    entropies = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    bounds = entropy_bounds(found.counts(), 0.01)
    assert bool((bounds >= entropies).all()) and float((bounds - entropies).max()) < 0.5
    kept = np.exp(-bounds).mean()
    assert found.bound == pytest.approx(1 - math.exp(-(d**2) / (2 * SIGMA**2)) * kept)
    assert found.floor == pytest.approx(1 - kept)
    assert found.direct == pytest.approx(2 * norm.cdf(d / (2 * SIGMA)) - 1)
    # What the worst change of l2 norm d takes: both bounds hold.
    gap = (p - norm.cdf((margins(x) - d) / SIGMA)).mean()
    assert gap <= found.direct <= found.bound


def test_the_total_variation_is_reached_where_the_boundary_is_half_way():
    d = 0.3
    reached = norm.cdf(d / (2 * SIGMA)) - norm.cdf((d / 2 - d) / SIGMA)
    assert total_variation(1 / SIGMA, d) == pytest.approx(reached)


def test_the_parts_of_the_bound():
    assert divergence(2.0, 0.5) == pytest.approx(0.5) and divergence(2.0, 0.5, order=3.0) == pytest.approx(1.5)
    assert risk_gap_bound(0.0, np.zeros(4)) == 0.0  # answers that are certain, no change: nothing is lost
    assert risk_gap_bound(math.log(2), np.array([0.0, math.log(2)])) == pytest.approx(1 - 0.5 * 0.75)
    assert entropy_bounds(np.array([[5, 5]]), 0.5)[0] == pytest.approx(math.log(2))  # never above log K


def test_how_vacuous_it_is_is_said():
    x, y = data()
    weak = risk_gap(halfspace(0.05), (x, y), n=500, eps=0.3, progress=False)
    assert weak.statement.startswith("VACUOUS against l_inf 0.3") and weak.bound > 0.99
    assert weak.reach < 0.3 and weak.direct_reach < 0.3
    right = x[torch.tensor(margins(x) > 0)]
    strong = risk_gap(halfspace(), (right, y[: len(right)]), n=2000, eps=0.01, progress=False)
    assert strong.statement.startswith("Against l_inf 0.01 the accuracy of a draw is at least")
    at = dataclasses.replace(strong, eps=strong.direct_reach)
    assert total_variation(at.constant, at.distance) == pytest.approx(strong.accuracy, rel=1e-6)
    assert "gap, Pinot et al. 2019" in str(strong)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head((self.stem(x) + x).flatten(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "has none"),
        (lambda: perturb(Around(), input_shape=SHAPE, sites=["stem"]), "goes around the first noise"),
        (lambda: vary_weights(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))), "in the weights"),
        (lambda: perturb(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=SHAPE, sites=["1"],
                         distribution="laplace"), "is laplace"),
        (lambda: perturb(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
                         input_shape=SHAPE, sites=["4"]), "not affine"),
    ],
)  # fmt: skip
def test_its_assumptions_are_checked(model, message):
    with pytest.raises(NoiseError, match=message):
        risk_gap(model().eval(), data(4), n=10, progress=False)


def test_what_is_no_module_or_another_method_is_refused():
    with pytest.raises(NoiseError, match="torch.nn.Module"):
        risk_gap(lambda x: x.flatten(1)[:, :2], data(4), n=10, progress=False)
    with pytest.raises(ConfigError, match="certify for radii"):
        risk_gap(halfspace(), data(4), method="first_noise", progress=False)
    with pytest.raises(ConfigError, match="risk_gap"):
        certify(halfspace(), data(4), method="renyi", n=10, progress=False)


def test_a_record_says_what_its_votes_give(tmp_path):
    found = risk_gap(halfspace(), data(6), n=200, eps=0.1, progress=False)
    path = found.save(tmp_path / "gap.json")
    again = RiskGap.load(path)
    assert again == found and again.bound == found.bound
    for field, value in (("bound", 0.0), ("direct", 0.0), ("eps", 0.2), ("n", 199)):
        text = json.loads(path.read_text())
        text[field] = value
        (tmp_path / "changed.json").write_text(json.dumps(text))
        with pytest.raises(CheckpointError):
            RiskGap.load(tmp_path / "changed.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, "none that a bound can have"),
        ({"alpha": 0.0}, "none that a bound can have"),
        ({"alpha": 1.0}, "none that a bound can have"),
        ({"constant": 0.0}, "none that a bound can have"),
        ({"constant": math.nan}, "none that a bound can have"),
        ({"num_classes": 1}, "none that a bound can have"),
        ({"num_classes": 3}, "one row for each image"),
        ({"labels": PackedIntegers.pack(np.zeros(0, dtype=np.int64))}, "one row for each image"),
        ({"labels": PackedIntegers.pack(np.array([0, 2]))}, "outside of what there is"),
        ({"labels": PackedIntegers.pack(np.array([0, -1]))}, "outside of what there is"),
        ({"votes": PackedIntegers.pack(np.array([9, 1, 11, -1]))}, "outside of what there is"),
        ({"n": 11}, "are not 11"),
        ({"bound": 0.5}, "bound is 0.5 and the votes give"),
        ({"floor": 0.4}, "floor is 0.4 and the votes give"),
        ({"direct": 0.5}, "direct is 0.5 and the votes give"),
    ],
)
def test_what_no_votes_can_give_is_refused(changed, message):
    votes, settings = np.array([[9, 1], [2, 8]]), {"n": 10, "alpha": 0.01, "constant": 0.5, "eps": 0.1, "pixels": 4}
    found = RiskGap(
        **settings, **bounds_of(votes, 0.01, 0.5, 0.2), exact=True, site="0", num_classes=2, seed=0,
        labels=PackedIntegers.pack(np.array([0, 1])), votes=PackedIntegers.pack(votes.flatten()),
    )  # fmt: skip
    found._check()
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(found, **changed)._check()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from torch import nn\nfrom learn2perturb.noise import perturb_images\n\n\ndef model():\n"
        "    return perturb_images(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.5, input_shape=(1, 8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    asked = ["certify", "own:model", "--dataset", "digits", "--method", "renyi", "--n", "50", "--limit", "10"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "renyi" and told["exact"] and told["constant"] == pytest.approx(2.0, rel=1e-6)
    assert RiskGap.load(told["record"]).statement == told["statement"]
    assert main([*asked, "--figures", "pictures"]) != 0
