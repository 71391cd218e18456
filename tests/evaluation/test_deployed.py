"""How a program is compared with the network that it was made of: sizes, closeness, freshness, means over draws."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import deploying
from learn2perturb.evaluation.deploying import _compared

X = torch.rand(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def logits(x):
    return x.flatten(1)[:, :3]


def compared(program, model=logits, *, stochastic=False):
    return _compared(model, program, X, "onnx", stochastic=stochastic)


def test_batches_of_three_sizes_are_tried():
    asked = []

    def program(x):
        asked.append(len(x))
        return logits(x)

    assert compared(program) == 0
    assert asked[:3] == [4, 1, 9]


@pytest.mark.parametrize("size", [4, 1, 9])
def test_an_answer_of_another_shape_is_refused_at_any_size(size):
    with pytest.raises(ConfigError, match=rf"gives \({size}, 2\) for {size} images"):
        compared(lambda x: logits(x)[:, :2] if len(x) == size else logits(x))


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_a_program_is_within_a_thousandth_of_the_largest_logit_or_of_one(scale):
    model = lambda x: scale * logits(x) / logits(X).abs().max()  # noqa: E731
    allowed = 1e-3 * max(scale, 1.0)
    assert compared(lambda x: model(x) - 0.9 * allowed, model) == pytest.approx(0.9 * allowed)
    for off in (1.1 * allowed, -1.1 * allowed, math.nan):
        with pytest.raises(ConfigError, match="differs from the network by"):
            compared(lambda x, off=off: model(x) + off, model)


class Alternating:
    """Adds 1 and -1 in turn to some logits of every row: a noise whose mean and variance are known exactly."""

    def __init__(self, shift=0.0, noise=(1.0, 1.0, 0.0)):
        self.sign, self.shift, self.noise = 1.0, torch.tensor(shift), torch.tensor(noise)

    def __call__(self, x):
        self.sign = -self.sign
        return logits(x) + self.shift + self.sign * self.noise


ERROR = math.sqrt(2 * (32 / 31) / 32)  # of the difference of two means of 32 draws


@pytest.mark.parametrize("errors", [0.0, 3.0, -5.9])
def test_means_within_six_standard_errors_agree(errors):
    found = compared(Alternating([errors * ERROR, 0.0, 1e-12]), Alternating(), stochastic=True)
    assert found == pytest.approx(abs(errors), abs=2e-3)  # where nothing is drawn, rounding is no difference


@pytest.mark.parametrize("shift", [[6.2 * ERROR, 0.0, 0.0], [0.0, -6.2 * ERROR, 0.0], [0.0, 0.0, 1e-3]])
def test_means_further_away_do_not(shift):
    with pytest.raises(ConfigError, match="standard errors from the network's"):
        compared(Alternating(shift), Alternating(), stochastic=True)


def test_a_class_that_is_impossible_in_both_is_no_difference():
    impossible = [0.0, 0.0, -math.inf]
    assert compared(Alternating(impossible), Alternating(impossible), stochastic=True) == pytest.approx(0, abs=1e-6)


def drawn(rows):
    def model(x):
        return logits(x) + torch.randn(len(x) if rows else 1, 3)

    return model


def test_draws_differ_over_calls_and_over_rows_where_the_networks_do():
    torch.manual_seed(0)
    assert compared(drawn(rows=True), drawn(rows=True), stochastic=True) < 6
    assert compared(drawn(rows=False), drawn(rows=False), stochastic=True) < 6
    assert compared(drawn(rows=True), drawn(rows=False), stochastic=True) < 6
    with pytest.raises(ConfigError, match="does not draw its noise anew"):
        compared(drawn(rows=False), drawn(rows=True), stochastic=True)
    kept = torch.randn(200, 3)
    with pytest.raises(ConfigError, match="does not draw its noise anew"):
        compared(lambda x: logits(x) + kept[: len(x)], drawn(rows=True), stochastic=True)


@pytest.mark.parametrize(
    ("said", "shown"), [("\n  \nfirst\nsecond", "first"), ("x" * 250, "x" * 200), ("", "KeyError")]
)
def test_what_cannot_be_traced_or_written_is_told_by_its_first_line(said, shown, monkeypatch):
    class Failing(KeyError):
        def __str__(self):
            return said

    Failing.__name__ = "KeyError"

    def fails(*_, **__):
        raise Failing

    network = torch.nn.Flatten()
    monkeypatch.setattr(torch.onnx, "export", fails)
    monkeypatch.setattr(deploying, "_package", lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "_traced", lambda *_: None)
        with pytest.raises(ConfigError, match=f"cannot be written as ONNX: {shown}; use torch-export"):
            deploying._onnx(network, X, "")
    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(ConfigError, match=f"cannot be traced with batches of any size: {shown}; make"):
        deploying._traced(network, X)


def test_a_program_is_made_of_the_network_in_eval_mode(tmp_path, monkeypatch):
    network, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout()).train(), []

    def write(model, example, text):
        seen.append((model.training, model[1].training, tuple(example.shape), torch.is_grad_enabled(), text))
        return b"a program", model

    monkeypatch.setattr(deploying, "_torch_export", write)
    made = deploying.deploy(network, tmp_path / "it.pt2", "torch-export", input_shape=(1, 2, 2), facts={"b": 1, "a": 2})
    assert seen == [(False, False, (4, 1, 2, 2), False, '{"a": 2, "b": 1}')]
    assert made.path.read_bytes() == b"a program" and (made.stochastic, made.difference) == (False, 0.0)
    assert network.training and network[1].training


@pytest.mark.parametrize(("shared", "good"), [(False, True), (True, False)])
def test_little_noise_of_each_row_is_noise_of_each_row(shared, good):
    def model(x):
        return logits(x) + 0.1 * torch.randn(len(x), 3, dtype=x.dtype)

    def program(x):
        return logits(x) + 0.1 * torch.randn(1 if shared else len(x), 3, dtype=x.dtype)

    with contextlib.nullcontext() if good else pytest.raises(ConfigError, match="does not draw its noise anew"):
        compared(program, model, stochastic=True)


def test_a_program_is_traced_for_batches_of_one_image_and_more(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.export, "Dim", lambda name, **bounds: (asked.append(bounds), name)[1])
    monkeypatch.setattr(torch.export, "export", lambda *_, **settings: settings)
    assert deploying._traced(torch.nn.Flatten(), X) == {"dynamic_shapes": ({0: "batch"},), "strict": False}
    assert asked == [{"min": 1}]
