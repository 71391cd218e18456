"""What a predictor answers, that its gradient is that of its formula, and that its memory does not grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD
from learn2perturb.errors import ConfigError, InputError, UnknownNameError
from learn2perturb.evaluation import PREDICTORS, Predictor, evaluate
from learn2perturb.evaluation.passes import are_probabilities
from learn2perturb.evaluation.predictors import probability_margins
from learn2perturb.models import build_model
from learn2perturb.noise import is_stochastic, perturb
from tests.problems import as_if_on


class Script:
    """A model whose passes are written down beforehand."""

    def __init__(self, *passes: list[list[float]]) -> None:
        self.passes = [torch.tensor(one) for one in passes]
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.passes[(self.calls - 1) % len(self.passes)]


# Two images, three passes: image 0 is voted to class 1, has the largest mean probability in 0, the largest logit in 1.
PASSES = (
    [[9.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    [[0.3, 0.4, 0.35], [0.0, 2.0, 0.0]],
    [[-30.0, 0.4, 0.35], [1.0, 0.0, 0.0]],
)
X = torch.zeros(2, 1, 1, 1)


def test_every_rule_is_its_definition():
    logits = torch.tensor(PASSES)
    single = Predictor(Script(*PASSES), "single", 3)
    assert torch.equal(single(X), logits[0])
    assert single.model.calls == 1
    torch.testing.assert_close(Predictor(Script(*PASSES), "mean_logits", 3)(X), logits.mean(0))
    mean = Predictor(Script(*PASSES), "mean_probability", 3)
    torch.testing.assert_close(mean(X), logits.softmax(2).mean(0).log())
    torch.testing.assert_close(mean(X).exp().sum(1), torch.ones(2))
    vote = Predictor(Script(*PASSES), "vote", 3)(X).exp()
    torch.testing.assert_close(vote[0], torch.tensor([1 / 3, 2 / 3, 0.0]))
    answers = {rule: int(Predictor(Script(*PASSES), rule, 3).predict(X)[0]) for rule in PREDICTORS}
    assert answers == {"single": 0, "vote": 1, "mean_probability": 0, "mean_logits": 1}


def test_a_tied_vote_goes_to_the_smallest_class():
    passes = [[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]]
    assert Predictor(Script(*passes), "vote", 2).predict(X[:1]).tolist() == [1]


@pytest.mark.parametrize("rule", ["mean_probability", "mean_logits"])
def test_the_gradient_is_that_of_the_mean_over_the_very_draws(rule):
    torch.manual_seed(0)
    network = perturb(build_model("digits_cnn", input_shape=(1, 6, 6)), input_shape=(1, 6, 6)).eval()
    x = torch.rand(3, 1, 6, 6)
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    score = Predictor(network, rule, 4)(leaf)
    (found,) = torch.autograd.grad(score.square().sum(), leaf)
    torch.manual_seed(7)
    twin = x.clone().requires_grad_()
    logits = torch.stack([network(twin) for _ in range(4)])
    expected = logits.softmax(2).mean(0).log() if rule == "mean_probability" else logits.mean(0)
    torch.testing.assert_close(score, expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), twin)
    torch.testing.assert_close(found, wanted)


class Counting(nn.Module):
    """Counts what it computes that is alive while the graph is."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        wide = (x.flatten(1).repeat(1, 1000) * torch.rand(1)).sin()
        return wide.view(len(x), 2, -1).exp().mean(2)


def saved_numbers(predictor: Predictor, x: Tensor) -> int:
    """Return how many numbers the graph of one call keeps."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        predictor(x)
    return kept


def test_memory_does_not_grow_with_the_members():
    x = torch.rand(2, 1, 2, 2, requires_grad=True)
    one, many = (saved_numbers(Predictor(Counting(), "mean_probability", members), x) for members in (1, 50))
    activations = 2 * 4 * 1000
    assert many < one + 50 * 100 < activations + one


@pytest.mark.parametrize(("rule", "gradient", "passes"), [
    ("single", True, 1), ("single", False, 1), ("vote", False, 3), ("mean_probability", False, 3),
    ("mean_probability", True, 2 * 3), ("mean_logits", True, 2 * 3),
])  # fmt: skip
def test_passes_are_repeated_only_for_the_gradient_of_a_mean(rule, gradient, passes):
    calls = []

    def model(images):
        calls.append(len(images))
        return images.flatten(1)

    x = torch.rand(2, 1, 2, 2, requires_grad=gradient)
    score = Predictor(model, rule, 3)(x)
    if gradient:
        score.sum().backward()
    assert len(calls) == passes


def test_a_vote_is_attacked_through_the_mean_probability():
    predictor = Predictor(Counting(), "vote", 5)
    with pytest.raises(InputError, match="no gradient"):
        predictor(torch.rand(1, 1, 2, 2, requires_grad=True))
    with pytest.raises(InputError, match="attackable"):
        PGD(eps=0.1, steps=1)(predictor, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    target = predictor.attackable()
    assert (target.rule, target.members) == ("mean_probability", 5)
    assert target.model is predictor.model
    mean = Predictor(Counting(), "mean_logits", 5)
    assert mean.attackable() is mean


def test_it_is_a_network_to_attacks_and_evaluation():
    torch.manual_seed(0)
    network = perturb(build_model("digits_cnn", input_shape=(1, 6, 6)), input_shape=(1, 6, 6)).train()
    predictor = Predictor(network, "mean_probability", 3)
    assert is_stochastic(predictor)
    x, y = torch.rand(4, 1, 6, 6), torch.arange(4)
    moved = PGD(eps=0.1, step_size=0.05, steps=2)(predictor, x, y)
    assert 0 < (moved - x).abs().max() <= 0.1 + 1e-6
    assert network.training
    result = evaluate(predictor, (x, y), draws=2)
    assert result.row("clean").draws == 2
    assert not result.row("clean", noise=False).stochastic


def test_evaluate_scores_with_the_same_rules():
    torch.manual_seed(0)
    network = perturb(build_model("digits_cnn", input_shape=(1, 6, 6)), input_shape=(1, 6, 6), init=3.0).eval()
    x, y = torch.rand(40, 1, 6, 6), torch.arange(40) % 10
    result = evaluate(network, (x, y), draws=1, predictor=list(PREDICTORS), members=5, noise_off=False)
    from learn2perturb.engine.random import seed_everything

    for rule in PREDICTORS:
        seed_everything(0, "score", "clean", "", 0, 0)
        expected = Predictor(network, rule, 5).predict(x)
        assert np.array_equal(result.row("clean", predictor=rule).predictions.unpack()[0], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("mean",), UnknownNameError, "known: mean_logits"),
        (("vote", 0), ConfigError, "members must be .* got 0"),
        (("vote", 2.5), ConfigError, "members must be .* got 2.5"),
    ],
)
def test_what_is_not_allowed_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Predictor(Counting(), *arguments)


def test_a_model_that_cannot_be_called_is_refused():
    with pytest.raises(ConfigError, match="must be callable"):
        Predictor(None)


def test_margins_are_of_double_precision_and_of_the_best_other_class():
    found = probability_margins(torch.tensor([[20.0, 0.0, -5.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1]))
    exact = torch.tensor([[20.0, 0.0, -5.0], [0.0, 1.0, 3.0]]).double().softmax(1)
    assert found.tolist() == pytest.approx([(exact[0, 0] - exact[0, 1]).item(), (exact[1, 1] - exact[1, 2]).item()])
    assert found[0] < 1 - 1e-9


def test_margins_are_of_single_precision_where_there_is_no_other():
    assert probability_margins(as_if_on("mps", torch.tensor([[20.0, 0.0]])), torch.tensor([0])).tolist() == [1.0]


@pytest.mark.parametrize(("logits", "found"), [
    ([[0.0, 1.0]], True), ([[0.25, 0.75], [0.5, 0.5]], True), ([[0.5, 0.5009]], True), ([[0.5, 0.4991]], True),
    ([[0.5, 0.5015]], False), ([[0.5, 0.4985]], False), ([[-1e-6, 1.0]], False), ([[0.5, 0.5], [2.0, -1.0]], False),
    ([[0.5, 0.5], [2.0, 1.0]], False),
])  # fmt: skip
def test_probabilities_are_known_by_their_sum(logits, found):
    assert are_probabilities(torch.tensor(logits)) is found
