"""The input gradient and its average over draws."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from learn2perturb.attacks.gradients import AVERAGES, input_gradient, value_and_gradient, values_of
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.errors import InputError
from tests.problems import NoisyLinear

SHAPE = (2, 3, 3)
averages = pytest.mark.parametrize("average", AVERAGES)


class Cycle(torch.nn.Module):
    """Its k-th draw is one of K fixed random networks in turn, so two passes of K draws see the same set."""

    def __init__(self, draws: int) -> None:
        super().__init__()
        self.networks = [torch.randn(18, 4, dtype=torch.float64) for _ in range(draws)]
        self.calls = 0

    def forward(self, x):
        network = self.networks[self.calls % len(self.networks)]
        self.calls += 1
        return torch.tanh(x.flatten(1)) @ network


@averages
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_gradient_of_the_loss_of_the_mean(average, loss):
    model, y = Cycle(5), torch.tensor([0, 1, 2])
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    found = input_gradient(model, LOSSES[loss], x, y, eot=5, average=average)
    leaf = x.clone().requires_grad_()
    draws = [model(leaf) for _ in range(5)]
    if average == "loss":
        total = sum(LOSSES[loss](z, y).sum() for z in draws) / 5
    elif average == "logits":
        total = LOSSES[loss](sum(draws) / 5, y).sum()
    else:
        total = LOSSES[loss]((sum(z.softmax(dim=1) for z in draws) / 5).log(), y).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, leaf)[0])


@averages
@pytest.mark.parametrize("count", [1, 2, 3])
def test_values_are_means_over_any_number_of_draws(count, average):
    draws, y = list(torch.randn(count, 5, 4, dtype=torch.float64)), torch.tensor([0, 1, 2, 3, 0])
    found, ce = values_of(draws, LOSSES["ce"], y, average), torch.nn.functional.cross_entropy
    mean = sum(draws) / count if average != "probability" else (sum(z.softmax(1) for z in draws) / count).log()
    each = draws if average == "loss" else [mean]
    others = [z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0] for z in each]
    torch.testing.assert_close(found.logits.log_softmax(1), mean.log_softmax(1))
    torch.testing.assert_close(found.loss, sum(ce(z, y, reduction="none") for z in each) / len(each))
    torch.testing.assert_close(found.margin, sum(others) / len(each))


@pytest.mark.parametrize("average", ["loss", "logits"])
@pytest.mark.parametrize("shared", [False, True], ids=["noise per image", "noise shared by the batch"])
def test_variance_falls_as_one_over_k(average, shared):
    model = NoisyLinear(SHAPE, shared=shared)
    x = torch.rand(1, *SHAPE).expand(1 if shared else 256, -1, -1, -1)
    y = torch.zeros(len(x), dtype=torch.int64)
    # For "probability" this holds in the limit only (its weights depend on the first K draws); tested exactly above.
    counts, errors = [1, 4, 16], []
    for eot in counts:
        repeats = [
            input_gradient(model, LOSSES["margin"], x, y, eot=eot, average=average) - model.expected_gradient(x)
            for _ in range(250 if shared else 4)
        ]
        errors.append(torch.cat(repeats).square().mean().item())
    slope = _slope([math.log(k) for k in counts], [math.log(error) for error in errors])
    assert slope == pytest.approx(-1, abs=0.1)


def _slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


@averages
def test_every_pass_draws_afresh_and_no_row_is_replicated(average):
    model = NoisyLinear(SHAPE, shared=True)
    x = torch.rand(3, *SHAPE)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    input_gradient(model, LOSSES["ce"], x, torch.zeros(3, dtype=torch.int64), eot=6, average=average)
    assert sizes == [3] * (6 if average == "loss" else 12)
    assert len({draw.numpy().tobytes() for draw in model.draws}) == len(sizes)


@averages
@pytest.mark.parametrize("loss", LOSSES)
def test_values_come_from_the_very_draws_of_the_gradient(average, loss):
    model, y = Cycle(5), torch.tensor([0, 1, 2])
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    values, gradient = value_and_gradient(model, LOSSES[loss], x, y, eot=5, average=average)
    assert model.calls == (5 if average == "loss" else 10)
    torch.testing.assert_close(gradient, input_gradient(model, LOSSES[loss], x, y, eot=5, average=average))
    draws = torch.stack([model(x) for _ in range(5)])
    mean = draws.softmax(dim=2).mean(dim=0).log() if average == "probability" else draws.mean(dim=0)
    torch.testing.assert_close(values.logits, mean)
    for name, found in ((loss, values.loss), ("margin", values.margin)):
        each = torch.stack([LOSSES[name](z, y) for z in draws]).mean(dim=0)
        torch.testing.assert_close(found, each if average == "loss" else LOSSES[name](mean, y))
    assert not values.loss.requires_grad


@averages
@pytest.mark.parametrize("function", [input_gradient, value_and_gradient])
def test_memory_is_flat_in_the_number_of_draws(function, average):
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    at_start = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    model = NoisyLinear(SHAPE)
    model.register_forward_pre_hook(lambda *_: at_start.append(len(alive)))
    x, y = torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        kept = function(model, LOSSES["ce"], x, y, eot=8, average=average)
        model(x.requires_grad_())
    assert set(at_start) == {0}
    assert kept is not None
    assert len(at_start) >= 9


def test_a_probability_that_underflows_still_has_a_gradient():
    def model(x):
        z = x.flatten(1).sum(dim=1)
        return torch.stack([z, -z], dim=1) * 1000

    x, y = torch.full((1, 1, 2, 2), 0.9), torch.ones(1, dtype=torch.int64)
    gradient = input_gradient(model, LOSSES["ce"], x, y, eot=2, average="probability")
    torch.testing.assert_close(gradient, torch.full_like(x, 2000.0))


@pytest.mark.parametrize(
    "model",
    [
        lambda x: torch.zeros(len(x), 3),
        lambda x: x.detach().flatten(1),
        lambda x: torch.zeros(len(x), 3, requires_grad=True) * 2,
    ],
    ids=["constant", "detached", "depends on another leaf"],
)
def test_logits_without_a_gradient_are_named(model):
    with pytest.raises(InputError, match="no gradient with respect to x"):
        input_gradient(model, LOSSES["ce"], torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
