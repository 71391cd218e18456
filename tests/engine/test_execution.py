"""Which execution mode runs, and that the fast one computes what the plain one does."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.engine import FAST, PLAIN, autocast, current, execution, running, select
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
def test_auto_is_fast_only_where_bfloat16_is_native(native, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bfloat16", lambda device: native)
    assert select("auto", CPU) == (FAST if native else PLAIN)
    assert select("plain", CPU) is PLAIN
    if native:
        assert select("fast", CPU) == FAST
    else:
        with pytest.raises(ConfigError, match="bfloat16 in hardware"):
            select("fast", CPU)


@pytest.mark.parametrize("name", ["turbo", "", "FAST", None])
def test_an_unknown_mode_lists_the_known(name):
    with pytest.raises(ConfigError, match="allowed: auto, plain, fast"):
        select(name, CPU)


def test_a_device_without_an_answer_is_not_fast():
    assert select("auto", torch.device("meta")) is PLAIN


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_with_noise_off_the_fast_mode_computes_what_the_plain_one_does(name):
    torch.manual_seed(0)
    network = perturb(build_model(name, input_shape=(3, 16, 16)).eval(), input_shape=(3, 16, 16))
    x = torch.rand(32, 3, 16, 16)
    with torch.no_grad(), noise_disabled(network):
        plain = network(x)
        FAST.place(network)
        with running(FAST), autocast("cpu"):
            fast = network(FAST.place_images(x)).float()
    # bfloat16 keeps 8 bits: a relative error of 2^-9 a rounding, and a few dozen of them in a row.
    assert (fast - plain).abs().max() < 0.03 * plain.abs().max()
    assert (fast.argmax(1) == plain.argmax(1)).double().mean() >= 0.9


def test_with_noise_on_the_two_modes_agree_in_law():
    network = perturb(build_model("digits_cnn", input_shape=(1, 8, 8)).eval(), input_shape=(1, 8, 8), init=0.5)
    x = torch.rand(1, 1, 8, 8).expand(3000, -1, -1, -1)
    with torch.no_grad():
        plain = network(x)
        with running(FAST), autocast("cpu"):
            fast = network(FAST.place_images(x)).float()
    error = (plain.var(0) / 3000 + fast.var(0) / 3000).sqrt()
    assert ((plain.mean(0) - fast.mean(0)).abs() < 5 * error + 0.02 * plain.abs().mean()).all()
    assert torch.allclose(plain.std(0), fast.std(0), rtol=0.1)
