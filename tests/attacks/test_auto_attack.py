"""AutoAttack: the published parts and budgets, the worst of them, and both ways of counting on a stochastic model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from learn2perturb.attacks import APGD, FAB, AutoAttack, Square, auto_attack_report, build_attack
from learn2perturb.errors import ConfigError, InputError
from tests.problems import NoisyLinear

SMALL = AutoAttack(0.15, steps=8, targets=3, queries=40, draws=5, seed=0)
SHAPE = (3, 4, 4)


def test_parts_and_budgets_are_the_published_ones():
    eps = 8 / 255
    assert AutoAttack(eps).parts(10) == {
        "apgd-ce": APGD(eps, 100, loss="ce"),
        "apgd-t": APGD(eps, 100, loss="dlr", targets=9),
        "fab-t": FAB(eps, steps=100, targets=9, early_stop=True),
        "square": Square(eps, queries=5000, rescale=False),
    }
    assert build_attack("autoattack_rand", norm="l2", eps=0.5).parts(10) == {
        "apgd-ce": APGD(0.5, 100, loss="ce", norm="l2", eot=20),
        "apgd-dlr": APGD(0.5, 100, loss="dlr", norm="l2", eot=20),
    }
    assert AutoAttack().parts(3)["apgd-t"].loss == "margin"  # the ratio needs four logits
    assert AutoAttack(version="rand").parts(2)["apgd-dlr"].loss == "margin"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_part_alone_is_stronger_on_a_deterministic_model(norm, trained):
    attack = dataclasses.replace(SMALL, norm=norm, eps={"linf": 0.15, "l2": 0.8}[norm])
    whole = attack.run(*trained)
    alone = [dataclasses.replace(part, seed=0).run(*trained).success_rate for part in attack.parts(10).values()]
    assert whole.success_rate >= max(alone) - 1e-6
    report = auto_attack_report(*trained, attack, batch_size=64)
    assert not report.stochastic
    assert report.accuracy == report.headline == pytest.approx(1 - whole.success_rate, abs=0.03)
    steps = [report.clean, *report.parts.values(), report.accuracy]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == pytest.approx(steps[-2])
    assert report.correct.shape == (1, 100)


class Moody(nn.Module):
    """Right with probability ``share`` whatever the image: no attack can do anything."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        right = torch.rand(len(x)) < self.share
        flat = 0.0 * x.flatten(1).sum(dim=1)
        return torch.stack([flat + right.float(), flat + 0.5, flat - 1, flat - 1], dim=1)


@pytest.mark.parametrize(("version", "parts"), [("standard", 4), ("rand", 2)])
def test_unlucky_draws_lower_the_headline_and_not_the_accuracy(version, parts):
    x, y = torch.rand(400, 1, 3, 3), torch.zeros(400, dtype=torch.int64)
    attack = dataclasses.replace(SMALL, version=version, steps=2, targets=1, queries=3, draws=20)
    report = auto_attack_report(Moody(0.8), x, y, attack, draws=20)
    assert report.stochastic
    assert report.accuracy == pytest.approx(0.8, abs=0.02)
    assert report.clean == pytest.approx(0.8, abs=0.02)
    assert all(value == pytest.approx(0.8, abs=0.02) for value in report.parts.values())
    assert report.headline == pytest.approx(0.8 ** (1 + parts), abs=0.07)
    assert report.std == pytest.approx((0.8 * 0.2 / 400) ** 0.5, rel=0.6)
    assert report.correct.shape == (20, 400)
    assert "published headline" in str(report)


def test_the_worst_point_of_each_image_is_kept_on_a_stochastic_model():
    torch.manual_seed(0)
    x, model = torch.rand(24, *SHAPE), NoisyLinear(SHAPE, sigma=0.3)
    model.sigma = 0.0
    y = model(x).argmax(dim=1)
    model.sigma = 0.3
    report = auto_attack_report(model, x, y, dataclasses.replace(SMALL, eps=0.03, eot=4, draws=40), draws=100)
    assert report.accuracy <= min(report.parts.values()) + 0.03
    assert report.headline < report.accuracy < report.clean


def test_a_seed_makes_the_report_and_leaves_the_callers_generator_alone():
    x, model = torch.rand(6, *SHAPE), NoisyLinear(SHAPE)
    y = torch.zeros(6, dtype=torch.int64)
    attack = dataclasses.replace(SMALL, version="rand", steps=3)
    state = torch.get_rng_state()
    first = auto_attack_report(model.train(), x, y, attack, draws=4, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    second = auto_attack_report(model, x, y, attack, draws=4, batch_size=4)
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.correct, second.correct)


def test_bad_settings_and_inputs():
    with pytest.raises(ConfigError, match="version is 'plus'; allowed: standard, rand"):
        AutoAttack(version="plus")
    with pytest.raises(ConfigError, match="queries must be a whole number of at least 1, got 0"):
        AutoAttack(queries=0)
    with pytest.raises(InputError, match="x is empty"):
        auto_attack_report(nn.Flatten(), torch.rand(0, *SHAPE), torch.zeros(0, dtype=torch.int64), SMALL)
    with pytest.raises(ConfigError, match="draws must be a whole number"):
        auto_attack_report(nn.Flatten(), torch.rand(1, *SHAPE), torch.zeros(1, dtype=torch.int64), SMALL, draws=0)
