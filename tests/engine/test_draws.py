"""Standard normal numbers, plain, threaded and fused: their law, their independence, and what decides them."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from scipy import stats
from torch import nn

from learn2perturb.attacks import PGD
from learn2perturb.engine import FAST, PLAIN, draws, execution, fused, running
from learn2perturb.engine.compiler import FINDINGS
from learn2perturb.engine.draws import standard_normal
from learn2perturb.engine.modes import own_modes
from learn2perturb.engine.random import seed_torch
from learn2perturb.noise import noise_disabled, perturb

CPU = torch.device("cpu")
ROWS, FEATURES = 64, 4096  # above the size from which draws are threaded


@pytest.fixture(params=["plain", "threaded"])
def mode(request, monkeypatch):
    """Draw in an execution mode; two threads are promised to the threaded one, whatever the machine has."""
    if request.param == "plain":
        with running(PLAIN):
            yield request.param
        return
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    filled = []
    threaded = draws._threaded_normal
    monkeypatch.setattr(draws, "_threaded_normal", lambda *arguments: (filled.append(1), threaded(*arguments)))
    with running(FAST):
        yield request.param
    assert filled  # else this tested the plain path


def fused_draws(rows, features):
    """Return what a pass of the fused path would draw now: the key comes from torch's default generator."""
    key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
    return fused.draws(rows, features, key, fused.quantile_table("gaussian"))


def check_law(numbers):
    """Mean, variance, law, and tails to 4 sigma within 5 standard errors."""
    flat = numbers.flatten().double()
    n = len(flat)
    assert abs(flat.mean().item()) < 5 / n**0.5
    assert abs(flat.var().item() - 1) < 5 * (2 / n) ** 0.5
    assert stats.kstest(flat[:100_000].numpy(), "norm").pvalue > 1e-4
    for bound in (1, 2, 3, 3.5, 4):
        p = 2 * stats.norm.sf(bound)
        assert abs((flat.abs() > bound).double().mean().item() - p) < 5 * math.sqrt(p / n)


def check_independence(vectors):
    """All pairwise correlations of rows, also of squares, stay within what chance gives so many pairs."""
    for values in (vectors, vectors.square()):
        correlation = torch.corrcoef(values.double())
        correlation.fill_diagonal_(0)
        pairs = len(vectors) * (len(vectors) - 1) / 2
        bound = stats.norm.isf(1e-5 / pairs) / vectors.shape[1] ** 0.5
        assert correlation.abs().max().item() < 1.2 * bound


def test_normal_numbers_have_their_law_to_four_sigma(mode):
    check_law(torch.cat([standard_normal((ROWS, FEATURES), CPU) for _ in range(8)]))


def test_rows_halves_and_calls_are_independent(mode):
    first, second = standard_normal((ROWS, FEATURES), CPU), standard_normal((ROWS, FEATURES), CPU)
    assert not torch.equal(first[: ROWS // 2], first[ROWS // 2 :])
    check_independence(torch.cat([first, second]))


def seeded_rows(make, steps):
    """Return the rows that training steps draw: every step seeds torch from its number alone."""
    rows = []
    for number in range(steps):
        seed_torch(0, "step", number)
        rows.append(make())
    return torch.cat(rows)


def test_training_steps_are_independent(mode):
    check_independence(seeded_rows(lambda: standard_normal((ROWS, FEATURES), CPU)[:8], 12))


class Watched(nn.Module):
    """Two sites in a row; keeps the noise that each added in each pass, one row an image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.noise = []

    def forward(self, x):
        h = x.repeat(1, 64, 1, 1).to(torch.bfloat16)
        for site in (self.first, self.second):
            noisy = site(h)
            self.noise.append((noisy - h).detach().float().flatten(1))
            h = noisy
        return h.float().mean(dim=(2, 3))[:, :5]


def attacked(distribution="gaussian"):
    """Return the noise of three steps of an attack, two sites and six rows, each a row of its own."""
    network = Watched().eval()
    perturb(network, input_shape=(3, 16, 16), sites=["first", "second"], init=1.0, distribution=distribution)
    PGD(steps=3).craft(network, torch.full((6, 3, 16, 16), 0.5), torch.zeros(6, dtype=torch.int64))
    noise = torch.cat(network.noise[-6:])  # a pass before may have been a trace
    assert noise.shape == (3 * 2 * 6, 64 * 3 * 16 * 16)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    return noise


def test_rows_sites_and_steps_of_an_attack_are_independent(mode, monkeypatch):
    monkeypatch.setattr(fused, "can_fuse", lambda h: False)  # the fused path has this test below
    check_independence(attacked())


@pytest.mark.parametrize("distribution", ["laplace", "uniform"])
def test_so_they_are_under_other_distributions(distribution):
    check_independence(attacked(distribution))


def test_the_default_generator_alone_decides(mode):
    torch.manual_seed(5)
    first, then = standard_normal((ROWS, FEATURES), CPU), standard_normal((ROWS, FEATURES), CPU)
    torch.manual_seed(5)
    assert torch.equal(standard_normal((ROWS, FEATURES), CPU), first)
    assert torch.equal(standard_normal((ROWS, FEATURES), CPU), then)
    assert not torch.equal(first, then)


def test_channels_last_draws_have_that_layout_and_shape(mode):
    numbers = standard_normal((64, 16, 16, 8), CPU, channels_last=True)
    assert numbers.shape == (64, 16, 16, 8)
    assert numbers.is_contiguous(memory_format=torch.channels_last)


# --- fused


def test_fused_numbers_have_their_law_to_four_sigma():
    check_law(torch.cat([fused_draws(128, 4096) for _ in range(4)]))


def test_fused_rows_sites_and_passes_are_independent():
    check_independence(torch.cat([fused_draws(32, 4096) for _ in range(6)]))


def test_fused_training_steps_are_independent():
    check_independence(seeded_rows(lambda: fused_draws(8, 4096), 24))


def test_fused_rows_sites_and_steps_of_an_attack_are_independent(compiler):
    with running(FAST):
        check_independence(attacked())


def test_fused_neighbours_within_a_row_are_independent():
    numbers = fused_draws(1, 400_000).flatten().double()
    for lag in (1, 2, 3, 8, 64, 1024, 200_000):  # the last: the two halves of the same random words
        pairs = len(numbers) - lag
        assert abs((numbers[lag:] * numbers[:-lag]).mean().item()) < 5 / pairs**0.5


@pytest.mark.parametrize("bit", [0, 1, 15, 31])
@pytest.mark.parametrize("word", [0, 1])
def test_keys_that_differ_in_one_bit_give_unrelated_draws(word, bit):
    table = fused.quantile_table("gaussian")
    key = torch.tensor([77, -5], dtype=torch.int32)
    other = key.clone()
    other[word] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    numbers = torch.stack([fused.draws(1, 100_000, k, table).flatten() for k in (key, other)])
    assert abs(torch.corrcoef(numbers)[0, 1].item()) < 5 / 100_000**0.5
    assert (numbers[0] == numbers[1]).double().mean().item() < 1e-3


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (1, 3), (3, 5), (7, 9)])
def test_odd_counts_lose_and_repeat_nothing(rows, features):
    key = torch.tensor([1, 2], dtype=torch.int32)
    numbers = fused.draws(rows, features, key, fused.quantile_table("gaussian"))
    assert numbers.shape == (rows, features)
    assert len(set(numbers.flatten().tolist())) == rows * features


@pytest.fixture
def compiler():
    """Skip where nothing can be compiled; the package then falls back, which has a test of its own."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler here")


# All in bfloat16, as in fast mode: one graph is compiled for all of them, and compiling takes seconds.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_noise_equals_its_eager_evaluation_exactly(compiler, layout):
    dtype = torch.bfloat16
    h = torch.randn(5, 6, 7, 3).to(dtype).contiguous(memory_format=layout).requires_grad_()
    theta = torch.rand(6, 7, 3, requires_grad=True)
    weights = torch.randn(5, 6, 7, 3)
    torch.manual_seed(9)
    noisy = fused.add_noise(h, theta, "gaussian")
    (noisy.float() * weights).sum().backward()
    torch.manual_seed(9)
    eps = fused_draws(5, 126)
    eps = eps.view(5, 7, 3, 6).permute(0, 3, 1, 2) if layout is torch.channels_last else eps.view(5, 6, 7, 3)
    assert noisy.dtype == dtype
    assert noisy.is_contiguous(memory_format=layout)
    assert torch.equal(noisy, (h.float() + theta * eps).to(dtype))
    pulled = (weights.to(dtype).float() * eps).sum(0)
    assert torch.allclose(theta.grad, pulled, atol=1e-5)  # d/dtheta of sum(g * (h + theta * eps))
    assert torch.equal(h.grad, weights.to(dtype))


def test_a_theta_of_one_number_a_channel_gets_the_sum_of_its_pulls(compiler):
    h, theta = torch.randn(4, 3, 5, 5).bfloat16(), torch.full((3, 1, 1), 0.5, requires_grad=True)
    torch.manual_seed(2)
    fused.add_noise(h, theta, "uniform").float().square().sum().backward()
    torch.manual_seed(2)
    twin = torch.full((3, 1, 1), 0.5, requires_grad=True)
    key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
    eps = fused.draws(4, 75, key, fused.quantile_table("uniform")).view_as(h)
    (h + twin * eps).bfloat16().float().square().sum().backward()
    assert torch.allclose(theta.grad, twin.grad, rtol=1e-2)


def test_the_default_generator_alone_decides_fused_noise(compiler):
    network = perturb(nn.Sequential(nn.Identity(), nn.Flatten()), input_shape=(2, 4, 4), sites="0")
    x = torch.zeros(3, 2, 4, 4).bfloat16()
    with running(FAST), torch.no_grad():
        torch.manual_seed(1)
        first, then = network(x), network(x)
        torch.manual_seed(1)
        assert torch.equal(network(x), first)
        assert torch.equal(network(x), then)
    assert not torch.equal(first, then)


def test_without_a_compiler_it_warns_once_and_draws_plainly(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("")  # an error may have no text

    monkeypatch.setattr(FINDINGS, "usable", True)
    monkeypatch.setattr(fused, "_compiled", lambda function: broken)
    network = perturb(nn.Sequential(nn.Identity(), nn.Flatten()), input_shape=(4, 8, 8), sites="0", init=1.0)
    x = torch.zeros(200, 4, 8, 8)
    with running(FAST), torch.no_grad():
        with pytest.warns(UserWarning, match="cannot be compiled here"):
            noise = network(x)
        again = network(x)  # warnings are errors here: a second one would fail
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(noise, again)


def test_a_kernel_that_fails_to_compile_is_tried_anew_by_the_next_work(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(FINDINGS, "usable", True)
    network = perturb(nn.Sequential(nn.Identity(), nn.Flatten()), input_shape=(4, 8, 8), sites="0", init=1.0)
    x = torch.zeros(200, 4, 8, 8)
    with monkeypatch.context() as patched, own_modes(), running(FAST), torch.no_grad():
        patched.setattr(fused, "_compiled", lambda function: broken)
        with own_modes(), pytest.warns(UserWarning, match="cannot be compiled here"):
            network(x)
        assert not fused.can_fuse(x)  # the inner one is part of the outer
    assert fused.can_fuse(x)


def test_fused_noise_is_not_used_where_it_must_not_be(monkeypatch):
    monkeypatch.setattr(fused, "add_noise", lambda *arguments: pytest.fail("fused"))
    x = torch.zeros(3, 2, 4, 4)
    with torch.no_grad(), running(PLAIN):
        perturb(nn.Sequential(nn.Identity()), input_shape=(2, 4, 4), sites="0")(x)
    with torch.no_grad(), running(FAST):
        shared = perturb(nn.Sequential(nn.Identity()), input_shape=(2, 4, 4), sites="0", sharing="per_batch")
        noise = shared(x)
        assert torch.equal(noise[0], noise[1])
        own = perturb(nn.Sequential(nn.Identity()), input_shape=(2, 4, 4), sites="0")
        with noise_disabled(own):
            assert torch.equal(own(x), x)
        own[0].perturbation.replay = 3
        assert torch.equal(own(x), own(x))
        assert not fused.can_fuse(torch.zeros(4, 6)[:, ::2])


def test_autocast_copies_and_modes_do_not_change_what_the_network_is():
    network = perturb(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), input_shape=(3, 8, 8), sites="0")
    keys, values = list(network.state_dict()), copy.deepcopy(network.state_dict())
    execution.FAST.place(network)
    execution.PLAIN.place(network)
    assert list(network.state_dict()) == keys
    assert all(torch.equal(network.state_dict()[key], value) for key, value in values.items())
