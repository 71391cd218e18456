"""The shared caller at its bounds: what images, labels and radii may be, what is counted, and what a result says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from learn2perturb.attacks import CW, FAB, FGSM, PGD, Attack, AttackResult, FewPixel, Square
from learn2perturb.attacks.inputs import check_images
from learn2perturb.attacks.losses import dlr, margin, targeted_dlr
from learn2perturb.attacks.query import Query
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError
from tests.problems import Linear, NoisyLinear, two_logits

SHAPE = (1, 2, 2)


def zeros(x):
    return torch.zeros(len(x), dtype=torch.int64)


def model(x):
    return two_logits(x.flatten(1).sum(dim=1) - 2)


# --- images and labels


@pytest.mark.parametrize(("low", "high", "good"), [
    (0.0, 1.0, True), (-9e-7, 1.0, True), (0.0, 1 + 9e-7, True), (-2e-6, 1.0, False), (0.0, 1 + 2e-6, False),
    (-1.0, 0.5, False), (0.5, 255.0, False),
])  # fmt: skip
def test_pixels_may_leave_the_box_by_rounding_alone(low, high, good):
    x = torch.tensor([low, high, 0.5, 0.5], dtype=torch.float64).view(1, *SHAPE)
    if good:
        check_images(model, x, zeros(x))
        return
    with pytest.raises(InputError, match=r"x must be in \[0, 1\], got values from .* to .*; divide bytes by 255"):
        check_images(model, x, zeros(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_pixel_that_is_not_finite_is_told(value):
    x = torch.full((1, *SHAPE), 0.5)
    x[0, 0, 1, 1] = value
    with pytest.raises(InputError, match="x holds NaN or infinite values; all pixels must be finite"):
        check_images(model, x, zeros(x))


@pytest.mark.parametrize(("y", "good"), [([0, 1], True), ([1, 1], True), ([0, 2], False), ([-1, 0], False)])
def test_labels_are_classes_of_the_model(y, good):
    x, y = torch.rand(2, *SHAPE), torch.tensor(y)
    if good:
        FGSM()(model, x, y)
        return
    with pytest.raises(InputError, match=r"y must be in 0..1 \(the model has 2 classes\), got values from -?\d to \d"):
        FGSM()(model, x, y)


def test_craft_checks_no_values():
    """In a training loop a look at the values would wait for the device."""
    x = torch.rand(2, *SHAPE) + 2
    assert FGSM().craft(model, x, zeros(x)).max() == 1
    with pytest.raises(InputError):
        FGSM()(model, x, zeros(x))


# --- settings


@pytest.mark.parametrize("attack", [FGSM, PGD, Square])
def test_an_infinite_radius_is_for_attacks_that_look_for_the_norm(attack):
    with pytest.raises(ConfigError, match="eps must be finite"):
        attack(math.inf, norm="l2")
    assert FAB(math.inf).eps == CW(math.inf).eps == math.inf
    for bad in (-0.1, math.nan, True):
        with pytest.raises(ConfigError, match="eps must be"):
            FAB(bad)


def test_who_takes_a_common_radius():
    assert PGD().sized
    assert PGD(2.0, norm="l2").sized
    assert FAB(0.1).sized
    assert not FAB().sized
    assert not FewPixel().sized
    assert FAB(0.1, targets=3).resized(0.2) == FAB(0.2, targets=3)
    assert PGD().ball is not PGD(0.5, norm="l2").ball


@pytest.mark.parametrize(("seed", "good"), [(None, True), (0, True), (-3, True), (2**62, True), (True, False),
                                            (False, False), (1.0, False), ("1", False)])  # fmt: skip
def test_a_seed_is_a_whole_number(seed, good):
    if good:
        assert FGSM(seed=seed).seed == seed
        return
    with pytest.raises(ConfigError, match="seed must be a whole number or None, got"):
        FGSM(seed=seed)


# --- what is counted


@pytest.mark.parametrize("eot", [1, 3])
@pytest.mark.parametrize("average", ["loss", "logits"])
def test_a_query_counts_images_and_draws(eot, average):
    x, noisy = torch.rand(5, *SHAPE), NoisyLinear(SHAPE)
    query = Query(noisy, PGD(eot=eot, eot_average=average), zeros(x), strict=True)
    query.gradient(x, zeros(x))
    gradient = eot if average == "loss" or eot == 1 else 2 * eot
    assert (query.forwards, query.backwards) == (5 * gradient, 5 * eot)
    query.value_and_gradient(x, zeros(x))
    assert (query.forwards, query.backwards) == (10 * gradient, 10 * eot)
    query.value(x, zeros(x))
    query.score(x, zeros(x), 4)
    assert (query.forwards, query.backwards) == (10 * gradient + 5 * eot + 20, 10 * eot)


@pytest.mark.parametrize("targeted", [False, True])
def test_values_point_at_the_aim(targeted):
    x, y, linear = torch.rand(5, *SHAPE), torch.tensor([0, 1, 0, 1, 0]), Linear(SHAPE)
    query = Query(linear, PGD(loss="margin", targeted=targeted), y, strict=True)
    sign = -1 if targeted else 1
    gap = margin(linear(x), y).detach()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(margin(linear(leaf), y).sum(), leaf)
    torch.testing.assert_close(query.score(x, y, 2), sign * gap)
    share, mean = query.success(x, y, 3)
    assert torch.equal(share, (sign * gap > 0).float())
    torch.testing.assert_close(mean, sign * gap)
    values, gradient = query.value_and_gradient(x, y)
    torch.testing.assert_close(gradient, sign * slope)
    torch.testing.assert_close(query.gradient(x, y), sign * slope)
    for found in (values, query.value(x, y)):
        torch.testing.assert_close(found.margin, sign * gap)
        torch.testing.assert_close(found.loss, sign * gap)
    # A loss that is handed over is to be raised as it is; the margin still is the aim's.
    other, raised = query.value_and_gradient(x, y, loss=margin)
    torch.testing.assert_close(raised, slope)
    torch.testing.assert_close(query.gradient(x, y, loss=margin), slope)
    torch.testing.assert_close(other.loss, gap)
    torch.testing.assert_close(query.value(x, y, loss=margin).loss, gap)
    torch.testing.assert_close(other.margin, sign * gap)


@pytest.mark.parametrize("targeted", [False, True])
def test_success_is_of_the_aim(targeted):
    x, y, linear = torch.rand(6, *SHAPE), torch.tensor([0, 1, 0, 1, 0, 1]), Linear(SHAPE)
    gap = margin(linear(x), y).detach() * (-1 if targeted else 1)
    share, mean = Query(linear, PGD(targeted=targeted), y, strict=True).success(x, y, 3)
    torch.testing.assert_close(mean, gap)
    assert share.tolist() == (gap > 0).float().tolist()


def test_a_margin_of_0_is_no_success():
    x = torch.rand(3, *SHAPE)
    query = Query(lambda images: torch.zeros(len(images), 2), PGD(), zeros(x), strict=True)
    assert query.success(x, zeros(x), 2)[0].tolist() == [0, 0, 0]
    assert not query.broken(x, zeros(x), torch.zeros(3)).any()


def test_a_part_counts_for_the_whole_and_keeps_what_is_known():
    calls, x = [], torch.rand(4, *SHAPE)
    whole = Query(lambda images: (calls.append(len(images)), model(images))[1], PGD(), zeros(x), strict=True)
    assert whole.deterministic(x)
    assert whole.deterministic(x)
    assert len(calls) == 8  # asked once
    assert whole.num_classes(x) == 2
    assert len(calls) == 8
    with whole.part(FGSM()) as part:
        assert part.deterministic(x)
        part.gradient(x, zeros(x))
        assert part.watch is whole.watch
    assert len(calls) == 9
    assert (whole.forwards, whole.backwards) == (36, 4)
    assert Query(model, PGD(), zeros(x), strict=False).deterministic(x) is False  # craft does not ask


def test_the_classes_are_counted_by_a_pass_where_there_was_none():
    x = torch.rand(4, *SHAPE)
    query = Query(lambda images: images.flatten(1)[:, :3], PGD(), zeros(x), strict=True)
    assert query.num_classes(x) == 3
    assert query.forwards == 4


# --- the ball and the result


class Off(Attack):
    """Goes ``beyond`` its radius, along the first pixel."""

    beyond = 0.0

    def perturb(self, query, x, y):
        moved = x.clone()
        moved[:, 0, 0, 0] += self.eps + self.beyond
        return moved


@pytest.mark.parametrize(("eps", "norm", "beyond", "good"), [
    (0.5, "linf", 9e-7, True), (0.5, "linf", 2e-6, False), (0.5, "l2", 9e-7, True), (0.5, "l2", 2e-6, False),
    (0.5, "linf", -0.2, True),
])  # fmt: skip
def test_a_ball_is_left_by_rounding_alone(eps, norm, beyond, good):
    x = torch.full((2, *SHAPE), 0.2, dtype=torch.float64)
    attack = type("Off", (Off,), {"beyond": beyond})(eps, norm=norm)
    if good:
        assert attack.run(model, x, zeros(x)).linf.max().item() == pytest.approx(eps + beyond)
        return
    with pytest.raises(Learn2PerturbError, match=rf"Off left its {norm} ball: distance 0.500002, eps 0.5; this is a"):
        attack.run(model, x, zeros(x))


def test_the_tolerance_of_radii_below_1_is_a_millionth():
    x = torch.full((2, *SHAPE), 0.2, dtype=torch.float64)
    with pytest.raises(Learn2PerturbError, match="left its linf ball"):
        type("Off", (Off,), {"beyond": 1.5e-6})(0.5).run(model, x, zeros(x))


def test_the_tolerance_grows_with_radii_above_1():
    class Wide(Attack):
        def perturb(self, query, x, y):
            return x + (self.eps + 3e-6) / 4

    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    Wide(3.9, norm="l2").run(lambda images: images.flatten(1)[:, :2], x, zeros(x))  # 3.9e-6 are allowed
    with pytest.raises(Learn2PerturbError, match="left its l2 ball"):
        Wide(2.9, norm="l2").run(lambda images: images.flatten(1)[:, :2], x, zeros(x))


def test_images_that_are_nan_are_the_attacks_fault():
    class Lost(Attack):
        def perturb(self, query, x, y):
            return x * math.nan

    x = torch.rand(1, *SHAPE)
    with pytest.raises(InputError, match=r"Lost returned images that are NaN; its perturb\(\) divides by 0 near x"):
        Lost().run(model, x, zeros(x))


@pytest.mark.parametrize("eps", [0.1, math.inf])
def test_only_a_finite_radius_of_a_minimum_norm_attack_is_projected_onto(eps):
    class Far(Attack):
        minimum_norm = True

        def perturb(self, query, x, y):
            return x + 0.3

    x = torch.full((1, *SHAPE), 0.2)
    assert Far(eps).run(model, x, zeros(x)).linf.item() == pytest.approx(min(eps, 0.3))


def test_a_result_in_words_and_its_norms():
    found = AttackResult(
        PGD(0.1), torch.zeros(4, *SHAPE), torch.tensor([True, True, True, False]), torch.tensor([0.1, 0.1, 0.0, 0.2]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4), 7.0, 3.5, 1.234,
    )  # fmt: skip
    assert found.success_rate == 0.75
    assert str(found).endswith(
        "success 75.0% of 4 images (one draw), mean linf 0.1000, l2 2.500, 7 forward and 3.5 backward passes, 1.23 s"
    )
    assert found.norms.tolist() == [pytest.approx(0.1), pytest.approx(0.1), 0.0, math.inf]
    wide = dataclasses.replace(found, attack=PGD(0.1, norm="l2"))
    assert wide.norms.tolist() == [1, 2, 3, math.inf]
    assert found.zero_gradients is None


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_a_network_is_crafted_on_in_the_mode_asked_for(mode):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network.eval()
    network[1].train()
    seen = []
    network[2].register_forward_hook(lambda *_: seen.append((network.training, network[1].training)))
    x = torch.rand(3, *SHAPE)
    FGSM().craft(network, x, zeros(x), mode=mode)
    assert seen == [{"eval": (False, False), "train": (True, True), "keep": (False, True)}[mode]]
    assert (network.training, network[1].training) == (False, True)


# --- losses at their bounds


def test_the_ratio_of_three_and_of_four_classes():
    z, y = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64), torch.tensor([2])
    assert dlr(z, y).item() == pytest.approx((3 - 2) / (3 - 1))
    four = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    assert targeted_dlr(four, y, torch.tensor([0])).item() == pytest.approx((1 - 2) / (3 - (1 + 0) / 2))
    tiny = 1e-12  # what keeps equal logits from a division by 0
    assert dlr(torch.tensor([[0.0, tiny, 0.0]], dtype=torch.float64), torch.tensor([0])).item() == pytest.approx(0.5)
    small = torch.tensor([[0.0, tiny, 0.0, 0.0]], dtype=torch.float64)
    assert targeted_dlr(small, torch.tensor([0]), torch.tensor([1])).item() == pytest.approx(0.5)
    with pytest.raises(InputError, match="loss 'dlr' needs at least 3 classes, got 2; use loss='margin'"):
        dlr(z[:, :2], torch.tensor([0]))
    with pytest.raises(InputError, match="loss 'dlr' with targets needs at least 4 classes, got 3; use loss='margin'"):
        targeted_dlr(z, y, torch.tensor([0]))


def test_at_low_precision_a_pass_in_full_precision_confirms_what_is_broken():
    """Rounding alone breaks nothing, and a tie is none."""
    y = torch.zeros(4, dtype=torch.int64)
    low = torch.tensor([1.0, 1.0, 1.0, -1.0])
    full = torch.tensor([1.0, 0.0, -1.0, 1.0])  # broken, a tie, rounded over, not asked about

    def model(x):
        known = low if execution.current().dtype is not None else full
        margins = known[x[:, 0, 0, 0].long()]
        return torch.stack([-margins / 2, margins / 2], dim=1)

    x = torch.arange(4.0).view(4, 1, 1, 1)
    query = Query(model, PGD(), y, strict=True)
    assert query.broken(x, y, low).tolist() == [True, True, True, False]
    assert query.forwards == 0  # in full precision nothing is to be confirmed
    with execution.running(execution.ExecutionMode("test", dtype=torch.bfloat16)):
        assert query.broken(x, y, low).tolist() == [True, False, False, False]
        assert query.forwards == 3
        assert not query.broken(x, y, -low.abs()).any() and query.forwards == 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_of_an_unbounded_search_are_returned_as_they_were_found(norm):
    class Known(Attack):
        minimum_norm = True

        def perturb(self, query, x, y):
            return points

    x, points = torch.rand(2, 8, *SHAPE, generator=torch.Generator().manual_seed(0)).square().unbind()
    assert torch.equal(Known(math.inf, norm=norm)(model, x, zeros(x)), points)
