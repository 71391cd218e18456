"""Attack passes compiled: the same function, fresh and seeded draws, nothing stale, nothing broken by a failure."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD
from learn2perturb.engine import compiling, execution
from learn2perturb.engine.modes import own_modes
from learn2perturb.noise import noise_disabled, perturb

ROWS = 4
COMPILED = dataclasses.replace(execution.FAST, dtype=None, compiled_rows=ROWS)
FOLDED = dataclasses.replace(COMPILED, compiled_rows=0)
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.calls += 1
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def made() -> Net:
    torch.manual_seed(0)
    network = Net()
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def noisy():
    return perturb(made(), input_shape=(3, 8, 8), sites=["norm"], init=0.5)


X = torch.rand(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


def passed(network: nn.Module, x: torch.Tensor, mode: execution.ExecutionMode = COMPILED) -> torch.Tensor:
    """One differentiated pass as an attack makes it, and its gradient beside it."""
    with execution.running(mode), execution.attacking(network, x, True):
        x = x.clone().requires_grad_()
        logits = network(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return torch.cat([logits.detach().flatten(), gradient.flatten()])


def test_it_is_the_same_function_and_the_compiled_one_runs(noisy):
    with noise_disabled(noisy):
        before = noisy.calls
        found = passed(noisy, X)
        assert noisy.calls - before <= 1  # the trace of the folding, at most; the pass itself is compiled code
        torch.testing.assert_close(found, passed(noisy, X, FOLDED), rtol=1e-4, atol=1e-5)


def test_another_number_of_rows_runs_uncompiled(noisy):
    before = noisy.calls
    passed(noisy, X[:3])
    assert noisy.calls == before + 1


def test_draws_are_fresh_seeded_and_differ_over_rows(noisy):
    torch.manual_seed(3)
    first, second = passed(noisy, X), passed(noisy, X)
    torch.manual_seed(3)
    again = passed(noisy, X)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    rows = passed(noisy, X[:1].expand(ROWS, -1, -1, -1).contiguous())[: ROWS * 5].view(ROWS, 5)
    assert all(not torch.allclose(rows[0], row) for row in rows[1:])


def test_the_switch_of_the_noise_is_seen(noisy):
    with noise_disabled(noisy):
        assert torch.equal(passed(noisy, X), passed(noisy, X))
    assert not torch.equal(passed(noisy, X), passed(noisy, X))


def test_one_map_for_all_rows_where_draws_are_shared():
    network = perturb(made(), input_shape=(3, 8, 8), sites=["norm"], init=0.5, sharing="per_batch")
    same = X[:1].expand(ROWS, -1, -1, -1).contiguous()
    rows = passed(network, same)[: ROWS * 5].view(ROWS, 5)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    assert not torch.allclose(passed(network, same)[:5], rows[0])


@pytest.mark.parametrize(
    ("sharing", "layout"),
    [
        ("per_example", torch.channels_last),
        pytest.param("per_example", torch.contiguous_format, marks=pytest.mark.slow),
        ("per_batch", torch.contiguous_format),
        pytest.param("per_batch", torch.channels_last, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_training_pass_draws_the_same_noise_and_has_the_same_gradients(sharing, layout):
    found = []
    for rows in (0, ROWS):
        network = perturb(made(), input_shape=(3, 8, 8), sites=["conv", "norm"], init=0.5, sharing=sharing)
        network.requires_grad_(True).train().to(memory_format=layout)
        with torch.no_grad():  # so that a theta in another order would show
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        x = X.clone(memory_format=layout).requires_grad_()
        before = network.calls
        torch.manual_seed(5)
        mode = dataclasses.replace(COMPILED, compiled_rows=rows, compiled_training=True)
        with execution.running(mode), execution.training(network):
            logits = network(x)
            torch.nn.functional.cross_entropy(logits, Y).backward()
        assert network.calls - before == (0 if rows else 1)
        found.append([logits.detach(), x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_weights_that_moved_and_noise_that_came_later_are_seen():
    network = made()
    passed(network, X)
    with torch.no_grad():
        network.conv.weight.mul_(1.5)
        network.fc.bias.add_(1.0)
    torch.testing.assert_close(passed(network, X), passed(network, X, FOLDED), rtol=1e-4, atol=1e-5)
    perturb(network, input_shape=(3, 8, 8), sites=["norm"], init=0.5)
    network.requires_grad_(False)
    assert not torch.equal(passed(network, X), passed(network, X))


def test_a_network_that_cannot_be_compiled_goes_on_uncompiled_and_says_so_once(monkeypatch):
    def broken(*_):
        raise NotImplementedError("no compiler for this")

    monkeypatch.setattr(compiling, "_compile", lambda forward, device: broken)
    network = made()
    with own_modes():
        with pytest.warns(
            UserWarning, match=r"Net cannot be compiled here \(NotImplementedError: no compiler for this\)"
        ):
            found = passed(network, X)
        assert torch.equal(found, passed(network, X))  # warnings are errors here: a second one would fail
        assert not compiling.compiles(network)
    torch.testing.assert_close(found, passed(network, X, FOLDED))


def test_a_failure_to_compile_ends_with_the_work_that_had_it(monkeypatch):
    failing, calls = [True], []

    def compiler(forward, device):
        def fast(*arguments):
            calls.append(len(calls))
            if failing[0]:
                raise NotImplementedError("no compiler for this")
            return forward(*arguments)

        return fast

    monkeypatch.setattr(compiling, "_compile", compiler)
    network = made()
    with own_modes():
        with pytest.warns(UserWarning, match="cannot be compiled here"):
            passed(network, X)
        passed(network, X)
    assert len(calls) == 1
    failing[0] = False
    assert compiling.compiles(network)
    passed(network, X)
    assert len(calls) == 2


def test_attacks_leave_the_network_as_it_was_and_nothing_keeps_it_alive(noisy):
    with execution.running(COMPILED):
        x_adv = PGD(steps=2)(noisy, X, Y)
    assert x_adv.shape == X.shape
    assert "forward" not in noisy.__dict__
    network = made()
    passed(network, X)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_only_long_work_is_compiled():
    image = 32 * 32
    choose = execution.select
    fast = "fast" if execution.has_native_bfloat16(CPU) else "fast32"
    assert choose("auto", CPU, attacked_pixels=7 * 50_000 * image, rows=128).compiled_rows == 128
    assert choose("auto", CPU, attacked_pixels=20 * 500 * image, rows=128).compiled_rows == 0
    assert choose("plain", CPU, attacked_pixels=1e15, rows=128).compiled_rows == 0
    assert not choose(fast, CPU, attacked_pixels=7 * 50_000 * image, rows=128).compiled_training
    assert choose(fast, CPU, attacked_pixels=7 * 150_000 * image, rows=128).compiled_training
    assert compiling.compiles(made())
