"""Carlini-Wagner: the least norm on problems where it is known, and what counts on a stochastic model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from learn2perturb import evaluate
from learn2perturb.attacks import CW, FGSM
from learn2perturb.engine import execution
from learn2perturb.errors import ConfigError
from tests.problems import Linear, Quadratic, two_logits

SHAPE = (3, 4, 4)
FAST = {"lr": 0.01, "steps": 120, "search_steps": 8, "initial_c": 0.05}
SHORT = {"lr": 0.02, "steps": 40, "search_steps": 3, "initial_c": 0.1}


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64)


def images(count: int = 4) -> Tensor:
    return 0.35 + 0.3 * torch.rand(count, *SHAPE)


def linear(x: Tensor) -> Linear:
    """Return a linear problem on which no image is misclassified."""
    model = Linear(SHAPE)
    with torch.no_grad():
        model.bias -= model(x)[:, 1].max() + 0.3
    return model


class NoisyBoundary(nn.Module):
    """The linear problem with noise on its one logit."""

    def __init__(self, inner: Linear, sigma: float) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma

    def forward(self, x: Tensor) -> Tensor:
        return two_logits(self.inner(x)[:, 1] + self.sigma * torch.randn(len(x)))


class Around(nn.Module):
    """The class changes on a sphere around the centre."""

    def __init__(self, centre: Tensor, radius: float) -> None:
        super().__init__()
        self.distance, self.radius = Quadratic(centre), radius

    def forward(self, x: Tensor) -> Tensor:
        return two_logits(self.distance(x)[:, 1] + self.radius**2)


@pytest.mark.parametrize("abort_early", [True, False])
@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_least_norm_on_a_linear_problem(confidence, abort_early):
    x = images()
    model = linear(x)
    result = CW(confidence=confidence, abort_early=abort_early, **FAST).run(model, x, zeros(x))
    optimum = ((confidence - model(x)[:, 1]) / model.weight.norm()).detach()
    assert result.success.all()
    ratio = result.l2 / optimum
    assert ratio.max() <= 1.05
    assert ratio.min() >= 1 - 1e-4
    assert (model(result.x_adv)[:, 1] > confidence).all()
    assert torch.equal(result.norms, result.l2)


def test_least_norm_on_a_quadratic_problem():
    x = images()
    result = CW(**FAST).run(Around(torch.full((1, *SHAPE), 0.5), 0.2), x, zeros(x))
    optimum = (x - 0.5).flatten(1).norm(dim=1) - 0.2
    assert result.success.all()
    assert (result.l2 / optimum).max() <= 1.05


def test_targeted_reaches_the_target_with_the_least_norm():
    weights = torch.eye(3, 48) * 2 - 1
    x, target = images(), torch.tensor([1, 2, 1, 2])

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T + torch.tensor([5.0, 0.0, 0.0]) * 0.05

    result = CW(targeted=True, **FAST).run(model, x, target)
    assert torch.equal(model(result.x_adv).argmax(dim=1), target)
    assert result.l2.max() < 1


def test_images_that_are_wrong_stay_as_they_are_and_cost_nothing():
    x = images()
    model = linear(x)
    model.bias.data += 10
    result = CW(**FAST).run(model, x, zeros(x))
    assert torch.equal(result.x_adv, x)
    assert result.backward_passes == 0
    assert result.success.all()


def test_images_that_are_wrong_on_a_stochastic_model_stay_as_they_are():
    x = images()
    model = linear(x)
    model.bias.data += 10
    assert torch.equal(CW(**SHORT)(NoisyBoundary(model, sigma=0.1), x, zeros(x)), x)


def test_early_abort_saves_passes_and_not_norm():
    x = images()
    model = linear(x)
    long, short = (CW(abort_early=abort, **FAST).run(model, x, zeros(x)) for abort in (False, True))
    assert short.backward_passes < 0.9 * long.backward_passes
    assert (short.l2 <= 1.02 * long.l2).all()


def test_each_image_has_its_own_constant():
    """An image attacked in company gets what it gets alone: nothing of the search is shared."""
    x = images()
    model = linear(x)
    together = CW(**SHORT)(model, x, zeros(x))
    alone = torch.cat([CW(**SHORT)(model, one, zeros(one)) for one in x.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("steps", "search_steps"), [(40, 4), (39, 4), (12, 8)])
def test_what_one_draw_let_pass_is_not_kept_on_a_stochastic_model(steps, search_steps):
    """With less than forty steps nothing was judged by fresh draws, whatever was to be kept."""
    x = images()
    model = NoisyBoundary(linear(x), sigma=0.3)
    budget = {"lr": 0.8 / steps, "steps": steps, "search_steps": search_steps, "initial_c": 0.1, "seed": 0}
    single, mean = (CW(keep=keep, **budget).run(model, x, zeros(x)) for keep in ("single", "mean"))
    margins = [model.inner(result.x_adv)[:, 1].detach() for result in (single, mean)]
    # The nearest of hundreds of points that one draw let pass is one whose draw was rare.
    assert margins[0].mean() < -0.3
    assert margins[1].mean() > -0.1
    assert (margins[1] > margins[0]).all()
    # Noise ends no search step early.
    assert mean.backward_passes == budget["steps"] * budget["search_steps"]


def test_finite_eps_is_success_inside_the_ball():
    x = images()
    model = linear(x)
    norms = CW(**SHORT).run(model, x, zeros(x)).l2
    eps = norms.sort().values[1:3].mean().item()
    result = CW(eps=eps, **SHORT).run(model, x, zeros(x))
    assert result.l2.max() <= eps + 1e-6
    assert torch.equal(result.success, norms < eps)


def test_low_precision_is_confirmed_in_full():
    x = images()
    model = linear(x)

    def optimistic(x: Tensor) -> Tensor:
        return model(x) + 0.02 * torch.is_autocast_enabled("cpu") * torch.tensor([0.0, 1.0])

    with execution.running(execution.ExecutionMode("half", dtype=torch.bfloat16)):
        result = CW(**SHORT).run(optimistic, x, zeros(x))
    moved = result.l2 > 0
    assert moved.any()
    assert (model(result.x_adv)[moved][:, 1] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "linf"}, "norm is 'linf'; allowed: l2"),
        ({"loss": "ce"}, "loss is 'ce'; allowed: margin"),
        ({"confidence": -1}, "confidence must be a number of at least 0, in logits, got -1"),
        ({"confidence": "1"}, "confidence must be a number"),
        ({"keep": "best"}, "keep is 'best'; allowed: mean, single"),
        ({"largest_c": 1e-6}, "largest_c=1e-06 is below initial_c=0.001; raise it"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"lr": 0}, "lr must be finite and more than 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        CW(**settings)


def test_the_constant_grows_tenfold_until_it_is_enough():
    x = images()
    model = linear(x)
    # Enough is 2 gap / |w|^2, at least 0.01 here: three times tenfold from 1e-4 reach it, three times twofold do not.
    result = CW(lr=0.01, steps=150, search_steps=4, initial_c=3e-4).run(model, x, zeros(x))
    assert result.success.all()


class Wavering(nn.Module):
    """``z = slope * sum(x - start) + 0.1``, and 1.1 more or less in turn: right on average, not beyond doubt."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.start, self.calls = start, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rise = (x - self.start).flatten(1).sum(dim=1)
        return two_logits(rise + 0.1 + (1.1 if self.calls % 2 else -1.1))


def test_a_mean_margin_within_its_standard_error_is_no_success():
    x = images(2)
    result = CW(lr=0.02, steps=40, search_steps=2, initial_c=1.0, draws=20).run(Wavering(x), x, zeros(x))
    # The mean margin at x is 0.1 and its standard error 1.1 / sqrt(20) = 0.25: x itself does not count as wrong.
    margin = (result.x_adv - x).flatten(1).sum(dim=1) + 0.1
    assert (margin > 0.24).all()


@pytest.mark.parametrize("noisy", [False, True])
def test_what_had_not_converged_is_counted(noisy):
    x = images(6)
    model = linear(x)
    model = NoisyBoundary(model, 1e-3) if noisy else model
    tiny = CW(lr=1e-6, steps=20, search_steps=2, draws=4).run(model, x, zeros(x))
    assert (tiny.success_rate, tiny.c_rising) == (0, 6)
    assert (tiny.loss_falling is None) == noisy
    with torch.no_grad():
        wrong = model(x).argmin(dim=1)  # wrong already: nothing is searched
    assert CW(lr=1e-6, steps=20, search_steps=2, draws=4).run(model, x, wrong).c_rising == 0


def test_what_is_still_on_its_way_down_when_the_steps_end_is_counted():
    """A constant that is large enough, and steps that are too few."""
    x = images(12)
    slow = CW(lr=2e-3, steps=20, search_steps=1, initial_c=1e3).run(linear(x), x, zeros(x))
    left = 12 - int(slow.success.sum())  # of the others a step of the search has found the boundary
    assert 0 < left <= slow.loss_falling
    assert slow.c_rising == left


def test_nothing_is_counted_where_the_search_has_converged():
    x = images(6)
    done = CW(**FAST | {"steps": 400}).run(linear(x), x, zeros(x))
    assert (done.success_rate, done.c_rising, done.loss_falling) == (1, 0, 0)


def test_the_counts_of_all_batches_are_in_the_row():
    x = images(6)
    data = (x, zeros(x))
    attacks = {"cw": CW(lr=1e-6, steps=20, search_steps=2), "fgsm": FGSM()}
    result = evaluate(linear(x), data, attacks, batch_size=4, progress=False)
    assert (result.row("cw").c_rising, result.row("cw").n) == (6, 6)
    assert result.row("cw").loss_falling is not None
    assert result.row("fgsm").c_rising is None


@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_an_objective_that_stands_still_does_not_fall_however_small_it_is(c):
    x = torch.full((2, 1, 2, 2), 0.5)
    flat = lambda images: torch.tensor([[1.0, 0.0]]) + 0 * images.flatten(1)[:, :2]  # noqa: E731
    result = CW(steps=20, search_steps=1, initial_c=c, abort_early=False).run(flat, x, torch.zeros(2).long())
    assert result.loss_falling == 0 and result.c_rising == 2 and torch.equal(result.x_adv, x)
