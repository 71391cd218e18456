"""Check 10's ratios where they are known: a network whose gradient is a known multiple of the true one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import PGD
from learn2perturb.diagnosis import QUICK
from learn2perturb.diagnosis.measure import Bench, Subject
from learn2perturb.diagnosis.truth import Ratios, ratios
from learn2perturb.engine import execution
from learn2perturb.evaluation.passes import Model


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number for each image."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: Tensor) -> Tensor:
        context.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = context.saved_tensors
        return gradient * factor, None


WEIGHT = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def scaled(x: Tensor) -> Tensor:
    """Two classes by a linear score; the first pixel, far from a step, says how false the gradient is."""
    factor = (x[:, :, :1, :1].detach() * 4).round()
    score = (Scaled.apply(x, factor).flatten(1) @ WEIGHT).unsqueeze(1)
    return torch.cat([score, torch.zeros_like(score)], dim=1)


def bench(model: Model, x: Tensor, *, batch_size: int = 4, stochastic: bool = False, some: int | None = None) -> Bench:
    n = len(x)
    plan = dataclasses.replace(QUICK, images=n, some=some or n)
    return Bench(
        Subject(model, stochastic=stochastic), x, torch.arange(n) % 2, PGD(0.1), plan, seed=0, mode=execution.PLAIN,
        batch_size=batch_size, expected_passes=1, progress=None,
    )  # fmt: skip


def images(first: list[float]) -> Tensor:
    x = torch.rand(len(first), 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor(first, dtype=torch.float64)
    return x


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_ratios_are_those_of_the_functions_rise_to_what_the_gradient_says(batch_size):
    first = [0.25] * 3 + [0.5] * 4 + [1.0] * 2 + [0.0] * 2  # factors 1, 2, 4 and 0
    found = ratios(bench(scaled, images(first), batch_size=batch_size))
    known = [1.0] * 3 + [0.5] * 4 + [0.25] * 2 + [0.0] * 2  # no gradient counts as 0
    low, median, high = np.quantile(known, (0.1, 0.5, 0.9))
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high), abs=1e-9)
    assert found.none == pytest.approx(2 / 11)


def test_only_some_images_are_tried():
    found = ratios(bench(scaled, images([0.25] * 3 + [1.0] * 8), some=3))
    assert (found.low, found.median, found.high, found.none) == pytest.approx((1, 1, 1, 0), abs=1e-9)


def test_the_images_move_by_a_quarter_of_a_level_and_stay_in_the_box():
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return scaled(x)

    x = images([0.25, 0.25])
    x[0, 0, 1, 1], x[1, 0, 1, 1] = 0.0, 1.0
    ratios(bench(model, x))
    step = 0.25 / 255
    middle, up, down = seen[-3:]
    assert torch.equal(middle, x.clamp(step, 1 - step))
    for other in (up, down):
        assert (other - middle).abs().flatten(1).amax(dim=1).tolist() == pytest.approx([step] * 2)
        assert other.min() >= 0
        assert other.max() <= 1
    assert torch.allclose(up - middle, middle - down)


def test_both_sides_have_the_draws_of_the_gradient_and_draws_differ():
    drawn: list[float] = []

    def noisy(x: Tensor) -> Tensor:
        noise = torch.rand(())
        drawn.append(float(noise))
        return scaled(x) * (1 + noise)

    found = ratios(bench(noisy, images([0.25] * 6), stochastic=True, batch_size=4))
    assert (found.low, found.median, found.high) == pytest.approx((1, 1, 1), abs=1e-6)
    # The gradient and the two sides of each of four draws and two batches.
    assert sum(count == 3 for count in Counter(drawn).values()) == 4 * 2


@pytest.mark.parametrize(
    ("median", "low", "high", "near"),
    [
        (1.0, 1.0, 1.0, True), (1.09, 1.0, 1.1, True), (0.91, 0.9, 1.0, True), (1.11, 1.0, 1.2, False),
        (0.89, 0.8, 1.0, False), (1.0, 0.76, 1.0, True), (1.0, 0.74, 1.0, False), (1.0, 1.0, 1.24, True),
        (1.0, 1.0, 1.26, False), (1.0, 0.74, 1.26, False), (1.0, 0.75, 1.25, True),
    ],
)  # fmt: skip
def test_a_true_gradient_is_near_to_one(median, low, high, near):
    assert Ratios(median, low, high, 0.0).near is near
    assert str(Ratios(median, low, high, 0.0)) == f"{median:.2f} [{low:.2f}, {high:.2f}]"
