"""Why a model has no gradient, in all its ways, and how its values become logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from learn2perturb.errors import InputError
from learn2perturb.evaluation.values import NO_GRADIENT, Reading, ValuesOnly, no_gradient

X = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))


class OfWeights(nn.Module):
    """Its answers have a gradient, yet of its weights alone: images are rounded to labels of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1).detach())


class Counting(nn.Module):
    """Counts its passes in a buffer, in whichever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("same", torch.full((), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x.flatten(1)


def fails(x: Tensor) -> Tensor:
    if x.requires_grad:
        raise ValueError("Can't call numpy()\non a tensor that requires grad")
    return x.flatten(1)


def fails_always(x: Tensor) -> Tensor:
    raise ValueError("whatever is asked")


class Sharp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        raise RuntimeError("a" * 300)


@pytest.mark.parametrize(("model", "reason"), [
    (lambda x: x.flatten(1), ""), (lambda x: 0 * x.flatten(1), ""), (lambda x: "text", ""), (fails_always, ""),
    (lambda x: x.detach().flatten(1), NO_GRADIENT), (OfWeights(), NO_GRADIENT),
    (fails, "a pass with gradients fails: Can't call numpy()"),
    (lambda x: Sharp.apply(x).flatten(1), "its gradient cannot be computed: " + "a" * 200),
])  # fmt: skip
def test_why_there_is_no_gradient(model, reason):
    with torch.no_grad():
        assert no_gradient(model, X) == reason


def test_to_ask_changes_no_buffer_and_no_draw():
    model = Counting()
    state = torch.get_rng_state()
    assert no_gradient(model, X) == ""
    assert model.passes.item() == 0 and model.same.isnan()
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_are_decided_by_four_rows_and_once():
    row, reading = torch.tensor([[0.25, 0.75]]), Reading(None)
    torch.testing.assert_close(reading.logits(row), row.log())  # it may be: as the row itself says
    scores = torch.tensor([[1.0, 2.0]])
    assert torch.equal(reading.logits(scores.repeat(3, 1)), scores.repeat(3, 1))  # still open
    torch.testing.assert_close(reading.logits(row.repeat(4, 1)), row.repeat(4, 1).log())
    with pytest.raises(InputError, match="probabilities before, and now rows that are none"):
        reading.logits(scores)
    other = Reading(None)
    assert torch.equal(other.logits(scores.repeat(4, 1)), scores.repeat(4, 1))
    assert torch.equal(other.logits(row), row)  # scores that sum to 1 by chance


def test_a_probability_of_zero_is_a_number():
    assert Reading(None).logits(torch.tensor([[0.0, 1.0]])).tolist() == [[pytest.approx(-27.631, abs=1e-3), 0.0]]


@pytest.mark.parametrize(("answer", "expected"), [
    (torch.tensor([2, 0]), [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
    (torch.tensor([[3, 4], [5, 6]]), [[3.0, 4.0], [5.0, 6.0]]),
    (torch.tensor([0.25, 0.75]), [0.25, 0.75]),  # of no shape of logits: returned for whoever checks it
    (torch.tensor([[1.0], [1.0]]), [[1.0], [1.0]]),
    (torch.zeros(0, 3), []),
])  # fmt: skip
def test_answers_become_logits_or_are_left_to_whoever_checks(answer, expected):
    assert Reading(3).logits(answer).tolist() == expected


@pytest.mark.parametrize(("labels", "classes", "reason"), [
    ([0, 3], 3, r"labels from 0 to 3, allowed are 0 to 2; give num_classes=4$"),
    ([-1, 2], 3, r"labels from -1 to 2, allowed are 0 to 2; give num_classes=3, and labels from 0$"),
    ([0, 1], None, "the number of classes cannot be told"),
])  # fmt: skip
def test_labels_beyond_the_classes_are_refused(labels, classes, reason):
    with pytest.raises(InputError, match=reason):
        Reading(classes).logits(torch.tensor(labels))


def test_values_are_asked_without_gradients_and_what_is_no_tensor_is_passed_on():
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), x.requires_grad, x.data_ptr()))
        return torch.tensor([1, 0, 1])

    x = X.clone().requires_grad_()
    values = ValuesOnly(model, 2)
    assert values(x).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert [one[:2] for one in seen] == [(False, False)] and seen[0][2] != x.data_ptr()
    assert values.training is False
    assert ValuesOnly(lambda x: "text", None)(x) == "text"
