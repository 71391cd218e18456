"""A function of arrays: what it is asked, how fast, and what its answers become."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation import arrays, values
from learn2perturb.evaluation.arrays import black_box, tell_queries
from learn2perturb.evaluation.values import Reading, no_gradient


def images(n):
    return torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 1, 2, 3) / 100


def scores(x):
    return np.stack([x[:, 0, 0, 0], 5 - x[:, 0, 0, 0]], axis=1)


@pytest.mark.parametrize(("n", "batch_size", "rate", "asked"), [
    (6, None, None, [6]), (6, 4, None, [4, 4]), (6, 3, None, [3, 3]), (6, None, 2.5, [2, 2, 2]),
    (3, None, 0.4, [1] * 3), (6, 2, 4.0, [2, 2, 2]), (5, 10, None, [10]),
])  # fmt: skip
def test_images_are_asked_about_in_batches_that_are_filled_with_the_last(n, batch_size, rate, asked, monkeypatch):
    seen = []
    monkeypatch.setattr(arrays.time, "sleep", lambda seconds: None)
    model = black_box(lambda x: (seen.append(x), scores(x))[1], batch_size=batch_size, queries_per_second=rate)
    found = model(images(n))
    assert [len(x) for x in seen] == asked and model.queries == sum(asked)
    flat = np.concatenate([x[:, 0, 0, 0] for x in seen])
    assert flat[:n] == pytest.approx(np.arange(n) / 100) and set(flat[n:]) <= {flat[n - 1]}
    torch.testing.assert_close(found, torch.from_numpy(scores(images(n).numpy())))


def test_channels_are_last_where_the_function_wants_them_so_and_arrays_are_its_own():
    shapes = []

    def greedy(x):
        shapes.append(x.shape)
        x[:] = 0
        return np.array([[1.0, 2.0]] * len(x))

    x = torch.rand(2, 3, 4, 5)
    before = x.clone()
    black_box(greedy, channels_last=True)(x), black_box(greedy)(x)
    assert shapes == [(2, 4, 5, 3), (2, 3, 4, 5)] and torch.equal(x, before)


def test_queries_wait_until_those_before_them_have_had_their_time(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(arrays.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        arrays.time, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds))
    )
    model = black_box(scores, queries_per_second=2.0)
    model(images(4))  # two in each second: the first two at once
    assert slept == pytest.approx([1.0]) and now[0] == pytest.approx(101.0)
    now[0] = 101.25
    model(images(1))
    assert slept == pytest.approx([1.0, 0.75])
    now[0] = 200.0
    model(images(2))  # what was not asked for is not saved up
    model(images(2))
    assert slept == pytest.approx([1.0, 0.75, 1.0])


@pytest.mark.parametrize(("said", "shown"), [("first\nsecond", "first"), ("x" * 250, "x" * 200), ("", "")])
def test_a_failure_of_the_function_is_told_by_its_first_line(said, shown):
    def failing(x):
        raise ValueError(said)

    with pytest.raises(InputError, match=f"after 3 queries: ValueError: {shown}; retries"):
        black_box(failing)(images(3))
    assert values._line(ValueError(said)) == (shown or "ValueError")


@pytest.mark.parametrize(
    ("answer", "classes", "said"),
    [
        (np.zeros(()), None, "must return logits"), (np.zeros((2, 2)), None, "must return logits"),
        (np.zeros((3, 2, 2)), None, "must return logits"), (np.zeros((3, 0)), None, "must return logits"),
        (np.zeros(3), 2, "one float an image"), (np.zeros((3, 1)), 2, "one float an image"),
        (np.zeros((3, 2)), 3, "returned 2 classes, and num_classes is 3"),
        (np.full((3, 2), np.nan), None, "NaN or inf"), (np.array([[1, np.inf]] * 3), None, "NaN or inf"),
        (np.array([0, 1, 2]), 2, "labels from 0 to 2, allowed are 0 to 1; give num_classes=3$"),
        (np.array([-1, 1, 0]), 2, "labels from -1 to 1, allowed are 0 to 1; give num_classes=2, and labels from 0"),
        (np.array([0, 1, 1]), None, "number of classes cannot be told"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none(answer, classes, said):
    with pytest.raises(InputError, match=said):
        black_box(lambda x: answer, num_classes=classes)(images(3))


@pytest.mark.parametrize(("answer", "expected"), [
    (np.array([0, 1, 1]), [[1, 0], [0, 1], [0, 1]]),
    (np.array([[0], [1], [1]], dtype=np.uint8), [[1, 0], [0, 1], [0, 1]]),
    (np.array([False, True, True]), [[1, 0], [0, 1], [0, 1]]), (np.array([[3, -4]] * 3), [[3, -4]] * 3),
    (np.array([[3, -math.inf]] * 3), [[3, -math.inf]] * 3), (np.array([[3, -4]] * 3, dtype=np.float16), [[3, -4]] * 3),
])  # fmt: skip
def test_what_answers_become(answer, expected):
    found = black_box(lambda x: answer, num_classes=2)(images(3))
    assert found.dtype == torch.float32 or answer.dtype == np.float64
    assert found.double().tolist() == expected


def test_rows_of_different_widths_are_refused():
    widths = iter([2, 3])
    with pytest.raises(InputError, match=r"rows of .*2.*3.*one shape"):
        black_box(lambda x: 3 * np.ones((1, next(widths))), batch_size=1)(images(2))


PROBABILITIES = torch.tensor([[0.25, 0.75]] * 4)


@pytest.mark.parametrize(("rows", "decides"), [(3, False), (4, True)])
def test_four_rows_decide_whether_answers_are_probabilities(rows, decides):
    reading = Reading(None)
    first = PROBABILITIES[:rows]
    torch.testing.assert_close(reading.logits(first), first.log())
    if decides:
        with pytest.raises(InputError, match="returned probabilities before"):
            reading.logits(torch.tensor([[2.0, 3.0]]))
    else:
        assert reading.logits(torch.tensor([[2.0, 3.0]])).tolist() == [[2.0, 3.0]]


def test_scores_stay_scores_where_later_rows_sum_to_one():
    reading = Reading(None)
    reading.logits(3 * PROBABILITIES)
    assert torch.equal(reading.logits(PROBABILITIES), PROBABILITIES)


def test_a_probability_of_nothing_has_a_finite_logarithm():
    found = Reading(None).logits(torch.tensor([[0.0, 1.0]] * 4))
    assert found[0].tolist() == pytest.approx([math.log(1e-12), 0.0])


@pytest.mark.parametrize(
    "answer", [torch.zeros(3, 1), torch.zeros(0, 3), torch.zeros(2, 2, 2), torch.tensor([1.0, 2.0])]
)
def test_answers_of_another_shape_are_left_to_whoever_checks_logits(answer):
    assert torch.equal(Reading(3).logits(answer), answer)
    assert Reading(3).logits(torch.tensor([[1, 2, 3]])).tolist() == [[1.0, 2.0, 3.0]]
    assert Reading(3).logits(torch.tensor([0, 2], dtype=torch.int16)).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(("settings", "good"), [
    ({"num_classes": 2}, True), ({"num_classes": 1}, False), ({"num_classes": 2.0}, False), ({"batch_size": 1}, True),
    ({"batch_size": 0}, False), ({"queries_per_second": 0.01}, True), ({"queries_per_second": 3}, True),
    ({"queries_per_second": 0}, False), ({"queries_per_second": math.inf}, False),
    ({"queries_per_second": True}, False),
    ({"queries_per_second": "3"}, False), ({"queries_per_second": -1.0}, False), ({"channels_last": 1}, False),
])  # fmt: skip
def test_settings_at_their_bounds(settings, good):
    if good:
        assert black_box(scores, **settings).queries == 0
    else:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            black_box(scores, **settings)


class Counting(torch.nn.Module):
    """Counts its passes in one buffer, and has another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(2))

    def forward(self, x):
        self.passes += 1
        return x.flatten(1)[:, :2] * self.fixed


def test_asking_for_a_gradient_leaves_buffers_as_they_were():
    model = Counting()
    assert no_gradient(model, torch.rand(3, 1, 2, 2)) == ""
    assert (model.passes.item(), model.fixed.tolist()) == (0, [1, 1])


def test_queries_are_said_before_the_first_in_two_digits():
    told: list[tuple[float, float, str]] = []
    tell_queries(lambda *one: told.append(one), None, 12345.0)
    model = black_box(lambda images: images, queries_per_second=100)
    tell_queries(lambda *one: told.append(one), model, 12345.0)
    assert told[0] == (0, 12345.0, "up to about 12,000 queries of the model")
    assert told[1][2].startswith(f"{told[0][2]}, ") and told[1][2].endswith(" at 100 a second")
