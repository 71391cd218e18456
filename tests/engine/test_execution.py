"""Which execution mode runs, and that the fast one computes what the plain one does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from learn2perturb.engine import FAST, FAST32, PLAIN, autocast, current, execution, running, select
from learn2perturb.errors import ConfigError
from learn2perturb.models import build_model
from learn2perturb.noise import noise_disabled, perturb

CPU = torch.device("cpu")


def test_plain_is_the_default_and_a_mode_ends_with_its_body_also_on_failure():
    assert current() is PLAIN
    with running(FAST):
        assert current() is FAST
        with running(PLAIN):
            assert current() is PLAIN
        assert current() is FAST
    with pytest.raises(ZeroDivisionError), running(FAST):
        raise ZeroDivisionError
    assert current() is PLAIN


def test_autocast_follows_the_mode():
    a = torch.rand(4, 4)
    with autocast("cpu"):
        assert (a @ a).dtype == torch.float32
    with running(FAST), autocast("cpu"):
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_auto_computes_in_bfloat16_only_where_that_is_native(native, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bfloat16", lambda device: native)
    assert select("auto", CPU) == (FAST if native else FAST32)
    assert select("plain", CPU) is PLAIN
    assert select("fast32", CPU) == FAST32
    if native:
        assert select("fast", CPU) == FAST
    else:
        with pytest.raises(ConfigError, match="bfloat16 in hardware, which cpu lacks; use 'fast32', 'auto' or 'plain'"):
            select("fast", CPU)


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_plain_where_compiling_would_not_be_earned_back(native, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bfloat16", lambda device: native)
    least = 20_000 * 32 * 32
    assert select("auto", CPU, pixels=least - 1) is PLAIN
    assert select("auto", CPU, pixels=least).name == ("fast" if native else "fast32")
    assert select("fast32", CPU, pixels=1) == FAST32
    assert (select(None, CPU, pixels=least - 1), select(None, CPU, pixels=least)) == (PLAIN, FAST32)  # never bfloat16


def test_the_float32_mode_differs_in_nothing_but_the_type():
    assert dataclasses.replace(FAST32, name="fast", dtype=torch.bfloat16) == FAST
    assert dataclasses.replace(execution.CUDA32, name="fast", dtype=torch.bfloat16) == execution.CUDA
    with running(FAST32), autocast("cpu"):
        assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", ["turbo", "", "FAST"])
def test_an_unknown_mode_lists_the_known(name):
    with pytest.raises(ConfigError, match="allowed: auto, plain, fast, fast32"):
        select(name, CPU)


def test_a_device_without_an_answer_is_not_fast():
    assert select("auto", torch.device("meta")) is select(None, torch.device("meta")) is PLAIN
    with pytest.raises(ConfigError, match="runs on cpu and cuda, not on meta; use 'auto' or 'plain'"):
        select("fast32", torch.device("meta"))


@pytest.mark.parametrize(("mode", "rounding"), [(FAST, 0.03), (FAST32, 1e-4)])
@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_with_noise_off_a_fast_mode_computes_what_the_plain_one_does(name, mode, rounding):
    torch.manual_seed(0)
    network = perturb(build_model(name, input_shape=(3, 16, 16)).eval(), input_shape=(3, 16, 16))
    x = torch.rand(32, 3, 16, 16)
    with torch.no_grad(), noise_disabled(network):
        plain = network(x)
        mode.place(network)
        with running(mode), autocast("cpu"):
            fast = network(mode.place_images(x)).float()
    # bfloat16 keeps 8 bits: a relative error of 2^-9 a rounding, and a few dozen of them in a row.
    assert (fast - plain).abs().max() < rounding * plain.abs().max()
    assert (fast.argmax(1) == plain.argmax(1)).double().mean() >= 0.9


@pytest.mark.parametrize("mode", [FAST, FAST32], ids=lambda mode: mode.name)
def test_with_noise_on_two_modes_agree_in_law(mode):
    network = perturb(build_model("digits_cnn", input_shape=(1, 8, 8)).eval(), input_shape=(1, 8, 8), init=0.5)
    x = torch.rand(1, 1, 8, 8).expand(3000, -1, -1, -1)
    with torch.no_grad():
        plain = network(x)
        with running(mode), autocast("cpu"):
            fast = network(mode.place_images(x)).float()
    error = (plain.var(0) / 3000 + fast.var(0) / 3000).sqrt()
    assert ((plain.mean(0) - fast.mean(0)).abs() < 5 * error + 0.02 * plain.abs().mean()).all()
    assert torch.allclose(plain.std(0), fast.std(0), rtol=0.1)
