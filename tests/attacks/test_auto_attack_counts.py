"""AutoAttack's parts at the numbers of classes, and how its report chooses, counts and says it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from learn2perturb.attacks import AutoAttack, AutoAttackReport, auto_attack_report
from learn2perturb.attacks.base import Attack
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError
from tests.problems import two_logits


@pytest.mark.parametrize(("version", "part", "least"), [("standard", "apgd-t", 4), ("rand", "apgd-dlr", 3)])
def test_the_ratio_is_raised_from_so_many_classes_on(version, part, least):
    attack = AutoAttack(version=version)
    losses = [attack.parts(classes)[part].loss for classes in (2, least - 1, least, least + 1, 10)]
    assert losses == ["margin", "margin", "dlr", "dlr", "dlr"]


def test_parts_take_over_what_they_share():
    attack = AutoAttack(0.3, norm="l2", eot=2, eot_average="logits", steps=7, targets=3, queries=11)
    parts = attack.parts(10)
    assert all((part.eps, part.norm, part.eot, part.eot_average) == (0.3, "l2", 2, "logits") for part in parts.values())
    assert (parts["apgd-ce"].steps, parts["apgd-t"].steps, parts["fab-t"].steps) == (7, 7, 7)
    assert (parts["apgd-ce"].targets, parts["apgd-t"].targets, parts["fab-t"].targets) == (0, 3, 3)
    assert (parts["square"].queries, parts["square"].rescale, parts["fab-t"].early_stop) == (11, False, True)


@pytest.mark.parametrize("name", ["steps", "targets", "queries", "draws"])
def test_counts_begin_at_1(name):
    assert getattr(AutoAttack(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
        AutoAttack(**{name: 0})


@dataclasses.dataclass(frozen=True)
class Point(Attack):
    """A part that always answers with the same grey value."""

    value: float = 0.0
    started = []  # noqa: RUF012 - what all parts were given, in order

    def perturb(self, query, x, y):
        self.started.append((self.value, len(x), self.seed))
        return torch.full_like(x, self.value)


@pytest.fixture
def parts(monkeypatch):
    Point.started.clear()
    values = [0.2, 0.6, 0.4]
    monkeypatch.setattr(AutoAttack, "parts", lambda self, classes: {f"p{v}": Point(1.0, value=v) for v in values})
    return values


def test_a_deterministic_model_meets_each_part_with_the_images_that_stand(parts):
    x, y = torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)

    def model(images):  # wrong from 0.5 on
        return two_logits(images.flatten() - 0.5)

    report = auto_attack_report(model, x, y, AutoAttack(1.0), batch_size=3)
    assert [(value, count) for value, count, _ in Point.started] == [(0.2, 3), (0.6, 3), (0.2, 1), (0.6, 1)]
    assert report.parts == {"p0.2": 1.0, "p0.6": 0.0, "p0.4": 0.0}
    assert (report.clean, report.accuracy, report.headline, report.std) == (1.0, 0.0, 0.0, 0.0)
    assert (report.draws, report.stochastic) == (1, False)
    assert torch.equal(report.x_adv, torch.full_like(x, 0.6))
    assert {seed for *_, seed in Point.started} == {None}


def test_images_that_are_wrong_are_left_alone_and_a_tie_stands(parts):
    x, y = torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    report = auto_attack_report(lambda images: two_logits(images.flatten() - 0.5), x, y, AutoAttack(1.0))
    assert [count for _, count, _ in Point.started] == [2, 2]  # a margin of 0 is right
    assert report.clean == pytest.approx(2 / 3)
    assert report.correct.tolist() == [[False] * 3]


def test_a_stochastic_model_keeps_the_point_that_fools_most_draws_then_of_largest_margin(parts):
    x, y = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)

    def model(images):  # hardly random: wrong from 0.3 on, by as much
        return two_logits(images.flatten() - 0.3 + 1e-6 * torch.randn(len(images)))

    report = auto_attack_report(model, x, y, AutoAttack(1.0, draws=3, seed=7), draws=5)
    assert [(value, count) for value, count, _ in Point.started] == [(value, 2) for value in parts]
    assert torch.equal(report.x_adv, torch.full_like(x, 0.6))
    assert (report.draws, report.stochastic) == (5, True)
    assert report.correct.shape == (5, 2)
    assert report.parts == {"p0.2": 1.0, "p0.6": 0.0, "p0.4": 0.0}
    assert (report.accuracy, report.std, report.headline) == (0.0, 0.0, 0.0)
    wanted = [derive_seed(7, f"p{value}", 0) for value in parts]
    assert [seed for *_, seed in Point.started] == wanted


@pytest.mark.parametrize(("noise", "more"), [(0.0, 0), (1e-6, 3 * 19)])
def test_points_of_parts_are_judged_by_fresh_draws_where_there_are_any(noise, more, parts):
    """Each of three parts by so many passes; one pass tells all of a deterministic model."""
    x, y = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)

    def model(images):
        return two_logits(images.flatten() - 0.9 + (noise * torch.randn(len(images)) if noise else 0))

    few, many = (AutoAttack(1.0, draws=draws).run(model, x, y).forward_passes for draws in (1, 20))
    assert many - few == more
    if not noise:  # to know that there is none; at the images; for each part, whether it broke them and how well
        assert few == 8 + 1 + 3 * 2


def test_more_fooled_draws_count_for_more_than_a_wider_margin(monkeypatch):
    Point.started.clear()
    monkeypatch.setattr(AutoAttack, "parts", lambda self, classes: {v: Point(1.0, value=v) for v in (0.8, 0.4)})
    x, y, calls = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), []

    def model(images):
        calls.append(0)
        # At 0.8 wrong by far in every second draw; at 0.4 wrong by a little in all.
        often = torch.tensor(10.0 if len(calls) % 2 else -1.0)
        z = torch.where(images.flatten() > 0.6, often, torch.where(images.flatten() > 0.2, 0.1, -1.0))
        return two_logits(z + 1e-7 * torch.randn(len(images)))

    report = auto_attack_report(model, x, y, AutoAttack(1.0, draws=4), draws=4)
    assert report.x_adv.item() == pytest.approx(0.4)


@pytest.mark.parametrize("draws", [2, 40])
def test_the_spread_is_that_of_the_draws(draws, parts):
    def model(images):
        return two_logits(0 * images.flatten() + torch.randn(len(images)))

    x, y = torch.zeros(50, 1, 1, 1), torch.zeros(50, dtype=torch.int64)
    report = auto_attack_report(model, x, y, AutoAttack(1.0, draws=1, seed=4), draws=draws)
    each = report.correct.double().mean(dim=1)
    assert each.std() > 0
    assert report.std == pytest.approx(each.std().item())
    assert report.accuracy == pytest.approx(each.mean().item())
    assert auto_attack_report(model, x, y, AutoAttack(1.0, draws=1), draws=1).std == 0


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_report_in_words(stochastic):
    report = AutoAttackReport(
        AutoAttack(0.1, norm="l2"), stochastic, 20, 0.9, {"apgd-ce": 0.5, "square": 0.25}, 0.2, 0.01, 0.1,
        torch.zeros(7, 1, 1, 1), torch.zeros(20, 7),
    )  # fmt: skip
    lines = str(report).split("\n")
    head = "7 images, mean of 20 fresh draws" if stochastic else "deterministic"
    assert lines[0] == f"AutoAttack standard, l2 0.1: {head}"
    assert [line.rsplit("  ", 1)[0].strip() for line in lines[1:5]] == [
        "clean",
        "apgd-ce",
        "square",
        "all, each image's worst",
    ]
    assert [line[-5:] for line in lines[1:5]] == ["90.0%", "50.0%", "25.0%", "20.0%"]
    assert (len(lines) == 6) == stochastic
    assert ("published headline: any one wrong draw  10.0%" in str(report)) == stochastic
    assert len({len(line) for line in lines[1:]}) == 1  # in columns


def test_in_a_part_of_another_attack_drops_are_those_of_the_model():
    x, y = torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    fragile = AutoAttack(1.0, steps=2, targets=1, queries=3, draws=2, seed=0)
    result = fragile.run(lambda images: two_logits(images.flatten(1).sum(dim=1) - 0.1), x, y)
    assert result.success.all()
    assert result.backward_passes <= 2  # APGD breaks all: no other part begins


def test_images_of_a_stochastic_model_are_all_attacked_and_of_equal_points_the_first_is_kept(parts):
    """Its noise is on images that are nearly black alone, so that points of parts are equally good."""
    x, y = torch.tensor([0.9, 0.0]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)

    def model(images):
        pixel = images.flatten()
        noise = 1e-6 * torch.randn(len(pixel)) * (pixel < 0.1)
        return two_logits(torch.where(pixel > 0.3, 1.0, -1.0) + noise)

    report = auto_attack_report(model, x, y, AutoAttack(1.0, draws=3, seed=7), draws=2)
    assert report.stochastic and [count for _, count, _ in Point.started] == [2, 2, 2]
    assert torch.equal(report.x_adv, torch.full_like(x, 0.6))


def test_a_report_is_of_the_model_in_eval_mode(parts):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(4, 2)).train()
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    assert not auto_attack_report(model, x, y, AutoAttack(1.0)).stochastic
    assert model.training
