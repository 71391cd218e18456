"""Modes are given back exactly, submodule by submodule, whatever happens."""

from __future__ import annotations

import pytest
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
