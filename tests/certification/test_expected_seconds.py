"""How long a certificate takes is known before it is begun: from one pass of the network."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from learn2perturb.certification import certifying
from learn2perturb.cli.main import main

SIZES: list[int] = []


def model(x: torch.Tensor) -> torch.Tensor:
    SIZES.append(len(x))
    return x.flatten(1)[:, :3]


@pytest.mark.parametrize(("settings", "seconds"), [
    ({"sigma": 0.25}, 4 * 15 * 2 / 6), ({"method": "renyi"}, 4 * 10 * 2 / 6), ({"sigma": 0.25, "limit": 1}, 15 * 2 / 6),
])  # fmt: skip
def test_it_is_all_passes_at_the_pace_of_the_second(settings, seconds, monkeypatch):
    """Six rows take two seconds, and nine in the first pass of all."""
    clock = iter((0.0, 9.0, 10.0, 12.0))
    monkeypatch.setattr(certifying, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    SIZES.clear()
    data = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    found = certifying.expected_seconds(model, data, n0=5, n=10, batch_size=6, **settings)
    assert found == pytest.approx(seconds)
    assert SIZES == [6, 6]


def test_a_dry_run_says_it_and_settings_that_are_shown_cost_no_pass(capsys, monkeypatch):
    words = ["certify", "zoo:rse-digits", "--n=1000", "--device=cpu"]
    monkeypatch.setattr(certifying, "expected_seconds", lambda *_, **__: 7200.0)
    assert main([*words, "--dry-run"]) == 0
    assert re.search(r"^about 2.0 h: a guess from one pass of the network$", capsys.readouterr().out, re.M)
    monkeypatch.setattr(certifying, "expected_seconds", lambda *_, **__: pytest.fail("the network was timed"))
    assert main([*words, "--print-config"]) == 0
