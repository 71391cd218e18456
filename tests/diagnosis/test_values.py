"""Models without gradients, and functions of arrays: diagnosed from values, asked as they are said to bear."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.attacks import PGD, Square
from learn2perturb.diagnosis import QUICK, diagnose
from learn2perturb.diagnosis.blackbox import SURROGATE
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation import arrays
from learn2perturb.evaluation.values import no_gradient

N, EPS = 24, 0.2
BUDGET = dataclasses.replace(
    QUICK, name="few", images=N, some=12, scorings=2, eot=1, sweep_eot=1, steps=2, unbounded_steps=3, samples=4,
    judge_draws=2, eps_grid=(EPS,), draw_curve=(1, 4), step_curve=(2, 4), restarts=2, square_queries=5, square_draws=2,
    slope_images=2, slope_repeats=12, real_queries=60, descent_steps=5, descent_directions=4, surrogate_queries=24,
)  # fmt: skip


def network() -> nn.Module:
    with isolated_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


NETWORK = network()
X = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    Y = NETWORK(X).argmax(dim=1)
    for _label in range(3):  # each class is there, whatever the network says
        Y[_label] = _label


def scored(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return NETWORK(torch.from_numpy(images)).numpy()


@contextlib.contextmanager
def old():
    """torch.jit is deprecated, and still what people ship."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def scripted(module: nn.Module) -> nn.Module:
    with old():
        return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    with old():
        return torch.jit.trace(module, X[:2])


def frozen(module: nn.Module) -> nn.Module:
    with old():
        return torch.jit.freeze(torch.jit.script(module))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no derivative of this")


class Quiet(nn.Module):
    """A module that asks its network without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.network = NETWORK

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x)


BLIND = {
    "numpy inside": lambda x: torch.from_numpy(scored(x.numpy())),
    "numpy inside, detached": lambda x: torch.from_numpy(scored(x.detach().numpy())),
    "no_grad": Quiet().eval(),
    "scripted no_grad": scripted(Quiet().eval()),
    "detached": lambda x: NETWORK(x).detach(),
    "no derivative": lambda x: NETWORK(NoBackward.apply(x)),
    "one-hot integers": lambda x: nn.functional.one_hot(NETWORK(x).argmax(dim=1), 3),
    "labels": lambda x: NETWORK(x).argmax(dim=1),
    "small labels": lambda x: NETWORK(x).argmax(dim=1).to(torch.uint8),
    "probabilities": lambda x: NETWORK(x).detach().softmax(dim=1),
    "array": l2p.black_box(scored),
    "array of labels": l2p.black_box(lambda images: scored(images).argmax(axis=1), num_classes=3),
}


@pytest.mark.parametrize("kind", list(BLIND))
def test_a_model_without_gradients_is_diagnosed_from_values(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(BLIND[kind], (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    statuses = {check.number: check.status for check in found.checks}
    assert {number for number, status in statuses.items() if status == "does not apply"} == {1, 5, 6, 7, 8, 9, 10}
    assert statuses[2] == "passed"
    second = found.check(2)
    assert "the model has no gradients" in second.sentence.lower()
    best = second.evidence.pop("best")
    assert f"leaves {100 * min(second.evidence.values()):.1f} %" in second.sentence
    assert f"the best of all for each image {100 * best:.1f} %" in second.sentence
    assert found.measurement("clean").accuracy > 0.8  # its answers are read rightly
    named = {"reported", "square", "best without gradients", f"transfer from {SURROGATE}"}
    assert named <= {one.name for one in found.measurements}
    assert found.measurement(found.lowest).accuracy == min(found.measurement(name).accuracy for name in named)
    assert found.measurement("reported").backward_passes == 0
    assert 0 < found.measurement("reported").forward_passes <= 8 + 6 * (1 + 2 * 4)
    assert found.measurement("reported").attack == "SPSA"
    assert f"transfer from {SURROGATE}" in {one.name for one in found.measurements}
    assert found.metadata["attack"] == "descent on values"
    assert found.budget["square_queries"] == 60


def test_attacks_from_values_find_what_there_is():
    white = PGD(EPS, EPS / 4, 20)(NETWORK, X, Y)
    left = float((NETWORK(white).argmax(dim=1) == Y).float().mean())
    found = diagnose(BLIND["array"], (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert left < 0.4
    assert found.measurement(found.lowest).accuracy < left + 0.25
    assert found.check(3).evidence["accuracy"] == 0


def test_attacks_from_values_that_find_nothing_show_nothing():
    """An answer that no pixel decides: with the whole box to move in, nothing is found."""
    always = lambda x: torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(x), 1)  # noqa: E731
    found = diagnose(always, (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert found.check(3).status == "not shown"
    assert "find too little" in found.check(3).sentence


SHIPPED = {
    "scripted": lambda: scripted(network()),
    "traced": lambda: traced(network()),
    "frozen": lambda: frozen(network()),
    "exported": lambda: torch.export.export(
        network(), (X[:4],), dynamic_shapes=({0: torch.export.Dim("images", min=1, max=1024)},)
    ).module(),
}


@pytest.mark.parametrize("kind", list(SHIPPED))
def test_a_shipped_model_keeps_its_gradients(kind):
    model = SHIPPED[kind]()
    assert no_gradient(model, X[:1]) == ""
    found = diagnose(model, (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert found.check(10).evidence["median"] == pytest.approx(1, abs=0.01)
    own = diagnose(NETWORK, (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert [check.status for check in found.checks] == [check.status for check in own.checks]
    assert found.measurement("reported").accuracy == own.measurement("reported").accuracy


def noisy_array(images: np.ndarray) -> np.ndarray:
    return scored(images + np.random.normal(0, 0.1, images.shape).astype(np.float32))


def test_the_draws_of_an_array_are_judged_by_its_answers():
    found = diagnose(l2p.black_box(noisy_array), (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False)
    assert found.stochastic
    assert found.check(9).status == "passed", found.check(9).sentence
    assert found.check(9).evidence["slope of logits"] == pytest.approx(-1, abs=0.3)
    assert found.check(6).status == "does not apply"


def test_a_source_without_gradients_is_attacked_from_values():
    found = diagnose(
        NETWORK, (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=False, sources={"other": BLIND["labels"]}
    )
    assert found.measurement("transfer from other").backward_passes == 0


def test_a_black_box_is_evaluated():
    result = l2p.evaluate(BLIND["array"], (X, Y), {"square": Square(EPS, queries=50)}, progress=False)
    own = l2p.evaluate(NETWORK, (X, Y), {"square": Square(EPS, queries=50)}, progress=False)
    assert result.row("clean").accuracy == own.row("clean").accuracy
    assert result.row("square").accuracy == own.row("square").accuracy < result.row("clean").accuracy
    with pytest.raises(InputError, match="needs no gradient"):
        l2p.evaluate(BLIND["array"], (X, Y), {"pgd": PGD(EPS)}, progress=False)


@pytest.mark.parametrize(
    ("answer", "classes", "fix"),
    [
        (lambda x: np.zeros(len(x)), None, "one float an image"),
        (lambda x: np.zeros((len(x), 1)), None, "one float an image"),
        (lambda x: np.zeros((len(x), 3, 1)), None, "got an array"),
        (lambda x: np.zeros((len(x) + 1, 3)), None, "got an array"),
        (lambda x: np.zeros((3, len(x))), None, "got an array"),
        (lambda x: np.full((len(x), 3), np.nan), None, "NaN"),
        (lambda x: np.full((len(x), 3), np.inf), None, "NaN or inf"),
        (lambda x: np.zeros(len(x), dtype=int), None, "num_classes=10"),
        (lambda x: np.full(len(x), 3), 3, "0 to 2"),
        (lambda x: np.full(len(x), -1), 3, "labels from 0"),
        (lambda x: np.zeros((len(x), 4)), 3, "returned 4 classes, and num_classes is 3"),
        (lambda x: ["cat"] * len(x), None, "array of numbers"),
        (lambda x: [[1, 2], [3]] * len(x), None, "array of numbers"),
        (lambda x: None, None, "array of numbers"),
        (lambda x: 1 / 0, None, "ZeroDivisionError: division by zero; retries"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, classes, fix):
    with pytest.raises(InputError, match=fix):
        l2p.black_box(answer, num_classes=classes)(X)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"function": 3}, "must be callable"),
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 2.0}, "whole number"),
        ({"queries_per_second": 0}, "above 0"),
        ({"queries_per_second": float("inf")}, "above 0"),
        ({"queries_per_second": True}, "above 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"channels_last": "yes"}, "True or False"),
    ],
)
def test_a_black_box_that_cannot_be_is_refused(settings, fix):
    with pytest.raises(ConfigError, match=fix):
        l2p.black_box(**{"function": scored, **settings})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda x: scored(x), lambda z: z),
        (lambda x: scored(x).astype(np.float64), lambda z: z),
        (lambda x: scored(x).astype(np.float16), lambda z: z),
        (lambda x: scored(x).tolist(), lambda z: z),
        (lambda x: torch.from_numpy(scored(x)), lambda z: z),
        (lambda x: torch.from_numpy(scored(x)).softmax(1).numpy(), lambda z: z.log_softmax(1)),
        (lambda x: scored(x).argmax(1), lambda z: torch.eye(3)[z.argmax(1)]),
        (lambda x: scored(x).argmax(1)[:, None], lambda z: torch.eye(3)[z.argmax(1)]),
        (lambda x: scored(x).argmax(1).astype(np.uint8), lambda z: torch.eye(3)[z.argmax(1)]),
    ],
)
def test_answers_of_all_kinds_become_logits(answer, expected):
    with torch.no_grad():
        logits = NETWORK(X)
    found = l2p.black_box(answer, num_classes=3)(X)
    assert torch.allclose(found.float(), expected(logits).float(), atol=2e-3)


def test_scores_that_sum_to_one_by_chance_are_no_probabilities():
    box = l2p.black_box(lambda images: images.reshape(len(images), -1)[:, :2])
    x = torch.zeros(4, 1, 8, 8)
    x[:, 0, 0, :2] = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 1.0], [0.0, 1.0]])
    together = box(x)
    assert torch.equal(together, x[:, 0, 0, :2])
    assert torch.equal(torch.cat([box(image) for image in x.split(1)]), together)
    sure = l2p.black_box(
        lambda images: np.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3)) ** len(images)], 1)
    )
    sure(torch.ones(4, 1, 8, 8))
    with pytest.raises(InputError, match="probabilities before"):
        sure(torch.full((3, 1, 8, 8), 0.5))


def test_a_function_gets_arrays_of_its_own_as_it_wants_them():
    shapes = []

    def spoiling(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        assert images.flags["C_CONTIGUOUS"]
        shapes.append(images.shape)
        answer = scored(images.transpose(0, 3, 1, 2).copy())
        images[:] = 0
        return answer

    x = X.clone()
    box = l2p.black_box(spoiling, channels_last=True, batch_size=10)
    assert torch.equal(box(x).argmax(dim=1), NETWORK(X).argmax(dim=1))
    assert torch.equal(x, X)
    assert shapes == [(10, 8, 8, 1)] * 3
    assert box.queries == 30


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_rate_is_kept_on_average_and_in_every_second(monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(arrays, "time", clock)

    def timed(images: np.ndarray) -> np.ndarray:
        asked.append((clock.now, len(images)))
        return scored(images)

    box = l2p.black_box(timed, queries_per_second=8)
    for _ in range(2):
        box(X)
    assert {count for _, count in asked} == {8}
    assert [moment for moment, _ in asked] == pytest.approx([100, 101, 102, 103, 104, 105])
    clock.now += 60  # what was not used is not saved up
    box(X)
    assert [moment for moment, _ in asked[6:]] == pytest.approx([165, 166, 167])
    slow = l2p.black_box(timed, queries_per_second=0.5)
    slow(X[:2])
    assert asked[-1][0] - asked[-2][0] == pytest.approx(2)


def test_the_queries_are_said_before_they_are_made(monkeypatch):
    told = []
    clock = Clock()
    monkeypatch.setattr(arrays, "time", clock)
    box = l2p.black_box(scored, queries_per_second=1000)
    found = diagnose(
        box, (X, Y), budget=BUDGET, eps=EPS, engine="plain", progress=lambda *words: told.append((box.queries, *words))
    )
    before, _, expected, text = told[0]
    assert "queries of the model" in text
    assert "at 1000 a second" in text
    assert before < 0.2 * expected
    assert found.metadata["queries"] == box.queries
    assert 0.2 * expected < box.queries < 1.5 * expected
    told.clear()
    l2p.evaluate(box, (X, Y), {"square": Square(EPS, queries=50)}, draws=1, progress=lambda *words: told.append(words))
    assert told[0][1] == N * (1 + 51)


def test_a_function_of_arrays_that_is_not_wrapped_is_told_of_it():
    with pytest.raises(InputError, match=r"l2p\.black_box"):
        diagnose(lambda x: scored(np.asarray(x.detach())), (X, Y), progress=False)
