"""The example that fine-tunes a network of timm runs, and its network comes back by its name."""

from __future__ import annotations

import importlib
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("timm")]


def test_a_network_of_timm_is_fine_tuned_with_noise(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    result = importlib.import_module("finetune_timm").main(channels=[8, 8, 8, 16], stem_chs=8)
    row = result.row("eot-pgd5")
    assert row.stochastic
    assert row.n == 100
    assert result.row("eot-pgd5", noise=False).accuracy <= 1
