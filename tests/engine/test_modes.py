"""Modes are given back exactly, submodule by submodule, whatever happens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from learn2perturb.engine.modes import in_mode


def network() -> nn.Module:
    """A network whose first block is frozen in eval mode, but for one layer."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()), nn.BatchNorm2d(1))
    model[0].eval()
    model[0][1].train()
    return model


@pytest.mark.parametrize("training", [True, False, None])
def test_modes_are_set_and_given_back(training):
    model = network()
    before = [module.training for module in model.modules()]
    with in_mode(model, training):
        during = [module.training for module in model.modules()]
    assert during == (before if training is None else [training] * len(before))
    assert [module.training for module in model.modules()] == before


def test_modes_are_given_back_on_failure():
    model = network()
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), in_mode(model, False):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_a_function_has_no_mode():
    with in_mode(lambda x: x, False):
        pass


@pytest.mark.parametrize("switched", ["the older switches", "the newer switches"])
def test_float32_on_a_card_is_float32_and_the_callers_switches_come_back(switched):
    """In a process of its own: torch does not go back from its newer switches to the older ones."""
    newer = "torch.backends.cudnn.conv.fp32_precision = 'tf32'" if "newer" in switched else ""
    program = f"""
import torch
from learn2perturb.engine.modes import full_float32, own_modes
torch.cuda.is_available = lambda: True
{newer}
def switches():
    b = torch.backends
    return [b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision]
before = switches()
assert before[0] == "tf32", before
with own_modes(), full_float32():
    assert "tf32" not in switches(), switches()
after = switches()
assert after[0] == "tf32" and after[1] != "tf32", after
"""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has the older switches only")
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)
